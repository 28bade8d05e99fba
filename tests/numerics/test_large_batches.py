"""Tests that large batches give the distances of their definitions, by class."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import largest_array

from kddm_jax import (
    class_gaussian_kl,
    class_gaussian_wasserstein,
    class_mmd,
    distill_loss,
    mmd,
)
from kddm_jax.numerics import grams
from kddm_jax.testing import assert_distance_gradients

K = 7
FEW = {
    "cw2": class_gaussian_wasserstein,
    "cw2 diag": partial(class_gaussian_wasserstein, covariance="diag", reduction="sum"),
    "ckl": class_gaussian_kl,
    "ckl turned": partial(
        class_gaussian_kl, direction="teacher||student", reduction="weighted"
    ),
    "ckl full": partial(class_gaussian_kl, ridge=0.05, covariance="full"),
}
KERNELS = {
    "cmmd": lambda x, y, labels, **options: class_mmd(x, y, labels, **options),
    "cmmd linear": partial(class_mmd, kernel="linear"),
    "mmd": lambda x, y, labels, **options: mmd(x, y, **options),
    "mmd of two": lambda x, y, labels, **options: mmd(
        x, y, bandwidth=(1.0, 4.0), **options
    ),
}
RELATIVE = [1.0, pytest.param(1e-2, marks=pytest.mark.slow), 1e-4]


def batch(n=300, d=12, relative=1.0, dtype=jnp.float32):
    """Makes a batch with an absent class, one of one sample, and one of n_c < d."""
    rng = np.random.default_rng(0)
    y = rng.exponential(1.0, (n, d)) * rng.uniform(0.1, 2, d)
    y[:, 1] = 0  # a dead feature
    x = y + relative * rng.normal(size=(n, d))
    labels = rng.integers(4, K - 1, n)  # 6 is absent
    labels[:1], labels[1 : d // 2], labels[n // 2 : n // 2 + 9] = 0, 1, -1
    pair = (jnp.asarray(np.float32(z), dtype) for z in (x, y))
    return *pair, jnp.asarray(labels, jnp.int32)


def value_and_gradients(fn, x, y, labels, **options):
    differentiate = jax.value_and_grad(partial(fn, **options), argnums=(0, 1))
    return jax.device_get(jax.jit(differentiate)(x, y, labels))


def assert_close(found, expected, value, gradient):
    """Gradients may differ by a share of their norm."""
    np.testing.assert_allclose(found[0], expected[0], rtol=value)
    for one, other in zip(found[1], expected[1], strict=True):
        assert np.linalg.norm(one - other) <= gradient * np.linalg.norm(other)


@pytest.mark.parametrize("relative", RELATIVE)
@pytest.mark.parametrize("name", FEW)
def test_axis_of_classes(name, relative):
    """Values and gradients are those of the form with ``[n, n]`` in float64."""
    mask = jnp.arange(300) % 5 != 0
    x, y, labels = batch(relative=relative)
    got = value_and_gradients(FEW[name], x, y, labels, mask=mask, num_classes=K)
    with jax.enable_x64(True):
        wide = batch(relative=relative, dtype=jnp.float64)
        expected = value_and_gradients(FEW[name], *wide, mask=mask)
        exact = value_and_gradients(FEW[name], *wide, mask=mask, num_classes=K)
    # The form with [n, n] subtracts nuclear norms, so it loses (1 / relative)² itself.
    lost = {1.0: 1e-10, 1e-2: 1e-8, 1e-4: 1e-4}[relative]
    assert_close(exact, expected, lost, 1e-8)
    assert_close(got, exact, 5e-3 if name == "ckl full" else 1e-3, 1e-2)


def test_wide_features_close_to_the_teacher():
    """The error of the gradient is 4e-4, and 1e-3 without one of the corrections."""
    few = partial(class_gaussian_wasserstein, num_classes=K)
    got = value_and_gradients(few, *batch(1200, 128, 1e-4))
    with jax.enable_x64(True):
        expected = value_and_gradients(few, *batch(1200, 128, 1e-4, jnp.float64))
    assert_close(got, expected, 1e-3, 7e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_features_that_are_dead_in_the_student(dtype):
    """Directions without variance on one side have the minimal gradient."""
    with jax.enable_x64(True):
        x, y, labels = batch(dtype=dtype)
        x = x.at[:, 2:5].set(0)
        fn = class_gaussian_wasserstein
        got = value_and_gradients(fn, x, y, labels, num_classes=K)
        wide = (z.astype(jnp.float64) for z in (x, y))
        expected = value_and_gradients(fn, *wide, labels)
    assert_close(got, expected, 1e-5, 1e-4)


def definition(name, x, y, labels):
    """Computes a discrepancy by NumPy, in float64."""
    if name.startswith("cmmd"):
        kernel = "linear" if "linear" in name else "rbf"
        return reference.class_mmd(x, y, labels, kernel=kernel)
    several = (1.0, 4.0) if name == "mmd of two" else (None,)
    return np.mean([reference.mmd(x, y, bandwidth=sigma) for sigma in several])


@pytest.mark.parametrize("relative", RELATIVE)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name, relative, monkeypatch):
    """Blocks of rows change nothing, and float32 keeps the digits of a difference."""
    mask = jnp.arange(90) % 5 != 0
    x, y, labels = batch(90, relative=relative)
    with jax.enable_x64(True):
        wide = batch(90, relative=relative, dtype=jnp.float64)
        expected = value_and_gradients(KERNELS[name], *wide, mask=mask)
    known = definition(name, *(np.asarray(z)[np.asarray(mask)] for z in wide))
    # The definition subtracts means of kernels, which loses digits.
    assert expected[0] == pytest.approx(known, rel={1.0: 1e-10}.get(relative, 1e-4))
    monkeypatch.setattr(grams, "ROWS", 64)
    got = value_and_gradients(KERNELS[name], x, y, labels, mask=mask)
    assert_close(got, expected, 1e-3, 2e-2)


def test_unequal_counts_go_in_blocks(monkeypatch):
    x, y, _ = batch(90)
    whole = mmd(x[:70], y)
    monkeypatch.setattr(grams, "ROWS", 16)
    assert mmd(x[:70], y) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("name", ["cw2", "cw2 diag", "ckl", "ckl full"])
def test_gradients_of_many_samples(name, x64):
    x, y, labels = batch(24, 3, 0.5, jnp.float64)
    y = y.at[:, 1].set(x[:, 0])  # no dead feature, where a root has no derivative
    ridge = {"ridge": 0.05} if "ckl" in name else {}
    fn = lambda x, y: FEW[name](x, y, labels, num_classes=K, **ridge)
    assert_distance_gradients(fn, x, y)


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_methods_agree(method):
    x, y, labels = batch()
    few = partial(class_gaussian_wasserstein, num_classes=K)
    expected = value_and_gradients(few, x, y, labels)
    got = value_and_gradients(few, x, y, labels, method=method)
    assert_close(got, expected, 1e-4, 5e-3)


@pytest.mark.parametrize("name", FEW)
def test_no_samples_and_equal_samples(name):
    _, y, labels = batch()
    for others in (labels, jnp.full_like(labels, -1)):
        value, gradients = value_and_gradients(FEW[name], y, y, others, num_classes=K)
        assert value == pytest.approx(0, abs=1e-6)
        assert max(np.abs(g).max() for g in gradients) < 1e-5


@pytest.mark.parametrize("name", [*FEW, *KERNELS])
def test_no_array_of_all_pairs(name, monkeypatch):
    """Neither value nor gradient has an array [n, n], or one of [n, d] per class."""
    monkeypatch.setattr(grams, "ROWS", 64)
    x, y, labels = batch()
    fn = {**FEW, **KERNELS}[name]
    given = {"num_classes": K} if name in FEW else {}
    assert largest_array(partial(fn, labels=labels, **given), x, y) <= 304 * 16


def test_vmap_and_jvp():
    x, y, labels = batch(60, 4)
    fn = partial(class_gaussian_wasserstein, num_classes=K)
    both = jax.vmap(fn)(
        jnp.stack([x, 2 * x]), jnp.stack([y, y]), jnp.stack([labels] * 2)
    )
    np.testing.assert_allclose(
        both, [fn(x, y, labels), fn(2 * x, y, labels)], rtol=1e-5
    )
    tangent = jax.jvp(lambda x: fn(x, y, labels), (x,), (jnp.ones_like(x),))[1]
    gradient = jax.grad(lambda x: fn(x, y, labels))(x)
    assert tangent == pytest.approx(float(jnp.sum(gradient)), rel=1e-4)


@pytest.mark.parametrize("name", ["cw2_gaussian", "ckl_gaussian"])
def test_the_loss_passes_the_number_of_classes(name):
    x, y, labels = batch()

    def loss(x, y):
        logits = jnp.zeros((len(x), K))
        return distill_loss(x, y, labels, logits, distance=name, weight=1.0)[0]

    assert largest_array(loss, x, y) <= 304 * 16
