"""Compares the stabilised iteration with ott's Sinkhorn and beyond its range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import sinkhorn_plan

from kddm_jax.numerics import sinkhorn as module
from kddm_jax.numerics.sinkhorn import sinkhorn


def points_cost(n, m, seed=0, spread=1.0):
    """Makes squared distances of points, of which the last ones are ``spread`` away."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 3)), rng.normal(size=(m, 3))
    x[-1], y[-1] = spread * x[-1], spread * y[-1]
    return np.sum((x[:, None] - y[None]) ** 2, axis=2), x


def by_ott(cost, a, b, epsilon, symmetric):
    geometry = module._geometry()  # also filters the warning of jaxopt
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.acceleration import Momentum
    from ott.solvers.linear.sinkhorn import Sinkhorn

    options = {"momentum": Momentum(value=0.5), "parallel_dual_updates": True}
    solver = Sinkhorn(
        threshold=1e-11, max_iterations=20_000, **(options if symmetric else {})
    )
    problem = LinearProblem(geometry(cost_matrix=cost, epsilon=epsilon), a=a, b=b)
    out = solver(problem)
    return out.reg_ot_cost, out.matrix


# Averaged updates converge slowly if the cost is not symmetric and epsilon is small.
@pytest.mark.parametrize(
    ("symmetric", "noise", "share"), [(False, 0, 0.02), (True, 0, 0.02), (True, 1, 0.2)]
)
def test_agrees_with_ott(symmetric, noise, share, x64):
    cost, x = points_cost(7, 9)
    a, b = (np.random.default_rng(1).uniform(0.5, 2, size) for size in (7, 9))
    a[2] = b[4] = 0  # no mass
    a, b = a / a.sum(), b / b.sum()
    if symmetric:
        cost, b = np.sum((x[:, None] - x[None]) ** 2, axis=2), a
    cost += noise * np.random.default_rng(2).uniform(size=cost.shape)
    epsilon = jnp.asarray(share * cost.mean())
    arrays = jnp.asarray(cost), jnp.asarray(a), jnp.asarray(b), epsilon
    value, stats, plan = sinkhorn(
        *arrays, threshold=1e-11, max_iterations=20_000, symmetric=symmetric
    )
    expected, expected_plan = by_ott(*arrays, symmetric)
    assert stats.converged == 1
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(plan, expected_plan, atol=1e-9)


@pytest.mark.parametrize("limit", [module.LARGEST_LOG, 0.5])
def test_absorption_does_not_change_the_result(limit, monkeypatch):
    """In float32 and under vmap, with costs of which exp(-C / epsilon) vanishes."""
    monkeypatch.setattr(module, "LARGEST_LOG", limit)
    costs = np.stack([points_cost(8, 8, spread=spread)[0] for spread in (1.0, 5.0)])
    a, epsilon = np.full(8, 1 / 8), 2.0
    assert np.float32(np.exp(-np.float32(costs[1].max() / epsilon))) < 1e-38
    solve = lambda cost: sinkhorn(
        *(cost, jnp.float32(a), jnp.float32(a), jnp.float32(epsilon)),
        threshold=1e-3,
        max_iterations=2000,
    )
    _, stats, plans = jax.vmap(solve)(jnp.float32(costs))
    for plan, cost in zip(plans, costs, strict=True):
        np.testing.assert_allclose(plan, sinkhorn_plan(cost, epsilon), atol=1e-3)
    np.testing.assert_array_equal(stats.converged, 1)
