"""Tests distances of relations between samples, and of directions to class means."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import class_means, largest_array, make_batch

import kddm_jax

pytestmark = pytest.mark.usefixtures("x64")

RTOL = 1e-9
RELATIONS = ("pkt", "rkd_distance", "rkd_angle")


@cache
def compiled(name, **options):
    return jax.jit(jax.value_and_grad(partial(getattr(kddm_jax, name), **options)))


def value(name, *arrays, **options):
    return compiled(name, **options)(*map(jnp.asarray, arrays))[0]


# More and fewer samples than features, and networks of different widths.
@pytest.mark.parametrize("shape", [(10, 16, 16), (9, 4, 7), (3, 5, 2)])
@pytest.mark.parametrize("name", RELATIONS)
def test_relations(name, shape):
    n, d, other = shape
    x, y = make_batch(n, d).x, make_batch(n, other, seed=1).y
    expected = getattr(reference, name)(x, y)
    np.testing.assert_allclose(value(name, x, y), expected, rtol=RTOL)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_contrastive(temperature):
    batch = make_batch(10, 16)
    found = value("contrastive", batch.x, batch.y, temperature=temperature)
    expected = reference.contrastive(batch.x, batch.y, temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=RTOL)


def test_contrastive_of_a_constant_student_is_log_n():
    batch = make_batch(10, 16)
    constant = np.zeros_like(batch.x)
    np.testing.assert_allclose(value("contrastive", constant, batch.y), np.log(10))


def test_kdpp():
    batch, means = make_batch(10, 6), class_means(5, 6)
    for labels in (np.arange(10) % 5, np.array([0, -1, 4, 4, -1, 2, 2, 2, 2, 2])):
        for factor in (0.1, 1.0, 10.0):  # shorter and longer than the teacher's
            arrays = factor * batch.x, batch.y, labels, np.float64(means)
            expected = reference.kdpp(*arrays)
            np.testing.assert_allclose(value("kdpp", *arrays), expected, rtol=RTOL)


def test_kdpp_pulls_short_features_only():
    """Features in the right direction become longer, up to the teacher's length."""
    means, labels, y = np.eye(2), np.array([0, 1]), np.ones((2, 2))
    for length, slope in ((0.5, -1 / np.sqrt(2)), (3.0, 0.0)):
        _, grad = compiled("kdpp")(length * np.eye(2), y, labels, means)
        np.testing.assert_allclose(np.diag(grad), slope / 2, atol=1e-12)


def test_kdpp_of_a_class_without_a_mean():
    """Its loss is 1, without a gradient: also for labels beyond the means."""
    batch, means = make_batch(4, 3), np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    for labels in (np.array([0, 0, 0, 0]), np.array([2, 3, 9, 2])):
        found, grad = compiled("kdpp")(batch.x, batch.y, labels, means)
        assert found == 1
        np.testing.assert_array_equal(grad, 0)
    with pytest.raises(ValueError, match=r"below num_classes=2, got 2; correct"):
        kddm_jax.kdpp(batch.x, batch.y, np.array([0, 1, 1, 2]), means)
    with pytest.raises(ValueError, match=r"class_means must .*\[k, 3\], got \[2, 2\]"):
        kddm_jax.kdpp(batch.x, batch.y, np.array([0, 1, 1, 0]), means[:, :2])


@pytest.mark.parametrize("name", [*RELATIONS, "contrastive"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_samples_have_no_relations(name, n):
    """A single sample has none, and two samples have no angle and one distance."""
    batch = make_batch(n, 4)
    found, grad = compiled(name)(batch.x, batch.y)
    assert np.isfinite(grad).all()
    if n == 1 or (n == 2 and name != "contrastive"):
        np.testing.assert_allclose(found, 0, atol=1e-15)
        np.testing.assert_allclose(grad, 0, atol=1e-12)
    else:
        assert found > 0


def test_opposite_samples_are_finite():
    """The kernel (1 + cos) / 2 of opposite samples is zero, also in float32."""
    x = np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])
    y = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    for dtype in (np.float32, np.float64):
        found, grad = compiled("pkt")(jnp.asarray(x, dtype), jnp.asarray(y, dtype))
        assert 1 < found < 100
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", [*RELATIONS, "contrastive"])
def test_memory_is_that_of_matrices(name):
    x, y = np.zeros((2, 20, 12))
    assert largest_array(getattr(kddm_jax, name), x, y) <= 20 * 20
    # The search does find larger arrays.
    naive = lambda x, y: jnp.sum((x[:, None] - x[None]) ** 2) + jnp.sum(y)
    assert largest_array(naive, x, y) == 20 * 20 * 12
