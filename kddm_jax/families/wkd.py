"""Computes the transport between the classes of two predictions, and its cost.

``logits_x`` are the student's logits and ``logits_y`` the teacher's of the same images,
both ``[n, k]``.  The transport moves probability from class to class at a cost ``[k,
k]``.  All images share this cost, so each iteration of the solver takes two products of
``[n, k]`` with ``[k, k]``.

References:
  Lv, Yang and Li, Wasserstein distance rivals Kullback-Leibler divergence for knowledge
  distillation, 2024 (arXiv 2412.08139).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kddm_jax.families.logits import check_predictions
from kddm_jax.numerics.checks import (
    as_float,
    as_released,
    check_count,
    check_number,
)
from kddm_jax.numerics.linalg import constant, matmul, normalized, safe_sqrt
from kddm_jax.numerics.solver import Stats, solver_distance

MOST_ITERATIONS = 2000


def _tolerance(dtype):
    """Returns the L1 error at which to stop: 1e-4 in float32, 1e-9 in float64."""
    return jnp.finfo(dtype).eps ** 0.58


def _kept_share(p, column, u, v, kernel):
    """Computes ``P_jj^2 / (p_j q_j)``, class j's own share of the diagonal of M^T M.

    Shape ``[n, k]``; M is defined below.  It is nearly 1 where student and teacher
    agree, so that a class keeps its mass.
    """
    kept = u * jnp.diagonal(kernel)[None, :] * v
    product = jnp.maximum(p * column, jnp.finfo(p.dtype).tiny)
    return jnp.minimum(kept**2 / product, 1 - 1 / 64)


class Scalings(NamedTuple):
    """Contains the scalings of each image's plan, and their products with K.

    Attributes:
      u: scalings of the student's classes, shape ``[n, k]``.
      v: scalings of the teacher's classes, shape ``[n, k]``.
      reached: ``K v`` of each image, shape ``[n, k]``.
      seen: ``K^T u`` of each image, shape ``[n, k]``.
    """

    u: jax.Array
    v: jax.Array
    reached: jax.Array
    seen: jax.Array


def _extrapolated(step, steps, changes, weights):
    """Extrapolates a fixed-point step from the last two (Anderson acceleration).

    ``steps`` and ``changes`` are the last two moves and the changes of step that they
    caused.  The combination that leaves the smallest step is chosen for each image
    (Walker and Ni, Anderson acceleration for fixed-point iterations, 2011).
    """
    dot = lambda a, b: jnp.sum(weights * a * b, axis=1, keepdims=True)
    one, two = changes
    a, b, c = dot(one, one), dot(one, two), dot(two, two)
    # The ridge limits how much round-off grows; without changes, shares are zero.
    ridge = 1e-4 * (a + c) + jnp.finfo(step.dtype).tiny
    a, c = a + ridge, c + ridge
    first, second = dot(one, step), dot(two, step)
    determinant = a * c - b * b
    usable = determinant > 0
    over = lambda z: jnp.where(usable, z / jnp.where(usable, determinant, 1), 0)
    shares = over(c * first - b * second), over(a * second - b * first)
    for share, move, change in zip(shares, steps, changes, strict=True):
        step = step - share * (move + change)
    return step


# The dual is maximized over log v, with u optimal for v.  In units of q, its Hessian is
# I - M^T M (below) with a diagonal of about 1 - kept share.  Steps along the gradient,
# divided by this diagonal and extrapolated from the last two, need 5 to 10 iterations
# for costs without structure, where Sinkhorn needs 15 to 500.
def _fast_scalings(p, q, kernel, most=60):
    """Computes scalings as `_scalings` does; not every image may converge."""
    tiny, tolerance = jnp.finfo(p.dtype).tiny, _tolerance(p.dtype)
    bounded = lambda step: jnp.clip(step, -3, 3)

    def finished(log_v):
        v = jnp.where(q > 0, jnp.exp(log_v), 0)
        reached = matmul(v, kernel.T)
        u = jnp.where(p > 0, p / jnp.maximum(reached, tiny), 0)
        seen = matmul(u, kernel)
        error = jnp.sum(jnp.abs(v * seen - q), axis=1, keepdims=True)
        return log_v, Scalings(u, v, reached, seen), error

    def update(state):
        (log_v, (u, v, _, seen), error), steps, changes, last, count = state
        column = v * seen
        share = _kept_share(p, column, u, v, kernel)
        ratio = jnp.where(q > 0, q / jnp.maximum(column, tiny), 1)
        step = bounded(jnp.log(ratio) / (1 - share))
        # There is no last step at first, and no move that it could have caused.
        changes = changes[1], jnp.where(count > 0, step - last, 0)
        weights = q * (1 - share)
        move = bounded(_extrapolated(step, steps, changes, weights))
        moving = error > tolerance
        keep = lambda new, old: jnp.where(moving, new, old)
        now = jax.tree.map(keep, finished(log_v + move), state[0])
        return now, (steps[1], move), changes, step, count + 1

    def unfinished(state):
        return jnp.any(state[0][2] > tolerance) & (state[4] < most)

    zero = jnp.zeros_like(p)
    seen = matmul(p / jnp.sum(kernel, axis=1)[None, :], kernel)  # of v = 1
    start = jnp.log(jnp.maximum(q, tiny) / jnp.maximum(seen, tiny))
    first = finished(start), (zero, zero), (zero, zero), zero, 0
    (_, found, error), *_, count = jax.lax.while_loop(unfinished, update, first)
    return found, error, count + 1


def _scalings(p, q, kernel):
    """Computes u and v such that diag(u) K diag(v) has marginals p and q, per image.

    Images that do not converge quickly start again with Sinkhorn's iteration.
    """
    tiny, tolerance = jnp.finfo(p.dtype).tiny, _tolerance(p.dtype)

    def relaxed(old, mass, product):
        # Over-relaxation by 3/2 needs a third of the iterations.  0 without mass.
        ratio = mass / jnp.maximum(old * product, tiny)
        return jnp.where(mass > 0, old * ratio * jnp.sqrt(ratio), 0)

    def update(state):
        old, error, count = state
        v = relaxed(old.v, q, old.seen)
        reached = matmul(v, kernel.T)
        u = relaxed(old.u, p, reached)
        new = Scalings(u, v, reached, matmul(u, kernel))
        rows = jnp.sum(jnp.abs(u * reached - p), axis=1, keepdims=True)
        columns = jnp.sum(jnp.abs(v * new.seen - q), axis=1, keepdims=True)
        # An image that has converged does not change any more, so that its plan does
        # not depend on the rest of the batch.
        keep = lambda z, before: jnp.where(error > tolerance, z, before)
        new, now = jax.tree.map(keep, (new, jnp.maximum(rows, columns)), (old, error))
        return new, now, count + 1

    def unfinished(state):
        return jnp.any(state[1] > tolerance) & (state[2] < MOST_ITERATIONS)

    found, error, count = _fast_scalings(p, q, kernel)
    met, ones = error <= tolerance, jnp.ones_like(p)
    sums = [jnp.broadcast_to(jnp.sum(kernel, axis=i), p.shape) for i in (1, 0)]
    keep = lambda z, again: jnp.where(met, z, again)
    found = jax.tree.map(keep, found, Scalings(ones, ones, *sums))
    first = (found, jnp.where(met, error, jnp.inf), count)
    found, error, count = jax.lax.while_loop(unfinished, update, first)
    error, count = jnp.max(error), jnp.asarray(count, p.dtype)
    return found, Stats((error <= tolerance).astype(p.dtype), count, error)


# With the plan P = diag(u) K diag(v) of marginals p and q, a = d log u and b = d log v:
#   p a + P b = dp,  P^T a + q b = dq,   and   dV = <P C 1, a> + <P^T C 1, b>.
# The matrix is symmetric, so dV = <alpha, dp> + <beta, dq> with
#   p alpha + P beta = (P C) 1,  P^T alpha + q beta = (P C)^T 1.
# Eliminating alpha, with y = sqrt(q) beta:  (I - M^T M) y = rhs,  M = P / sqrt(p q^T).
# The matrix is singular only along sqrt(q).  Divided on both sides by the root of its
# diagonal, about 1 - kept share, it is well enough conditioned for a few steps of
# conjugate gradients.  p and q are the plan's own marginals: all this is exact.
@jax.custom_jvp
def _plan_cost(p, q, cost, kernel):
    (u, v, *_), stats = _scalings(p, q, kernel)
    return jnp.sum(u * matmul(v, (kernel * cost).T), axis=1), stats


@_plan_cost.defjvp
def _plan_cost_jvp(primals, tangents):
    p, q, cost, kernel = primals
    found, stats = _scalings(p, q, kernel)
    alpha, beta, value = _sensitivities(found, cost, kernel)
    tangent = jnp.sum(alpha * tangents[0] + beta * tangents[1], axis=1)
    return (value, stats), (tangent, jax.tree.map(jnp.zeros_like, stats))


def _sensitivities(found, cost, kernel):
    """Computes alpha, beta and the value of each image."""
    u, v, *products = found
    prices, tiny = kernel * cost, jnp.finfo(u.dtype).tiny
    moved = matmul(v, prices.T)
    reached, seen = (jnp.maximum(z, tiny) for z in products)
    row_cost, column_cost = moved / reached, matmul(u, prices) / seen
    root_p, root_q = jnp.sqrt(u * reached), jnp.sqrt(v * seen)
    share = _kept_share(u * reached, v * seen, u, v, kernel)
    scale = 1 / jnp.sqrt(1 - share)
    null = root_q / scale
    left, right = jnp.sqrt(u / reached), scale * jnp.sqrt(v / seen)  # M = left K right
    transposed = lambda z: right * matmul(left * z, kernel)

    def without_null(y):
        part = jnp.sum(null * y, axis=1, keepdims=True)
        return y - null * part / jnp.sum(null**2, axis=1, keepdims=True)

    def apply(y):
        moved = transposed(left * matmul(right * y, kernel.T))
        return without_null(scale**2 * y - moved)

    rhs = without_null(scale * root_q * column_cost - transposed(root_p * row_cost))
    least = _tolerance(u.dtype) * jnp.max(jnp.abs(cost))
    y = _conjugate_gradients(apply, rhs, least)
    alpha = row_cost - matmul(right * y, kernel.T) / reached
    beta = column_cost - matmul(u * alpha, kernel) / seen
    return alpha, beta, jnp.sum(u * moved, axis=1)


def _conjugate_gradients(apply, rhs, least, most=100):
    """Solves a positive system for each row, until all residuals are ``least``.

    Returns the best iterate of each row, because round-off can make the last one much
    worse.
    """
    dot = lambda a, b: jnp.sum(a * b, axis=1, keepdims=True)
    over = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)

    def update(state):
        y, residual, direction, size, best, best_size, count = state
        image = apply(direction)
        step = over(size, dot(direction, image))
        y, residual = y + step * direction, residual - step * image
        new_size = dot(residual, residual)
        direction = residual + over(new_size, size) * direction
        # A row that has converged does not change any more, like images above.
        better = (new_size < best_size) & (best_size > least**2)
        best = jnp.where(better, y, best)
        best_size = jnp.where(better, new_size, best_size)
        return y, residual, direction, new_size, best, best_size, count + 1

    def unfinished(state):
        return jnp.any(state[5] > least**2) & (state[6] < most)

    size, zero = dot(rhs, rhs), jnp.zeros_like(rhs)
    first = (zero, rhs, rhs, size, zero, size, 0)
    return jax.lax.while_loop(unfinished, update, first)[4]


def _unrolled_plan_cost(p, q, present, cost, kernel, iterations):
    """Runs the released code's loop, which is differentiated step by step."""

    def update(_, scalings):
        u, _ = scalings
        v = q / (matmul(u, kernel) + 1e-8)
        return p / (matmul(v, kernel.T) + 1e-8), v

    start = present / jnp.sum(present, axis=1, keepdims=True)
    u, v = jax.lax.fori_loop(0, iterations, update, (start, 0 * q))
    columns = jnp.sum(jnp.abs(v * matmul(u, kernel) - q), axis=1)
    stats = Stats(
        jnp.ones((), p.dtype),
        jnp.asarray(iterations, p.dtype),
        constant(jnp.max(columns)),
    )
    return jnp.sum(u * matmul(v, (kernel * cost).T), axis=1), stats


def _check_class_cost(class_cost, epsilon, k, dtype):
    """Checks the cost's shape, and that its kernel neither overflows nor vanishes."""
    if jnp.shape(class_cost) != (k, k):
        raise ValueError(
            f"class_cost must have shape [k, k]=[{k}, {k}] for logits of {k} classes, "
            f"got {list(jnp.shape(class_cost))}; compute it with class_cost_cka"
        )
    check_number("epsilon", epsilon, positive=True)
    if not any(isinstance(z, Tracer) for z in (class_cost, epsilon)):
        largest = float(np.abs(np.asarray(class_cost)).max())
        least = 2 * largest / float(np.log(float(jnp.finfo(dtype).max)))
        if not float(epsilon) >= least:
            raise ValueError(
                f"epsilon={float(epsilon):g} is too small for class_cost up to "
                f"{largest:g} in {jnp.dtype(dtype).name}: exp(-cost / epsilon) "
                f"vanishes; take at least {least:.2g}"
            )
    class_cost = as_float("class_cost", class_cost).astype(dtype)
    return constant(class_cost), constant(jnp.asarray(epsilon, dtype))


def _target_term(s, t, own):
    """Computes the label's cross-entropy times the teacher's probability, ``[n]``."""
    # Classes at -inf are left out first, because 0 times inf is NaN.
    return -jnp.sum(
        jax.nn.softmax(t) * jnp.where(own, jax.nn.log_softmax(s), 0), axis=1
    )


@solver_distance
def wkd_logits(
    logits_x: jax.Array,
    logits_y: jax.Array,
    labels: jax.Array,
    class_cost: jax.Array,
    *,
    temperature: float | jax.Array,
    gamma: float | jax.Array = 1.0,
    epsilon: float | jax.Array = 0.05,
    iterations: int | None = None,
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    r"""Computes the Wasserstein distance between predictions, WKD-L.

    .. math:: \frac1n \sum_i -q_i(y_i) \log p_i(y_i)
              + \gamma\, \langle P_i, C \rangle

    ``P_i`` is the entropic plan from the student's to the teacher's prediction over all
    classes except the label, both at temperature T and renormalised.  The first term
    compares the probabilities of the label, at temperature 1.  The value contains no
    entropy.

    Cost: iterations n k².  Gradient: that of the converged plan (implicit); the cost
    and epsilon are constants.  With ``iterations`` it is that of the unrolled loop.
    Not for: a term that should be zero for equal predictions, because the first term is
    a cross-entropy.

    Args:
      logits_x: student logits, shape ``[n, k]``.
      logits_y: teacher logits, shape ``[n, k]``.
      labels: class labels, int, shape ``[n]``; negative labels have no weight.
      class_cost: cost of moving probability from class to class, shape ``[k, k]``;
        `class_cost_cka` computes it from the teacher's features.
      temperature: temperature T; 2 on ImageNet, 4 to 8 on CIFAR-100.
      gamma: weight of the transport; 25 to 30 on ImageNet, 60 to 600 on CIFAR-100.
      epsilon: weight of the entropy, in units of the cost.
      iterations: number of Sinkhorn iterations; None iterates until the plan has the
        right marginals.  A given number of iterations is unrolled; after ten, the
        marginals are wrong by 5 to 18 %, and the value may be less than the true cost.
      compat: ``"released"`` uses 10 iterations, as in the released code.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: averaged over images; the second term is in units of the cost.

    Raises:
      ValueError: shapes, dtypes or labels are wrong, or epsilon is too small for the
        cost.

    References:
      Lv et al., 2024 (arXiv 2412.08139), equations 5 to 7.

    Examples:
      >>> cost = jnp.abs(jnp.arange(3.0)[:, None] - jnp.arange(3.0)[None, :])
      >>> s, t = jnp.array([[-90.0, 9.0, 0.0]]), jnp.array([[9.0, -90.0, 0.0]])
      >>> options = {"class_cost": cost, "temperature": 1.0, "epsilon": 0.05}
      >>> wkd_logits(s, t, jnp.array([2]), **options)  # all from class 1 to class 0
      Array(1.001, dtype=float32)
    """
    s, t, own, valid = check_predictions(logits_x, logits_y, labels, mask)
    (iterations,) = as_released(compat, iterations=(iterations, None, 10))
    if iterations is not None:
        check_count("iterations", iterations)
    check_number("temperature", temperature, positive=True)
    check_number("gamma", gamma, positive=False)
    cost, epsilon = _check_class_cost(class_cost, epsilon, s.shape[1], s.dtype)
    temperature, gamma = (jnp.asarray(z, s.dtype) for z in (temperature, gamma))

    # The label's probability is set to 0, so that all images share one cost matrix.
    others = [jnp.where(own, -jnp.inf, z / temperature) for z in (s, t)]
    # Without another class in both, there is nothing to move.
    none = jnp.all((others[0] == -jnp.inf) & (others[1] == -jnp.inf), axis=1)
    p, q = (jax.nn.softmax(jnp.where(none[:, None], 0, z)) for z in others)
    kernel = jnp.exp(-cost / epsilon)
    if iterations is None:
        moved, stats = _plan_cost(p, q, cost, kernel)
    else:
        present = 1 - own.astype(s.dtype)
        moved, stats = _unrolled_plan_cost(p, q, present, cost, kernel, iterations)
    moved = jnp.where(none, 0, moved)
    weights = valid.astype(s.dtype)
    weights = weights / jnp.maximum(jnp.sum(weights), 1)
    return jnp.sum(weights * (_target_term(s, t, own) + gamma * moved)), stats


# ---------------------------------------------------------------------------
# The cost of classes.


def _alignments(features):
    """Computes the squared norms of X_i^T X_j for all classes, in the cheaper way."""
    k, n, d = features.shape
    if n <= d:
        grams = jax.lax.map(lambda x: matmul(x, x.T).reshape(-1), features)
        return matmul(grams, grams.T)
    squares = lambda x: jnp.sum(matmul(x.T, features) ** 2, axis=(1, 2))
    return jax.lax.map(squares, features)


def class_cost_cka(features: jax.Array, *, kappa: float = 1.0) -> jax.Array:
    r"""Computes the cost of moving probability between classes, for `wkd_logits`.

    .. math:: C_{ij} = 1 - \exp\big(-\kappa\,(1 - CKA(X_i, X_j))\big)

    It is computed once, from the teacher's features of training images, with the same
    number of images for each class; samples of two classes are paired by their index.
    In the released code, the samples are all positions of the last feature map on
    CIFAR, and the logits on ImageNet.

    Cost: k n² d + k² n², or k² n d² if d is smaller.  Gradient: none is needed, because
    `wkd_logits` treats the cost as a constant.  Not for: use inside the training step.

    Args:
      features: features of n images of each class, shape ``[k, n, d]``.
      kappa: sharpness of the cost.

    Returns:
      Cost, shape ``[k, k]``, in [0, 1], zero on the diagonal.

    Raises:
      ValueError: the shape or dtype is wrong, or kappa is negative.

    References:
      Lv et al., 2024 (arXiv 2412.08139), equations 3 and 4.

    Examples:
      >>> x, y = jnp.array([1.0, 1.0, -1.0, -1.0]), jnp.array([1.0, -1.0, 1.0, -1.0])
      >>> class_cost_cka(jnp.stack([x, -x, y])[:, :, None])[0]  # 1 - 1 / e
      Array([0.   , 0.   , 0.632], dtype=float32)
    """
    features = as_float("features", features)
    if features.ndim != 3 or 0 in features.shape:
        raise ValueError(
            "features must have shape [classes, samples, width], as many samples of "
            f"each class, got {list(features.shape)}"
        )
    check_number("kappa", kappa, positive=False)
    products = _alignments(jax.vmap(normalized)(features))
    norms = safe_sqrt(jnp.diagonal(products))
    scale = norms[:, None] * norms[None, :]
    known = scale > 0
    alignment = jnp.where(known, products / jnp.where(known, scale, 1), 0)
    distance = jnp.maximum(1 - alignment, 0) * (1 - jnp.eye(len(norms)))
    return (1 - jnp.exp(-kappa * distance)).astype(features.dtype)
