"""Tests that products of features give the distances of Gram matrices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import largest_array

from kddm_jax import cka, feature_gram, similarity_preserving
from kddm_jax.numerics import grams
from kddm_jax.testing import assert_distance_gradients

DISTANCES = (feature_gram, cka, similarity_preserving)


def definition(name, x, y, mask):
    """Computes the distance from Gram matrices by NumPy, in float64."""
    x, y = (np.asarray(z, float)[np.asarray(mask)] for z in (x, y))
    if name == "similarity_preserving":
        rows = [z @ z.T for z in (x, y)]
        one, other = (g / np.linalg.norm(g, axis=1, keepdims=True) for g in rows)
        return np.mean((one - other) ** 2)
    products = []
    for z in (x, y):
        z = z - z.mean(0)
        z = z / np.linalg.norm(z)
        products.append(z @ z.T)
    if name == "cka":
        products = [g / np.linalg.norm(g) for g in products]
        return np.sum((products[0] - products[1]) ** 2) / 2
    return np.sum((products[0] - products[1]) ** 2)


def features(n, d, relative, width=None):
    """Makes features of a teacher, and of a student at a relative difference."""
    rng = np.random.default_rng(0)
    y = rng.exponential(1.0, (n, d)) * rng.uniform(0.1, 2, d)
    y[:, 1] = 0  # a dead feature
    x = y + relative * rng.normal(size=(n, d))
    if width:
        x = x[:, :width]
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


@pytest.mark.parametrize("relative", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("fn", DISTANCES)
def test_many_samples_of_few_features(fn, relative):
    """Values and gradients of float32 are those of the definition in float64."""
    x, y = features(200, 12, relative)
    mask = jnp.arange(200) % 5 != 0
    assert grams.is_tall(x, y)
    value, gradient = jax.jit(jax.value_and_grad(partial(fn, mask=mask)))(x, y)
    expected = definition(fn.__name__, x, y, mask)
    assert value == pytest.approx(expected, rel=1e-3)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(z), jnp.float64) for z in (x, y)]
        exact, slope = jax.value_and_grad(partial(fn, mask=mask))(*wide)
        assert exact == pytest.approx(expected, rel=1e-8)
    size = np.linalg.norm(slope)
    assert np.linalg.norm(gradient - np.asarray(slope)) < 1e-2 * size


@pytest.mark.parametrize("fn", DISTANCES)
def test_gradients_of_many_samples(fn, x64):
    x, y = (jnp.asarray(np.asarray(z), jnp.float64) for z in features(12, 3, 0.5))
    assert_distance_gradients(fn, x, y)


@pytest.mark.parametrize("fn", DISTANCES)
def test_equal_features_have_no_distance(fn):
    _, y = features(200, 12, 1.0)
    value, gradient = jax.value_and_grad(fn)(y, y)
    assert value == pytest.approx(0, abs=1e-12)
    assert float(jnp.max(jnp.abs(gradient))) < 1e-7


@pytest.mark.parametrize("fn", DISTANCES)
def test_unequal_widths_go_in_blocks(fn, monkeypatch):
    """Blocks of rows, of which the last one is not full, change nothing."""
    x, y = features(50, 12, 1.0, width=7)
    whole = jax.value_and_grad(fn)(x, y)
    monkeypatch.setattr(grams, "ROWS", 16)
    value, gradient = jax.value_and_grad(fn)(x, y)
    np.testing.assert_allclose(value, whole[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, whole[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("noise", [0.0, 1e-2])
def test_a_rotated_student(noise):
    """Round-off is 1e-7 of the products, and a value is never negative."""
    x, y = features(200, 12, 1.0)
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    x = jnp.asarray(np.asarray(y) @ turn + noise * rng.normal(size=y.shape), y.dtype)
    value, gradient = jax.value_and_grad(feature_gram)(x, y)
    expected = definition("feature_gram", x, y, np.ones(200, bool))
    assert value == pytest.approx(expected, rel=1e-2, abs=1e-7)
    assert value >= 0
    assert jnp.all(jnp.isfinite(gradient))


def test_more_samples_than_the_root_of_an_int32():
    x = jnp.ones((47_000, 1)).at[0].set(2)
    assert jax.eval_shape(similarity_preserving, x, x).shape == ()


@pytest.mark.parametrize("width", [None, 7])
@pytest.mark.parametrize("fn", DISTANCES)
def test_no_array_of_all_pairs(fn, width, monkeypatch):
    """Neither value nor gradient has an array [n, n]."""
    monkeypatch.setattr(grams, "ROWS", 16)
    x, y = features(100, 12, 1.0, width=width)
    assert largest_array(fn, x, y) <= 112 * 16
