"""Tests sliced Wasserstein distances."""

import jax
import numpy as np
import pytest
import reference
from helpers import make_batch

import kddm_jax
from kddm_jax.families.sliced import _quantiles, _sliced

pytestmark = pytest.mark.usefixtures("x64")


def clouds(n=6, d_x=3, d_y=3, m=None, seed=0):
    x, _ = make_batch(n, d_x, seed=seed)[:2]
    _, y = make_batch(n, d_y, m=m, seed=seed)[:2]
    return x + 0.5, y  # no row is near zero


@pytest.mark.parametrize("counts", [(6, 6), (6, 4), (5, 7), (3, 12)])
def test_quantiles_cover_both_samples_evenly(counts):
    n, m = counts
    i, j, length = _quantiles(n, m)
    assert len(length) <= n + m - 1
    np.testing.assert_allclose(np.bincount(i, length), 1 / n)
    np.testing.assert_allclose(np.bincount(j, length), 1 / m)


@pytest.mark.parametrize("counts", [(6, 6), (6, 4), (5, 7)])
def test_sliced_is_the_mean_over_directions(counts):
    n, m = counts
    x, y = clouds(n, m=m)
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    expected = reference.sliced_wasserstein(x, y, directions)
    value = jax.jit(_sliced)(x, y, directions)
    np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_directions_are_of_norm_one_and_of_the_key():
    x, y = clouds(4, 2, 2)
    sliced = jax.jit(kddm_jax.sliced_wasserstein)
    shift = np.array([3.0, 0.0])
    # Along a direction at angle a to the shift, the cost is 9 cos^2 a, and 9/2 on
    # average.
    values = [sliced(x, x + shift, jax.random.key(seed)) for seed in range(50)]
    assert len(set(map(float, values))) == 50
    np.testing.assert_allclose(np.mean(values), 4.5, rtol=0.02)
    assert sliced(x, y, jax.random.key(1)) == sliced(x, y, jax.random.key(1))


def test_one_dimension_has_one_direction():
    x, y = clouds(7, 1, 1, m=5)
    value = kddm_jax.sliced_wasserstein(x, y, jax.random.key(0), num_projections=1)
    np.testing.assert_allclose(value, reference.wasserstein(x, y), rtol=1e-9)


def test_sliced_gradient_pulls_the_sorted_to_the_sorted():
    x, y = clouds(5, 2, 2)
    x[1] = x[0]  # a tie
    direction = np.array([[0.6], [0.8]])
    gradient = jax.jit(jax.grad(_sliced))(x, y, direction)
    u, v = (x @ direction)[:, 0], (y @ direction)[:, 0]
    pull = np.zeros(5)
    order = np.argsort(u, kind="stable")
    pull[order] = 2 * (u[order] - np.sort(v)) / 5
    np.testing.assert_allclose(gradient, pull[:, None] * direction.T, rtol=1e-9)


def test_sliced_refuses_no_directions():
    with pytest.raises(ValueError, match="num_projections must be at least 1, got 0"):
        kddm_jax.sliced_wasserstein(*clouds(), jax.random.key(0), num_projections=0)
