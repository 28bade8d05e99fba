"""Distances of predictions: knowledge distillation, and transport between classes.

``logits_x`` are the student's, ``logits_y`` the teacher's, ``[n, k]`` both, of the same
images.  All are means over images.  The transport between two predictions moves
probability from class to class at the price of a cost matrix ``[k, k]`` that all images
share: every iteration is two products of ``[n, k]`` with ``[k, k]``.

References:
  Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015 (arXiv
  1503.02531).
  Lv, Yang and Li, Wasserstein distance rivals Kullback-Leibler divergence for knowledge
  distillation, 2024 (arXiv 2412.08139).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kddm_jax.alignment import normalized
from kddm_jax.checks import (
    DIRECTIONS,
    as_float,
    as_released,
    check_choice,
    check_labels,
    check_number,
    check_pair,
)
from kddm_jax.linalg import constant, matmul, safe_sqrt
from kddm_jax.transport import Stats

NAMES = ("logits_x", "logits_y")

# ---------------------------------------------------------------------------
# Knowledge distillation.


def _standardized(logits):
    """(l - mean) / deviation per image, deviation unbiased; zero for equal logits."""
    centred = logits - jnp.mean(logits, axis=1, keepdims=True)
    count = max(logits.shape[1] - 1, 1)
    variance = jnp.sum(centred * centred, axis=1, keepdims=True) / count
    return centred / (safe_sqrt(variance) + 1e-6)


def _divergence(log_p, log_q):
    """KL(p || q) of every image: the sum of p (r - 1 - log r) with r = q / p.

    No term is negative, and none cancels where the predictions nearly agree.
    """
    p, log_ratio = jnp.exp(log_p), log_q - log_p
    near = jnp.abs(log_ratio) < 1
    small = jnp.where(near, log_ratio, 0)
    terms = jnp.where(
        near,
        p * (jnp.expm1(small) - small),
        jnp.exp(log_q) - p - p * log_ratio,
    )
    return jnp.sum(terms, axis=1)


def kd(
    logits_x: jax.Array,
    logits_y: jax.Array,
    *,
    temperature: float | jax.Array = 4.0,
    standardize: bool = False,
    direction: str = "teacher||student",
    compat: str | None = None,
) -> jax.Array:
    r"""Computes the divergence of softened predictions, knowledge distillation.

    .. math:: \frac{T^2}{n} \sum_i KL\big(\mathrm{softmax}(t_i / T)
              \,\|\, \mathrm{softmax}(s_i / T)\big)

    Cost: n k.  Gradient: ``T (softmax(s / T) - softmax(t / T)) / n`` by the student's
    logits, unless standardised or the other way round.  Not for: a teacher of other
    classes, or features.

    Args:
      logits_x: student logits s, shape ``[n, k]``.
      logits_y: teacher logits t, shape ``[n, k]``.
      temperature: T.
      standardize: whether each image's logits are first divided by their deviation,
        mean taken off: the student then need not learn the teacher's scale.
      direction: ``"teacher||student"`` or ``"student||teacher"``.
      compat: ``"released"`` takes the direction of KD2M's code, the latter.

    Returns:
      Scalar, in nats times ``T^2``, averaged over images.

    Raises:
      ValueError: shapes, dtypes, unknown options, ``temperature <= 0``.

    References:
      Hinton et al., 2015 (arXiv 1503.02531), section 2.  Sun et al., Logit
      standardization in knowledge distillation, 2024 (arXiv 2403.01427), equation 8.

    Examples:
      >>> s, t = jnp.array([[0.0, 0.0]]), jnp.log(jnp.array([[0.75, 0.25]]))
      >>> kd(s, t, temperature=1.0)  # log 2 - entropy of (3/4, 1/4)
      Array(0.1308, dtype=float32)
    """
    check_choice("direction", direction, DIRECTIONS)
    (direction,) = as_released(
        compat, direction=(direction, "teacher||student", "student||teacher")
    )
    check_number("temperature", temperature, positive=True)
    s, t = check_pair(logits_x, logits_y, names=NAMES, same_rows=True)
    if standardize:
        s, t = _standardized(s), _standardized(t)
    temperature = jnp.asarray(temperature, s.dtype)
    log_s, log_t = (jax.nn.log_softmax(z / temperature) for z in (s, t))
    log_p, log_q = (log_s, log_t) if direction == DIRECTIONS[0] else (log_t, log_s)
    return temperature**2 * jnp.mean(_divergence(log_p, log_q))


# ---------------------------------------------------------------------------
# Transport between the classes of two predictions.


MOST_ITERATIONS = 2000


def _tolerance(dtype):
    """L1 error at which iterations end: 1e-4 in single precision, 1e-9 in double."""
    return jnp.finfo(dtype).eps ** 0.58


def _scalings(p, q, kernel):
    """u, v with diag(u) K diag(v) of marginals p and q, for every image."""
    tiny, tolerance = jnp.finfo(p.dtype).tiny, _tolerance(p.dtype)

    def relaxed(old, mass, product):
        # Over-relaxed by 3/2: a third of the iterations.  No mass, no scaling.
        ratio = mass / jnp.maximum(old * product, tiny)
        return jnp.where(mass > 0, old * ratio * jnp.sqrt(ratio), 0)

    def update(state):
        *old, error, count = state
        u, v, seen = old
        v = relaxed(v, q, seen)
        reached = matmul(v, kernel.T)
        u = relaxed(u, p, reached)
        seen = matmul(u, kernel)
        rows = jnp.sum(jnp.abs(u * reached - p), axis=1, keepdims=True)
        columns = jnp.sum(jnp.abs(v * seen - q), axis=1, keepdims=True)
        # An image that has converged rests: its plan is the same in every batch.
        moving = error > tolerance
        new = (u, v, seen, jnp.maximum(rows, columns))
        pairs = zip(new, (*old, error), strict=True)
        return *(jnp.where(moving, z, before) for z, before in pairs), count + 1

    def unfinished(state):
        return jnp.any(state[3] > tolerance) & (state[4] < MOST_ITERATIONS)

    u, v = (p > 0).astype(p.dtype), (q > 0).astype(p.dtype)
    infinite = jnp.full((p.shape[0], 1), jnp.inf, p.dtype)
    first = (u, v, matmul(u, kernel), infinite, 0)
    u, v, _, error, count = jax.lax.while_loop(unfinished, update, first)
    error, count = jnp.max(error), jnp.asarray(count, p.dtype)
    return u, v, Stats((error <= tolerance).astype(p.dtype), count, error)


# With the plan P = diag(u) K diag(v) of marginals p and q, a = d log u and b = d log v:
#   p a + P b = dp,  P^T a + q b = dq,   and   dV = <P C 1, a> + <P^T C 1, b>.
# The matrix is symmetric, so dV = <alpha, dp> + <beta, dq> with
#   p alpha + P beta = (P C) 1,  P^T alpha + q beta = (P C)^T 1.
# Without alpha, and in y = sqrt(q) beta:  (I - M^T M) y = rhs,  M = P / sqrt(p q^T),
# singular along sqrt(q) alone, well enough conditioned for ten conjugate gradients.
# p and q are the plan's own marginals, for which all this holds exactly.
@jax.custom_jvp
def _plan_cost(p, q, cost, kernel):
    u, v, stats = _scalings(p, q, kernel)
    return jnp.sum(u * matmul(v, (kernel * cost).T), axis=1), stats


@_plan_cost.defjvp
def _plan_cost_jvp(primals, tangents):
    p, q, cost, kernel = primals
    u, v, stats = _scalings(p, q, kernel)
    alpha, beta, value = _sensitivities(u, v, cost, kernel)
    tangent = jnp.sum(alpha * tangents[0] + beta * tangents[1], axis=1)
    return (value, stats), (tangent, jax.tree.map(jnp.zeros_like, stats))


def _sensitivities(u, v, cost, kernel):
    """alpha, beta and the value, for every image."""
    prices, tiny = kernel * cost, jnp.finfo(u.dtype).tiny
    moved = matmul(v, prices.T)
    reached, seen = (
        jnp.maximum(z, tiny) for z in (matmul(v, kernel.T), matmul(u, kernel))
    )
    row_cost, column_cost = moved / reached, matmul(u, prices) / seen
    root_p, root_q = jnp.sqrt(u * reached), jnp.sqrt(v * seen)
    left, right = jnp.sqrt(u / reached), jnp.sqrt(v / seen)  # M = left K right
    transposed = lambda z: right * matmul(left * z, kernel)

    def without_null(y):
        share = jnp.sum(root_q * y, axis=1, keepdims=True)
        return y - root_q * share / jnp.sum(root_q**2, axis=1, keepdims=True)

    def apply(y):
        return without_null(y - transposed(left * matmul(right * y, kernel.T)))

    rhs = without_null(root_q * column_cost - transposed(root_p * row_cost))
    least = _tolerance(u.dtype) * jnp.max(jnp.abs(cost))
    y = _conjugate_gradients(apply, rhs, least)
    alpha = row_cost - matmul(right * y, kernel.T) / reached
    beta = column_cost - matmul(u * alpha, kernel) / seen
    return alpha, beta, jnp.sum(u * moved, axis=1)


def _conjugate_gradients(apply, rhs, least, most=100):
    """Solves a positive system for every row, until all residuals are ``least``.

    Gives each row's best iterate: where round-off rules, the last may be far worse.
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
        # A row that is good enough rests, as an image above.
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
    """The released loop: so many updates, differentiated as they stand."""

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
    """The cost as an array ``[k, k]`` whose kernel neither overflows nor vanishes."""
    if jnp.shape(class_cost) != (k, k):
        raise ValueError(
            f"class_cost must have shape [k, k]=[{k}, {k}] for logits of {k} classes, "
            f"got {list(jnp.shape(class_cost))}; make it with class_cost_cka"
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


def _check_predictions(logits_x, logits_y, labels):
    s, t = check_pair(logits_x, logits_y, names=NAMES, same_rows=True)
    n, k = s.shape
    if k < 2:
        raise ValueError(f"logits_x must have two classes at least, got {k}")
    labels = check_labels(labels, n, num_classes=k)
    own = labels[:, None] == jnp.arange(k)[None, :]  # [n, k], nothing for padding
    valid = labels >= 0
    s, t = (jnp.where(valid[:, None], z, 0) for z in (s, t))  # it may hold anything
    return s, t, own, valid


def _target_term(s, t, own):
    """The label's cross-entropy times the teacher's probability of it, ``[n]``."""
    terms = -jax.nn.softmax(t) * jax.nn.log_softmax(s)
    return jnp.sum(jnp.where(own, terms, 0), axis=1)


def wkd_logits_stats(
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
) -> tuple[jax.Array, Stats]:
    """Computes `wkd_logits` and what its solver says, ``(value, stats)``."""
    s, t, own, valid = _check_predictions(logits_x, logits_y, labels)
    (iterations,) = as_released(compat, iterations=(iterations, None, 10))
    if iterations is not None and iterations < 1:
        raise ValueError(
            f"iterations must be at least 1, got {iterations}; None iterates until "
            "it converges"
        )
    check_number("temperature", temperature, positive=True)
    check_number("gamma", gamma, positive=False)
    cost, epsilon = _check_class_cost(class_cost, epsilon, s.shape[1], s.dtype)
    temperature, gamma = (jnp.asarray(z, s.dtype) for z in (temperature, gamma))

    # The label's column is not cut out but emptied: every image keeps the one cost.
    p, q = (jax.nn.softmax(jnp.where(own, -jnp.inf, z / temperature)) for z in (s, t))
    kernel = jnp.exp(-cost / epsilon)
    if iterations is None:
        moved, stats = _plan_cost(p, q, cost, kernel)
    else:
        present = 1 - own.astype(s.dtype)
        moved, stats = _unrolled_plan_cost(p, q, present, cost, kernel, iterations)
    weights = valid.astype(s.dtype) / jnp.maximum(jnp.sum(valid), 1)
    return jnp.sum(weights * (_target_term(s, t, own) + gamma * moved)), stats


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
) -> jax.Array:
    r"""Computes the Wasserstein distance of predictions, WKD-L.

    .. math:: \frac1n \sum_i -q_i(y_i) \log p_i(y_i)
              + \gamma\, \langle P_i, C \rangle

    ``P_i`` is the entropic plan from the student's to the teacher's prediction of all
    classes but the label's, both at temperature T and renormalised; the label's
    probabilities, at temperature 1, meet in the first term.  There is no entropy in
    the value.

    Cost: iterations n k².  Gradient: that of the converged plan (implicit), the cost
    and epsilon being constants; unrolled if ``iterations`` is given.  Not for: a term
    that should be zero for equal predictions: its first one is a cross-entropy.

    Args:
      logits_x: student logits, shape ``[n, k]``.
      logits_y: teacher logits, shape ``[n, k]``.
      labels: int, shape ``[n]``; negative ones carry no weight.
      class_cost: price of moving probability from class to class, shape ``[k, k]``;
        `class_cost_cka` makes it from the teacher's features.
      temperature: T; 2 on ImageNet, 4 to 8 on CIFAR-100.
      gamma: weight of the transport; 25 to 30 on ImageNet, 60 to 600 on CIFAR-100.
      epsilon: entropic weight in units of the cost.
      iterations: of Sinkhorn; None iterates until the plan has its marginals.  A
        number is unrolled: after ten the marginals are off by 5 to 18 %, and the
        value may lie below the true cost.
      compat: ``"released"`` takes 10 iterations.

    Returns:
      Scalar, in units of the cost (its second term), averaged over images.

    Raises:
      ValueError: shapes, dtypes, labels, an epsilon that is too small for the cost.

    References:
      Lv et al., 2024 (arXiv 2412.08139), equations 5 to 7.

    Examples:
      >>> cost = jnp.abs(jnp.arange(3.0)[:, None] - jnp.arange(3.0)[None, :])
      >>> s, t = jnp.array([[-90.0, 9.0, 0.0]]), jnp.array([[9.0, -90.0, 0.0]])
      >>> labels, options = jnp.array([2]), {"temperature": 1.0, "epsilon": 0.05}
      >>> wkd_logits(s, t, labels, cost, **options)  # all from class 1 to class 0
      Array(1.001, dtype=float32)
    """
    return wkd_logits_stats(
        logits_x,
        logits_y,
        labels,
        class_cost,
        temperature=temperature,
        gamma=gamma,
        epsilon=epsilon,
        iterations=iterations,
        compat=compat,
    )[0]


# ---------------------------------------------------------------------------
# The cost of classes.


def _alignments(features):
    """Squared norms of X_i^T X_j for all classes i, j, by the smaller side."""
    k, n, d = features.shape
    if n <= d:
        grams = jax.lax.map(lambda x: matmul(x, x.T).reshape(-1), features)
        return matmul(grams, grams.T)
    squares = lambda x: jnp.sum(matmul(x.T, features) ** 2, axis=(1, 2))
    return jax.lax.map(squares, features)


def class_cost_cka(features: jax.Array, *, kappa: float = 1.0) -> jax.Array:
    r"""Computes the cost between classes that `wkd_logits` moves probability at.

    .. math:: C_{ij} = 1 - \exp\big(-\kappa\,(1 - CKA(X_i, X_j))\big)

    Made once, from the teacher's features of training images, as many of each class;
    rows of two classes are paired by their index.  The released code takes the last
    feature map with every position as a row on CIFAR, logits on ImageNet.

    Cost: k n² d + k² n², or k² n d² where d is smaller.  Gradient: none is needed: a
    constant of `wkd_logits`.  Not for: the training step; make it once.

    Args:
      features: of n images of each class, shape ``[k, n, d]``.
      kappa: sharpness.

    Returns:
      Shape ``[k, k]``, in [0, 1], zero on the diagonal.

    Raises:
      ValueError: shape or dtype, a negative kappa.

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
