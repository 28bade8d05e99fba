"""Compares transport solvers with SciPy and Sinkhorn in float64, also with masks.

ott does not run under strict promotion, so these tests do not use it.
"""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from reference import logsumexp
from scipy.optimize import linear_sum_assignment

from kddm_jax.numerics.classes import classes
from kddm_jax.numerics.linalg import squared_distances
from kddm_jax.numerics.transport import (
    SOLVERS,
    Costs,
    mean_cost,
    transport_cost,
    transport_plan,
)

EPSILON = 0.3
DEFAULTS = {"epsilon": None, "threshold": 1e-3, "max_iterations": 2000}


def solve(costs, epsilon, *, threshold=1e-9, max_iterations=5000, **options):
    return transport_cost(
        costs,
        epsilon=epsilon,
        threshold=threshold,
        max_iterations=max_iterations,
        **options,
    )


@partial(jax.jit, static_argnames=("solver", "threshold", "max_iterations"))
def solve_with_plan(problem, epsilon, **options):
    """Returns ((value, stats), plan), with one program for all problems of a shape."""
    fn = lambda cost: solve(problem._replace(xy=cost), epsilon, **options)
    return jax.value_and_grad(fn, has_aux=True)(problem.xy)


# ------------------------------------------------------------------- witnesses


def log_sinkhorn(cost, a, b, epsilon):
    """Computes OT_eps = <P, C> + eps KL(P | a x b) and P, up to 1e-12 in marginals."""
    log_a, log_b = np.log(a), np.log(b)
    f, g = np.zeros_like(a), np.zeros_like(b)
    for _ in range(5000):
        f = -epsilon * logsumexp(log_b + (g - cost) / epsilon, axis=1)
        g = -epsilon * logsumexp(log_a[:, None] + (f[:, None] - cost) / epsilon, axis=0)
        log_ratio = (f[:, None] + g - cost) / epsilon
        plan = a[:, None] * b * np.exp(log_ratio)
        if np.abs(plan.sum(1) - a).sum() < 1e-12:
            break
    else:
        raise AssertionError("the witness did not converge; raise epsilon")
    return np.sum(plan * cost) + epsilon * np.sum(plan * log_ratio), plan


def assignment(cost, a, b, epsilon):
    rows, columns = linear_sum_assignment(cost)
    plan = np.zeros_like(cost)
    plan[rows, columns] = a
    return np.sum(plan * cost), plan


def expected(problem, epsilon, solver):
    """Returns value and plan of the x-y cost, computed class by class."""
    witness = assignment if solver == "exact" else log_sinkhorn
    value, plan = 0.0, np.zeros(problem.xy.shape)
    for rows, columns, weight in blocks(problem):
        pair = np.ix_(rows, columns)
        a, b = problem.a[rows] / weight, problem.b[columns] / weight
        one, own = witness(problem.xy[pair], a, b, epsilon)
        if solver == "sinkhorn":
            for own_cost, w, index in ((problem.xx, a, rows), (problem.yy, b, columns)):
                one -= (
                    log_sinkhorn(own_cost[np.ix_(index, index)], w, w, epsilon)[0] / 2
                )
        value += weight * one
        plan[pair] = weight * own
    return value, plan


def blocks(problem):
    """Yields rows, columns and weight of each class, or everything without a mask."""
    if problem.same is None:
        n, m = problem.xy.shape
        yield np.arange(n), np.arange(m), 1.0
        return
    for row in np.unique(problem.same, axis=0):
        rows = np.flatnonzero(row)
        if len(rows):
            yield rows, rows, problem.a[rows].sum()


def costs_between(n, m, seed, d=3):
    rng = np.random.default_rng(seed)
    x, y = 0.5 * rng.normal(size=(n, d)), 0.5 * rng.normal(size=(m, d)) + 0.3
    between = lambda p, q: ((p[:, None] - q[None]) ** 2).sum(-1)
    return between(x, y), between(x, x), between(y, y)


def make_problem(name):
    rng = np.random.default_rng(7)
    if name == "square":
        return Costs(*costs_between(8, 8, 0), np.full(8, 1 / 8), np.full(8, 1 / 8))
    if name == "weighted":
        a, b = rng.dirichlet(np.full(5, 3.0)), rng.dirichlet(np.full(7, 3.0))
        return Costs(*costs_between(5, 7, 1), a, b)
    labels = {
        "unbalanced": [3, 0, 3, 3, 0, 3, 3, 5],
        "padded": [1, -1, 0, 1, -1, 1, 0, -1],
        "one class": [2] * 8,
        "alone": [7, 6, 5, 4, 3, 2, 1, 0],
    }[name]
    groups = classes(jnp.array(labels), reduction="mean", dtype=jnp.float64)
    weights = np.asarray(groups.weights)
    return Costs(*costs_between(8, 8, 2), weights, weights, np.asarray(groups.same))


MASKED = ["unbalanced", "padded", "one class", "alone"]
PROBLEMS = ["square", "weighted", *MASKED]
CASES = [
    (solver, name)
    for solver in SOLVERS
    for name in PROBLEMS
    if solver != "exact" or name != "weighted"  # an assignment needs equal weights
]


# ------------------------------------------------------------ value and gradient


@pytest.mark.parametrize(("solver", "name"), CASES)
def test_value_and_plan(solver, name, x64):
    """With a mask, each class is a problem of its own with the same epsilon."""
    problem = make_problem(name)
    value, plan = expected(problem, EPSILON, solver)
    (actual, stats), gradient = solve_with_plan(problem, EPSILON, solver=solver)
    # The error of values is threshold * cost, that of plans the threshold, 1e-9.
    np.testing.assert_allclose(actual, value, atol=1e-8)
    np.testing.assert_allclose(gradient, plan, atol=1e-8)
    assert stats.converged == 1
    assert stats.marginal_error <= 1e-9


@pytest.mark.parametrize(
    ("solver", "name"),
    [("entropic", "padded"), ("exact", "unbalanced")],
)
def test_derivative_is_that_of_the_value(solver, name, x64):
    problem = make_problem(name)
    fn = lambda cost: solve(problem._replace(xy=cost), EPSILON, solver=solver)[0]
    check_grads(jax.jit(fn), (jnp.asarray(problem.xy),), 1, ("fwd", "rev"), rtol=1e-6)


@pytest.mark.slow
def test_derivative_of_the_divergence_by_all_three_costs(x64):
    problem = make_problem("unbalanced")
    rest = problem[3:]
    fn = lambda *costs: solve(Costs(*costs, *rest), EPSILON, solver="sinkhorn")[0]
    arrays = tuple(map(jnp.asarray, problem[:3]))
    check_grads(jax.jit(fn), arrays, 1, ("fwd", "rev"), rtol=1e-6)


@pytest.mark.parametrize("solver", ["entropic", "exact"])
def test_epsilon_and_stats_have_no_derivative(solver, x64):
    problem = make_problem("square")

    def fn(epsilon, cost):
        value, stats = solve(problem._replace(xy=cost), epsilon, solver=solver)
        return jnp.stack([value, *stats])

    by_epsilon, by_cost = jax.jit(jax.jacrev(fn, (0, 1)))(EPSILON, problem.xy)
    np.testing.assert_array_equal(by_epsilon, np.zeros(4))
    assert np.any(by_cost[0])
    np.testing.assert_array_equal(by_cost[1:], np.zeros((3, 8, 8)))


@pytest.mark.slow
def test_no_mass_between_classes_in_float32():
    """The finite cost of forbidden pairs keeps the plan and its digits at any scale."""
    with jax.enable_x64(True):
        problem = make_problem("unbalanced")
    for scale in (1e-4, 1.0, 1e4):
        scaled = problem._replace(**{k: scale * getattr(problem, k) for k in _COSTS})
        value, plan = expected(scaled, EPSILON * scale, "sinkhorn")
        single = jax.tree.map(jnp.float32, scaled)
        (actual, stats), gradient = solve_with_plan(
            single, EPSILON * scale, solver="sinkhorn", threshold=1e-5
        )
        np.testing.assert_allclose(actual, value, rtol=1e-4)
        np.testing.assert_allclose(gradient, plan, atol=1e-5)
        np.testing.assert_array_equal(gradient * (1 - single.same), 0)
        assert stats.converged == 1


_COSTS = ("xy", "xx", "yy")


# -------------------------------------------------------------------- assignment


def random_costs(n, count, seed):
    """Makes costs that are real, integer with many ties, constant, or of rank one."""
    rng = np.random.default_rng(seed)
    makers = [
        lambda: rng.exponential(size=(n, n)),
        lambda: rng.integers(0, 4, size=(n, n)).astype(float),
        lambda: np.outer(rng.integers(1, 5, n), rng.integers(1, 5, n)).astype(float),
        lambda: rng.normal(size=(n, n)) - 3,
        lambda: np.full((n, n), 2.0),
    ]
    return np.stack([makers[i % len(makers)]() for i in range(count)])


def assign(costs, weights, same):
    problem = Costs(costs, None, None, weights, weights, same)
    return transport_cost(problem, solver="exact", **DEFAULTS)[0]


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3, 17, 40])
def test_assignment_is_exact(n, x64):
    costs = random_costs(n, 20, seed=n)
    fn = jax.jit(jax.vmap(lambda c: assign(c, jnp.full(n, 1 / n), None)))
    expected = [c[linear_sum_assignment(c)].mean() for c in costs]
    np.testing.assert_allclose(fn(costs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_assignment_is_exact_at_every_size_in_one_program(x64):
    """Batches of n = 1 ... 40 samples, padded to 40."""
    sizes = np.tile(np.arange(1, 41), 3)
    rng = np.random.default_rng(0)
    valid = np.zeros((len(sizes), 40), bool)
    costs = np.empty((len(sizes), 40, 40))
    expected = []
    for i, n in enumerate(sizes):
        valid[i, rng.permutation(40)[:n]] = True
        costs[i] = random_costs(40, 3, seed=i)[i % 3]
        inside = costs[i][np.ix_(valid[i], valid[i])]
        expected.append(inside[linear_sum_assignment(inside)].mean())
    same = (valid[:, :, None] & valid[:, None, :]).astype(float)
    weights = valid / sizes[:, None]
    actual = jax.jit(jax.vmap(assign))(costs, weights, same)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_assignment_of_classes_in_float32():
    """Classes have any weights and sizes, in one program."""
    rng = np.random.default_rng(1)
    labels = rng.choice(6, size=(10, 24), p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05]) - 1
    costs = rng.exponential(size=(10, 24, 24))

    def one(cost, labels):
        groups = classes(labels, reduction="weighted", dtype=jnp.float32)
        return assign(cost, groups.weights, groups.same)

    actual = jax.jit(jax.vmap(one))(jnp.float32(costs), jnp.array(labels))
    for value, label, cost in zip(actual, labels, costs, strict=True):
        total = 0.0
        for c in np.unique(label[label >= 0]):
            block = cost[np.ix_(label == c, label == c)]
            total += block[linear_sum_assignment(block)].sum()
        np.testing.assert_allclose(value, total / (label >= 0).sum(), rtol=1e-5)


# ----------------------------------------------------------------------- epsilon


@pytest.mark.parametrize("name", ["weighted", "unbalanced", "padded"])
def test_mean_cost_is_that_of_same_class_pairs(name, x64):
    problem = make_problem(name)
    parts = [
        weight * np.average(problem.xy[np.ix_(r, c)], weights=outer(problem, r, c))
        for r, c, weight in blocks(problem)
    ]
    np.testing.assert_allclose(mean_cost(problem), sum(parts), rtol=1e-12)


def outer(problem, rows, columns):
    return np.outer(problem.a[rows], problem.b[columns])


@pytest.mark.parametrize("name", ["square", "unbalanced"])
def test_epsilon_none_is_two_percent_of_the_mean_cost(name, x64):
    problem = make_problem(name)
    chosen = 0.02 * float(mean_cost(problem))
    # With this epsilon, small thresholds take long. Both stop at the same iteration.
    options = {"solver": "entropic", "threshold": 1e-3}
    (by_none, _), plan = solve_with_plan(problem, None, **options)
    (by_number, _), same_plan = solve_with_plan(problem, chosen, **options)
    np.testing.assert_allclose(by_none, by_number, rtol=1e-9)
    np.testing.assert_allclose(plan, same_plan, atol=1e-9)
    (other, _), _ = solve_with_plan(problem, 1.01 * chosen, **options)
    assert abs(other - by_number) > 1e-6


@pytest.mark.slow
def test_epsilon_none_has_floors():
    """It is at least the given round-off, and positive for constant features."""
    zeros, weights = jnp.zeros((8, 8)), jnp.full(8, 1 / 8)
    problem = Costs(zeros, zeros, zeros, weights, weights)
    for solver in SOLVERS:
        (value, _), gradient = solve_with_plan(
            problem, None, solver=solver, threshold=1e-3
        )
        np.testing.assert_allclose(value, 0, atol=1e-12)
        np.testing.assert_allclose(gradient.sum(), 1, rtol=1e-6)
    cost = jnp.float32(costs_between(8, 8, 0)[0])
    problem = problem._replace(xy=cost)
    options = {"solver": "entropic", "threshold": 1e-4}
    (by_floor, _), _ = solve_with_plan(problem, None, floor=0.7, **options)
    (by_number, _), _ = solve_with_plan(problem, 0.7, floor=0.0, **options)
    np.testing.assert_allclose(by_floor, by_number, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["sinkhorn", "entropic"])
@pytest.mark.parametrize("same", [False, True])
def test_epsilon_below_the_round_off_counts_as_that(solver, same):
    """With costs of 1e9, float32 cannot represent a millionth."""
    rng, weights = np.random.default_rng(5), jnp.full(6, 1 / 6)
    y = jnp.float32(1e-4 * rng.random((6, 9)))
    x = jnp.float32(1e4 * np.outer(rng.normal(size=6), rng.normal(size=9)))
    costs = [squared_distances(*pair) for pair in ((x, y), (x, x), (y, y))]
    mask = jnp.float32(np.kron(np.eye(2), np.ones((3, 3)))) if same else None
    options = {"solver": solver, "threshold": 1e-3}
    problem = Costs(*costs, weights, weights, mask)
    (value, _), gradient = solve_with_plan(problem, 1e-6, **options)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


# ------------------------------------------------------------- stats, non-finite


@pytest.mark.parametrize("solver", ["sinkhorn", "entropic"])
def test_stats_tell_of_a_solver_that_stopped_early(solver):
    xy, xx, yy = map(jnp.float32, costs_between(8, 8, 3))
    weights = jnp.full(8, 1 / 8)
    problem = Costs(xy, xx, yy, weights, weights)
    options = {"solver": solver, "threshold": 1e-3, "max_iterations": 10}
    (_, stats), _ = solve_with_plan(problem, 1e-2, **options)
    assert stats.converged == 0
    assert stats.iterations == 10
    assert stats.marginal_error > 1e-3
    # With an easier problem, the same program converges.
    (_, stats), _ = solve_with_plan(problem, 10.0, **options)
    assert stats.converged == 1
    assert stats.marginal_error <= 1e-3


def within(seconds, fn):
    """Returns the result of ``fn()``, or fails if it takes longer than ``seconds``."""
    results = []
    thread = threading.Thread(target=lambda: results.append(fn()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"no result within {seconds} s"
    return results[0]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_costs_end_quickly_and_show(solver, bad):
    xy, xx, yy = map(np.float32, costs_between(8, 8, 3))
    weights = jnp.full(8, 1 / 8)
    for rows in (slice(2, 3), slice(None)):
        broken = xy.copy()
        broken[rows] = bad
        problem = Costs(broken, xx, yy, weights, weights)
        run = lambda p=problem: jax.block_until_ready(
            solve_with_plan(p, None, solver=solver, threshold=1e-3)
        )
        (value, _), _ = within(60, run)
        assert not np.isfinite(value)


# ---------------------------------------------------------------- vmap, messages


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["entropic", "exact"])
def test_vmap(solver):
    weights = jnp.full(8, 1 / 8)
    problems = [
        Costs(*map(jnp.float32, costs_between(8, 8, seed)), weights, weights)
        for seed in range(3)
    ]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    fn = partial(solve_with_plan, epsilon=0.5, solver=solver, threshold=1e-5)
    (values, stats), plans = jax.vmap(fn)(stack)
    for i, problem in enumerate(problems):
        (value, one), plan = fn(problem)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        np.testing.assert_allclose(plans[i], plan, atol=1e-5)
        assert stats.iterations[i] == one.iterations


MESSAGES = {
    "solver": ({"solver": "emd"}, (3, 3), "solver must be one of 'sinkhorn'.*'emd'"),
    "shape": ({"solver": "exact"}, (3, 4), r"n=3 and m=4; use solver=\"sinkhorn\""),
    "zero": ({"epsilon": 0}, (3, 3), "epsilon must be positive, got 0; None chooses"),
    "negative": ({"epsilon": -0.5}, (3, 3), "epsilon must be positive, got -0.5"),
    "iterations": ({"max_iterations": 0}, (3, 3), "max_iterations must be at least 1"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    options, (n, m), message = MESSAGES[name]
    ones = lambda *shape: jnp.ones(shape)
    problem = Costs(ones(n, m), ones(n, n), ones(m, m), ones(n) / n, ones(m) / m)
    with pytest.raises(ValueError, match=message):
        transport_cost(problem, **{"solver": "sinkhorn", **DEFAULTS, **options})


# ---------------------------------------------------------------------- plans


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["exact", "entropic"])
def test_plan_is_the_witness_plan(solver):
    rng = np.random.default_rng(8)
    cost, a = rng.uniform(1, 2, (7, 7)), np.full(7, 1 / 7)
    price = 0.4 * (1 - np.eye(7))
    witness = assignment if solver == "exact" else log_sinkhorn
    for pairing, extra in ((None, 0.0), (0.4, price)):
        with jax.enable_x64(True):
            costs = Costs(jnp.asarray(cost), None, None, a, a, pairing=pairing)
            plan = transport_plan(costs, solver=solver, epsilon=0.1, threshold=1e-10)
        expected = witness(cost + extra, a, a, 0.1)[1]
        np.testing.assert_allclose(plan, expected, atol=1e-9)


def test_a_price_on_pairs_needs_pairs():
    a, b = jnp.full(3, 1 / 3), jnp.full(4, 1 / 4)
    costs = Costs(jnp.ones((3, 4)), None, None, a, b, pairing=1.0)
    with pytest.raises(ValueError, match="pairing .* n=3 and m=4"):
        transport_plan(costs, solver="entropic")
