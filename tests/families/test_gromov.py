"""Tests Gromov-Wasserstein distances."""

from functools import cache, partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import make_batch

import kddm_jax
from kddm_jax.families.gromov import METRICS
from kddm_jax.testing import assert_distance_gradients

pytestmark = pytest.mark.usefixtures("x64")


def clouds(n=6, d_x=3, d_y=3, m=None, seed=0):
    x, _ = make_batch(n, d_x, seed=seed)[:2]
    _, y = make_batch(n, d_y, m=m, seed=seed)[:2]
    return x + 0.5, y  # cosines of rows near zero have too large derivatives


@cache
def compiled(**words):
    return jax.jit(partial(kddm_jax.gromov_wasserstein.diagnose, **words))


def gromov(x, y, epsilon=None, **words):
    numbers = {} if epsilon is None else {"epsilon": epsilon}
    value, stats = compiled(**words)(*map(jnp.asarray, (x, y)), **numbers)
    assert stats["converged"] == 1
    return float(value)


METRIC = pytest.mark.parametrize("metric", METRICS)


@pytest.mark.slow
@METRIC
@pytest.mark.parametrize("counts", [(6, 6), (6, 4), (4, 8)])
def test_local_minimum(metric, counts):
    n, m = counts
    for seed in range(3):
        x, y = clouds(n, 3, 4, m=m, seed=seed)
        value = gromov(x, y, metric=metric)
        # With repeated samples, the plan may split differently from the linear
        # programme's.
        expected = reference.gromov_wasserstein(x, y, metric=metric)
        if n == m:
            np.testing.assert_allclose(value, expected, rtol=1e-9)
        else:
            assert value <= expected * (1 + 1e-9)


@METRIC
def test_value_is_the_energy_of_a_plan(metric):
    x, y = clouds(5, 3, 2)
    a, b = reference.METRICS[metric](x), reference.METRICS[metric](y)
    energies = [
        reference.gromov_energy(a, b, np.eye(5)[list(order)] / 5)
        for order in permutations(range(5))
    ]
    value = gromov(x, y, metric=metric)
    assert np.min(np.abs(np.array(energies) - value)) < 1e-12
    assert value < np.median(energies)  # better than most plans


def test_isometric_clouds_are_at_distance_zero():
    square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    turn = np.array([[0.6, 0.8], [-0.8, 0.6]])
    moved = np.pad(square @ turn + 3.0, [(0, 0), (0, 2)])
    # All corners are equally central, so their ranks are useless.
    assert abs(gromov(square, moved)) < 1e-24
    x, _ = clouds(6)
    order = np.random.default_rng(0).permutation(6)
    assert abs(gromov(x, x[order] @ np.linalg.qr(clouds()[1][:3])[0])) < 1e-24


def test_repeated_samples_change_nothing():
    x, y = clouds(6, m=3)
    np.testing.assert_allclose(gromov(x, np.repeat(y, 2, axis=0)), gromov(x, y))


@pytest.mark.slow
def test_epsilon_below_the_round_off_counts_as_that():
    x, y = (jnp.float32(1e4 * z) for z in clouds(9, 5, 5))
    fn = partial(kddm_jax.gromov_wasserstein, epsilon=1e-6)
    value, gradient = jax.jit(jax.value_and_grad(fn))(x, y)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(6, 6), (7, 4)])
def test_entropic(counts):
    n, m = counts
    x, y = clouds(n, 3, 4, m=m)
    for metric, epsilon in [("euclidean", 4.0), ("cosine", 0.5)]:
        value = gromov(x, y, epsilon, metric=metric)
        expected = reference.gromov_wasserstein(x, y, metric=metric, epsilon=epsilon)
        np.testing.assert_allclose(value, expected, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "options"),
    [
        ((6, 6), {}),
        ((6, 4), {}),
        ((6, 6), {"metric": "sqeuclidean"}),
        ((6, 6), {"metric": "cosine"}),
        ((6, 4), {"epsilon": 3.0}),
    ],
    ids=str,
)
def test_gradient_is_that_of_the_value(counts, options):
    x, y = clouds(counts[0], 3, 2, m=counts[1])
    assert_distance_gradients(
        *(kddm_jax.gromov_wasserstein, x, y),
        argnums=(0, 1),
        rtol=1e-4,
        atol=1e-6,
        **options,
    )


def test_not_a_number_shows():
    x, y = clouds()
    x[2, 1] = np.nan
    assert np.isnan(compiled()(x, y)[0])


def test_messages():
    x, y = clouds(37, m=36)
    with pytest.raises(ValueError, match="n=37 and m=36 .* up to 1024; give an eps"):
        jax.eval_shape(kddm_jax.gromov_wasserstein, x, y)
    with pytest.raises(ValueError, match="epsilon must be positive, got 0"):
        kddm_jax.gromov_wasserstein(*clouds(), epsilon=0)
