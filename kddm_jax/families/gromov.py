"""Computes the Gromov-Wasserstein distance, from distances within x and within y.

With P the plan, A and B the distances within x and within y, and a square loss,

    E(P) = sum_ijkl (A_ik - B_jl)^2 P_ij P_kl = sum A^2 aa + sum B^2 bb - 2 <A P B, P>.

Euclidean distances, their squares and cosine distances are conditionally negative
definite, so that E is concave over plans.  The solver linearizes E, moves to the best
plan of the linear problem, and repeats this while E decreases.  It ends at a local
minimum, which is a vertex and therefore an assignment.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import check_choice, check_number, check_pair
from kddm_jax.numerics.linalg import (
    constant,
    matmul,
    safe_sqrt,
    squared_distances,
    unit,
)
from kddm_jax.numerics.solver import Stats, solver_distance
from kddm_jax.numerics.transport import best_assignment, solve_entropic
from kddm_jax.numerics.varying import call_varying


def _same_distances(cost_x, cost_y, target):
    """Computes A - B, with the samples of y in the order of their partners."""
    return cost_x - cost_y[target][:, target]


def _improve(cost_x, cost_y, mask, target):
    """Solves linearized problems while E decreases.

    Rows without a sample are matched with each other.
    """
    same = None if mask is None else masks.pairs(mask).astype(cost_x.dtype)

    def energy(target):
        differences = _same_distances(cost_x, cost_y, target)
        return masks.mean_of_pairs(differences**2, mask)

    def update(state):
        target, value, count, _ = state
        linear = -matmul(cost_x, cost_y[target])
        new = best_assignment(linear, same).astype(target.dtype)
        new_value = energy(new)
        # A change below round-off is not progress; two plans might alternate forever.
        better = new_value < value * (1 - 10 * jnp.finfo(value.dtype).eps)
        target = jnp.where(better, new, target)
        return target, jnp.where(better, new_value, value), count + 1, better

    def unfinished(state):
        return state[3] & (state[2] < MOST_LINEARISATIONS)

    return jax.lax.while_loop(unfinished, update, (target, energy(target), 0, True))


def _matched_ranks(cost_x, cost_y, mask):
    """Matches samples by mean distance, the first step from the uniform plan."""
    means = [jnp.mean(cost, axis=1) for cost in (cost_x, cost_y)]
    if mask is not None:  # costs of all other pairs are zero
        means = [jnp.where(mask, mean, jnp.inf) for mean in means]
    x, y = (jnp.argsort(mean) for mean in means)
    return jnp.zeros_like(x).at[x].set(y)


MOST_LINEARISATIONS = 100


def _solve_gromov(cost_x, cost_y, mask):
    # There are two starts: the step from the uniform plan, and samples paired in order.
    # The second makes the value zero for identical samples, with any symmetries.
    paired = jnp.arange(cost_x.shape[0], dtype=int)
    starts = jnp.stack(
        [_matched_ranks(cost_x, cost_y, mask).astype(paired.dtype), paired]
    )
    improve = lambda start: _improve(cost_x, cost_y, mask, start)
    targets, values, counts, moving = jax.lax.map(improve, starts)
    zero = jnp.zeros((), cost_x.dtype)
    met = 1 - jnp.max(moving).astype(zero.dtype)
    stats = Stats(met, jnp.max(counts).astype(zero.dtype), zero)
    return jnp.min(values), stats, targets[jnp.argmin(values)]


@jax.custom_jvp
def _gromov(cost_x, cost_y, mask):
    return call_varying(_solve_gromov, cost_x, cost_y, mask)[:2]


@_gromov.defjvp
def _gromov_jvp(primals, tangents):
    (cost_x, cost_y, mask), (dx, dy, _) = primals, tangents
    value, stats, target = call_varying(_solve_gromov, cost_x, cost_y, mask)
    moved = _same_distances(cost_x, cost_y, target) * _same_distances(dx, dy, target)
    tangent = 2 * masks.mean_of_pairs(moved, mask)
    return (value, stats), (tangent, jax.tree.map(jnp.zeros_like, stats))


# E + eps KL(P | a b) is stationary if P solves the entropic problem of the gradient
# M = -4 A P B.  The value at the last P is computed from the linearization, OT_eps(M) -
# <M, P> / 2, so that an error of P enters squared.
def _solve_gromov_entropic(cost_x, cost_y, epsilon, mask):
    a, b = (jnp.full(len(c), 1 / len(c), c.dtype) for c in (cost_x, cost_y))
    if mask is not None:
        a = b = mask.astype(cost_x.dtype) / masks.size(mask, cost_x)
    same = None if mask is None else masks.pairs(mask).astype(cost_x.dtype)
    tolerance = float(jnp.finfo(cost_x.dtype).eps ** 0.5)
    gradient = lambda plan: -4 * matmul(matmul(cost_x, plan), cost_y)

    def solve(plan):
        return solve_entropic(
            gradient(plan), a, b, same, epsilon, tolerance, 2000, False
        )

    def update(state):
        plan, _, _, _, count = state
        linear, stats, new = solve(plan)
        value = linear - jnp.sum(gradient(plan) * plan) / 2
        return new, value, stats, jnp.sum(jnp.abs(new - plan)), count + 1

    def unfinished(state):
        return (state[3] > tolerance) & (state[4] < MOST_LINEARISATIONS)

    zero, infinite = (jnp.asarray(z, cost_x.dtype) for z in (0, jnp.inf))
    start = (a[:, None] * b[None, :], zero, Stats(zero, zero, zero), infinite, 0)
    plan, value, stats, change, count = jax.lax.while_loop(unfinished, update, start)
    met = stats.converged * (change <= tolerance).astype(cost_x.dtype)
    stats = Stats(met, jnp.asarray(count, cost_x.dtype), stats.marginal_error)
    squares = [masks.mean_of_pairs(cost**2, mask) for cost in (cost_x, cost_y)]
    return value + squares[0] + squares[1], stats, plan


@jax.custom_jvp
def _gromov_entropic(cost_x, cost_y, epsilon, mask):
    arrays = cost_x, cost_y, epsilon, mask
    return call_varying(_solve_gromov_entropic, *arrays)[:2]


@_gromov_entropic.defjvp
def _gromov_entropic_jvp(primals, tangents):
    (cost_x, cost_y, _, mask), (dx, dy, _, _) = primals, tangents
    value, stats, plan = call_varying(_solve_gromov_entropic, *primals)
    shares = [masks.size(mask, cost) ** 2 for cost in (cost_x, cost_y)]
    pull_x = cost_x / shares[0] - matmul(matmul(plan, cost_y), plan.T)
    pull_y = cost_y / shares[1] - matmul(matmul(plan.T, cost_x), plan)
    tangent = 2 * (jnp.sum(pull_x * dx) + jnp.sum(pull_y * dy))
    return (value, stats), (tangent, jax.tree.map(jnp.zeros_like, stats))


def _repeated(cost_x, cost_y):
    """Repeats the samples of both sides until their numbers agree.

    This does not change their distributions.
    """
    n, m = len(cost_x), len(cost_y)
    common = math.lcm(n, m)
    if common > max(n, m, 1024):
        raise ValueError(
            f"n={n} and m={m} samples have no common multiple up to 1024; give an "
            "epsilon, or take equal numbers of samples"
        )
    repeat = lambda cost, times: cost.repeat(times, axis=0).repeat(times, axis=1)
    return repeat(cost_x, common // n), repeat(cost_y, common // m)


def gromov_cost(
    cost_x: jax.Array,
    cost_y: jax.Array,
    *,
    epsilon: float | jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    r"""Finds a local minimum of the Gromov-Wasserstein problem with a square loss.

    .. math:: \min_P \sum_{ijkl} (A_{ik} - B_{jl})^2 P_{ij} P_{kl}
              + \epsilon\, KL(P \,|\, a \otimes b)

    Args:
      cost_x: distances within x, A, symmetric, shape ``[n, n]``.
      cost_y: distances within y, B, symmetric, shape ``[m, m]``.
      epsilon: weight of the entropy, in units of the squared distances, a constant; it
        is never less than round-off.  None solves assignment problems; for ``n != m``
        both samples are then repeated up to the least common multiple (at most 1024).
      mask: from `masks.check_mask`, for ``n = m``, or None.

    Returns:
      ``(value, stats)``; the derivative of the value is taken at the plan found.

    Raises:
      ValueError: epsilon is not positive, or there is no small common multiple.

    References:
      Peyré, Cuturi and Solomon, Gromov-Wasserstein averaging of kernel and distance
      matrices, 2016, section 2.  Maron and Lipman, (Probably) concave graph matching,
      2018 (arXiv 1807.09722), for the concavity.
    """
    if mask is not None:
        pairs = masks.pairs(mask)
        cost_x, cost_y = (jnp.where(pairs, cost, 0) for cost in (cost_x, cost_y))
    if epsilon is None:
        if len(cost_x) != len(cost_y):
            cost_x, cost_y = _repeated(cost_x, cost_y)
        return _gromov(cost_x, cost_y, mask)
    check_number("epsilon", epsilon, positive=True, hint="; None solves without")
    # The linear costs -4 A P B are of this size; see _rounding.
    largest = 4 * jnp.max(jnp.abs(cost_x)) * jnp.max(jnp.abs(cost_y))
    least = jnp.finfo(cost_x.dtype).eps * largest
    epsilon = constant(jnp.maximum(jnp.asarray(epsilon, cost_x.dtype), least))
    value, stats = _gromov_entropic(cost_x, cost_y, epsilon, mask)
    return masks.zero_if_empty(value, mask), stats


def _distances(x):
    """Computes the Euclidean distances within x, with an exact zero diagonal."""
    off = 1 - jnp.eye(x.shape[0], dtype=x.dtype)
    return off * safe_sqrt(squared_distances(x, x))


def _cosine_distances(x):
    """Computes 1 - cosine within x, with an exact zero diagonal."""
    x = unit(x, axis=1)
    return (1 - jnp.eye(x.shape[0], dtype=x.dtype)) * (1 - matmul(x, x.T))


METRICS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "euclidean": _distances,
        "sqeuclidean": lambda x: squared_distances(x, x),
        "cosine": _cosine_distances,
    }
)


@solver_distance
def gromov_wasserstein(
    x: jax.Array,
    y: jax.Array,
    *,
    metric: str = "euclidean",
    epsilon: float | jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    r"""Computes the squared Gromov-Wasserstein distance between two samples.

    .. math:: \min_{P \in \Gamma(1/n, 1/m)} \sum_{ijkl}
              \big(d(x_i, x_k) - d(y_j, y_l)\big)^2 P_{ij} P_{kl}

    Only distances within x and within y are compared, so the widths may differ, and
    moving or rotating either side does not change the value.  The problem is not
    convex.  The value is a local minimum, which is an upper bound of the global one; it
    is the smaller result of two starts (samples paired in order, and by their mean
    distance).  It is zero for isometric samples in the same order.

    Cost: n² d + iterations n³.  Gradient: that of the value at the plan found.
    Not for: batches of many hundred samples, or a student of the teacher's width, for
    which `wasserstein` is convex and cheaper.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features, shape ``[m, d_t]``; for ``n != m`` without epsilon, n and m
        need a common multiple of at most 1024.
      metric: distance d: ``"euclidean"``, ``"sqeuclidean"`` or ``"cosine"`` (1 -
        cosine).
      epsilon: weight of the entropy, in units of d^2.  None solves assignment problems.
        A number adds ``epsilon KL(P | 1/nm)`` to the value and solves by Sinkhorn; a
        number below round-off is replaced by the round-off.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples; otherwise ``n = m``.

    Returns:
      Scalar: in units of d^2, averaged over pairs of samples.

    Raises:
      ValueError: shapes or dtypes are wrong, the metric is unknown, or epsilon is not
        positive.

    References:
      Mémoli, Gromov-Wasserstein distances and the metric approach to object matching,
      2011, definition 5.7.

    Examples:
      >>> x = jnp.array([[0.0], [1.0]])
      >>> y = jnp.array([[5.0, 0.0], [5.0, 3.0]])
      >>> gromov_wasserstein(x, y)  # (1 - 3)^2 in two of four pairs
      Array(2., dtype=float32)
    """
    check_choice("metric", metric, METRICS)
    x, y = check_pair(x, y, same_rows=mask is not None, same_columns=False)
    mask = masks.check_mask(mask, x.shape[0])
    x, y = masks.filled(mask, x, y)
    distances = METRICS[metric]
    return gromov_cost(distances(x), distances(y), epsilon=epsilon, mask=mask)
