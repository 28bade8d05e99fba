"""Solves entropic transport problems by Sinkhorn's iteration, stabilised by absorption.

The plan is ``P = diag(u) K diag(v)`` with ``K = exp((f + g - C) / epsilon)``.  Updates
of the scalings u and v are products of K with a vector, which take a tenth of the time
of updates of the potentials f and g, which are log-sum-exps over the costs C.  Scalings
can overflow; potentials cannot.  Scalings that would leave a safe range are therefore
absorbed: ``f + epsilon log u`` becomes f, and u becomes 1.  This is the only file that
imports ott, whose `Geometry` updates potentials.

References:
  Schmitzer, Stabilized sparse scaling algorithms for entropy regularized transport
  problems, 2019 (arXiv 1610.06519), algorithm 2.
"""

import warnings
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kddm_jax.numerics.linalg import matmul
from kddm_jax.numerics.promotion import implicit_promotion
from kddm_jax.numerics.solver import Stats

# Scalings between exp(-20) and exp(20) neither overflow in float32 nor enlarge entries
# of K that were rounded to zero, below 1e-38, to anything that counts.
LARGEST_LOG = 20.0


class Scalings(NamedTuple):
    """Contains the state of the iteration between two absorptions.

    Attributes:
      u: scalings of the rows, shape ``[n]``.
      v: scalings of the columns, shape ``[m]``.
      seen: ``K^T u``, shape ``[m]``.
      error: L1 error of the marginals; right after an absorption, of the columns.
      count: number of updates so far, including rejected ones.
      fits: True if the last update stayed in range; otherwise it was rejected.
    """

    u: jax.Array
    v: jax.Array
    seen: jax.Array
    error: jax.Array
    count: jax.Array
    fits: jax.Array


@cache
def _geometry():
    """Imports ott's `Geometry`, when the first problem is solved.

    The import takes 1.5 s.  It loads Matplotlib, which closed forms do not need, and
    jaxopt, which warns that it is no longer maintained.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "JAXopt is no longer maintained", DeprecationWarning
        )
        from ott.geometry.geometry import Geometry
    return Geometry


def _column_error(v, seen, b):
    return jnp.sum(jnp.abs(v * seen - b))


def _updated(old: Scalings, kernel, a, b, symmetric) -> Scalings:
    """Updates the scalings once, unless one of them leaves the range.

    A problem between a sample and itself converges after a few simultaneous, averaged
    updates, ``v <- sqrt(v b / K^T u)``, as in ott.tools.sinkhorn_divergence.  Then u
    equals v, unless the cost is not symmetric, as the KL divergence of `jw2`.
    """
    # Samples without mass keep the scaling 1; their rows of K are zero.
    if symmetric:
        u = jnp.where(a > 0, jnp.sqrt(old.u * a / matmul(kernel, old.v)), 1)
        v = jnp.where(b > 0, jnp.sqrt(old.v * b / old.seen), 1)
    else:
        v = jnp.where(b > 0, b / old.seen, 1)
        u = jnp.where(a > 0, a / matmul(kernel, v), 1)
    # u K is much faster than K^T u, for which XLA:CPU transposes K.
    seen = matmul(u, kernel)
    fits = jnp.all(jnp.abs(jnp.log(jnp.concatenate([u, v]))) < LARGEST_LOG)
    error = _column_error(v, seen, b)
    if symmetric:
        error = jnp.maximum(error, jnp.sum(jnp.abs(u * matmul(kernel, v) - a)))
    made = Scalings(u, v, seen, error, old.count, fits)
    kept = jax.tree.map(lambda new, z: jnp.where(fits, new, z), made, old)
    return kept._replace(count=old.count + 1, fits=fits)


def _absorbed(f, g, geometry, a, b, symmetric):
    """Updates the potentials once, as a log-sum-exp of the costs."""
    log_b = jnp.log(b)  # -inf, and so are potentials, where there is no mass
    if symmetric:
        rows = geometry.update_potential(f, g, jnp.log(a), axis=1)
        columns = geometry.update_potential(f, g, log_b, axis=0)
        return (f + rows) / 2, (g + columns) / 2
    g = geometry.update_potential(f, g, log_b, axis=0)
    return geometry.update_potential(f, g, jnp.log(a), axis=1), g


def sinkhorn(
    cost: jax.Array,
    a: jax.Array,
    b: jax.Array,
    epsilon: jax.Array,
    *,
    threshold: float,
    max_iterations: int,
    symmetric: bool = False,
) -> tuple[jax.Array, Stats, jax.Array]:
    r"""Minimizes ``<P, C> + epsilon KL(P | a x b)`` over plans of marginals a and b.

    .. math:: K = e^{(f + g - C) / \epsilon}, \quad
              v \leftarrow b / K^\top u, \quad u \leftarrow a / K v

    Cost: up to three exponentials of ``[n, m]`` for each absorption, and two products
    of ``[n, m]`` with a vector for each iteration, or three if ``symmetric``.

    Args:
      cost: costs, shape ``[n, m]``.
      a: weights of the rows, shape ``[n]``; they sum to 1.
      b: weights of the columns, shape ``[m]``; they sum to 1.
      epsilon: weight of the entropy, in units of the cost.
      threshold: L1 error of the marginals at which the iteration stops.
      max_iterations: largest number of iterations.
      symmetric: True if the problem is between a sample and itself.

    Returns:
      ``(value, stats, plan)``; none of them has a derivative rule.

    Examples:
      >>> half, options = jnp.full(2, 0.5), {"threshold": 1e-3, "max_iterations": 100}
      >>> sinkhorn(1 - jnp.eye(2), half, half, jnp.array(5e-3), **options)[2]
      Array([[0.5, 0. ], [0. , 0.5]], dtype=float32)
    """
    # ott declares epsilon as a float, but also accepts an array.
    geometry = _geometry()(cost_matrix=cost, epsilon=epsilon)  # pyright: ignore[reportArgumentType]

    def unfinished(state):
        return (state.error > threshold) & (state.count < max_iterations)

    def with_scalings(f, g, last):
        return f + epsilon * jnp.log(last.u), g + epsilon * jnp.log(last.v)

    def absorb(state):
        done = state[2]
        f, g = _absorbed(*with_scalings(*state), geometry, a, b, symmetric)
        kernel = geometry.transport_from_potentials(f, g)
        ones, seen = (jnp.ones_like(a), jnp.ones_like(b)), jnp.sum(kernel, axis=0)
        # If a cost is NaN, so is the error, which ends the loop.
        error = _column_error(ones[1], seen, b)
        first = Scalings(*ones, seen, error, done.count + 1, jnp.ones_like(done.fits))
        # Under vmap, a problem that is done waits here for the others.
        last = jax.lax.while_loop(
            lambda state: unfinished(done) & unfinished(state) & state.fits,
            lambda state: _updated(state, kernel, a, b, symmetric),
            first,
        )
        return f, g, last

    with implicit_promotion():
        zeros, ones = (jnp.zeros_like(a), jnp.zeros_like(b)), jnp.ones_like(b)
        infinite = jnp.asarray(jnp.inf, cost.dtype)
        first = jnp.asarray(0), jnp.asarray(True)
        start = Scalings(jnp.ones_like(a), ones, zeros[1], infinite, *first)
        f, g, last = jax.lax.while_loop(
            lambda state: unfinished(state[2]), absorb, (*zeros, start)
        )
        # Round-off in the potentials can exceed epsilon; the scalings correct it.
        plan = last.u[:, None] * geometry.transport_from_potentials(f, g) * last.v
        f, g = with_scalings(f, g, last)
    # The dual value; KL between the masses is zero up to the error.
    mean = lambda weights, dual: jnp.sum(
        jnp.where(weights > 0, weights * (dual - epsilon * jnp.log(weights)), 0)
    )
    excess = jnp.sum(a) * jnp.sum(b) - jnp.sum(plan)
    value = mean(a, f) + mean(b, g) + epsilon * excess
    # After an absorption, round-off of the potentials is in the row sums.
    error = jnp.maximum(last.error, jnp.sum(jnp.abs(jnp.sum(plan, axis=1) - a)))
    converged, count = (
        jnp.asarray(z, cost.dtype) for z in (error <= threshold, last.count)
    )
    return value, Stats(converged, count, error), plan
