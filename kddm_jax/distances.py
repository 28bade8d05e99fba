"""Distances between samples of features: KD2M's, and the catalogue of all distances.

Feature distillation adds ``lambda * D(student, teacher)`` to the cross-entropy,
``D`` a distance between the two networks' features of one batch.  ``x`` holds the
student's features ``[n, d]``, ``y`` the teacher's ``[m, d]``, ``labels`` int
``[n]``; a negative label is padding.  Every function here is pure, gives a scalar,
jits and vmaps, and casts to float32 at least.  Wasserstein names return the
*squared* distance.  No function stops the teacher's gradient: `losses` does.

References:
  Fernandes Montesuma, KD2M: a unifying framework for feature knowledge
  distillation, 2025 (arXiv 2504.01757).
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kddm_jax.alignment import (
    cka,
    feature_gram,
    linear_projection,
    nst,
    procrustes,
    similarity_preserving,
    wkd_features,
)
from kddm_jax.checks import as_released, check_choice, check_number, check_pair
from kddm_jax.gaussian import (
    class_gaussian_kl,
    class_gaussian_wasserstein,
    gaussian_kl,
    gaussian_wasserstein,
)
from kddm_jax.linalg import (
    class_means,
    constant,
    labelled_pair,
    matmul,
    safe_sqrt,
    squared_distances,
    unit,
)
from kddm_jax.logits import kd, wkd_logits, wkd_logits_stats
from kddm_jax.transport import Costs, gromov_cost, transport_cost

# ---------------------------------------------------------------------------
# Empirical Wasserstein distances.


def _uniform(x):
    return jnp.full(x.shape[0], 1 / x.shape[0], x.dtype)


def _cost_floor(x, y):
    """Round-off of a cost: no epsilon below it is meaningful."""
    scale = jnp.mean(jnp.sum(x * x, axis=1)) + jnp.mean(jnp.sum(y * y, axis=1))
    return jnp.finfo(x.dtype).eps * scale


def _solve(x, y, xy, self_cost, a, b, same=None, pairing=None, **solver):
    """Solves for a cost; debiasing also needs the costs within each cloud."""
    debias = solver.get("solver", "sinkhorn") == "sinkhorn"
    if pairing is not None:
        pairing = constant(jnp.asarray(pairing, xy.dtype))
    costs = Costs(
        xy=xy,
        xx=self_cost(0) if debias else None,
        yy=self_cost(1) if debias else None,
        a=a,
        b=b,
        same=same,
        pairing=pairing,
    )
    return transport_cost(costs, floor=_cost_floor(x, y), **solver)


def _price_of_strangers(pairing):
    """Kappa, or None where it is plainly zero: then n != m is allowed."""
    if np.ndim(pairing) != 0:
        raise ValueError(f"pairing must be a number, got shape {np.shape(pairing)}")
    check_number("pairing", pairing, positive=False)
    if isinstance(pairing, Tracer):
        return pairing
    if np.isinf(pairing):
        raise ValueError("pairing must be finite, got inf; its limit is paired_l2")
    return None if np.asarray(pairing) == 0 else pairing


def _wasserstein(
    x,
    y,
    *,
    pairing: float | jax.Array | None = 0.0,
    solver="sinkhorn",
    compat=None,
    **precision,
):
    pairing, solver = as_released(
        compat, pairing=(pairing, 0.0, 0.0), solver=(solver, "sinkhorn", "exact")
    )
    pairing = _price_of_strangers(pairing)
    x, y = check_pair(x, y, same_rows=pairing is not None)
    within = lambda side: squared_distances(*((x, x), (y, y))[side])
    return _solve(
        x,
        y,
        squared_distances(x, y),
        within,
        _uniform(x),
        _uniform(y),
        solver=solver,
        pairing=pairing,
        **precision,
    )


def wasserstein(
    x: jax.Array,
    y: jax.Array,
    *,
    pairing: float | jax.Array = 0.0,
    solver: str = "sinkhorn",
    epsilon: float | jax.Array | None = None,
    threshold: float = 1e-3,
    max_iterations: int = 2000,
    compat: str | None = None,
) -> jax.Array:
    r"""Computes the squared 2-Wasserstein distance of two samples, W2(E).

    .. math:: W_2^2(x, y) = \min_{P \in \Gamma(1/n, 1/m)}
              \sum_{ij} P_{ij} \big(\|x_i - y_j\|^2 + \kappa\, 1_{i \ne j}\big)

    The gradient is ``2 sum_j P_ij (x_i - y_j)`` at the optimal plan.  Do not use a
    large weight with it: it pairs features across classes.

    Cost: n² d + iterations n², three solves if debiased; n² d + n³ at most if exact.
    Gradient: as above, less half of those within each cloud if debiased; plan, epsilon
    and kappa are constants.  Not for: classes that must not mix (`class_wasserstein`),
    nor second derivatives.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``; ``n != m`` is allowed unless the solver
        is "exact" or there is a ``pairing``.
      pairing: kappa, what it costs to move a sample to another one's place, in units
        of the squared distance, a constant; 0 is the Wasserstein distance, which pairs
        whom it likes, and with growing kappa the value rises to `paired_l2` (of
        the "entropic" one plus ``epsilon log n``).
      solver: ``"sinkhorn"``, the debiased Sinkhorn divergence: within 5 % of the
        exact value for unrelated clouds, equal to 6 digits once the student follows
        the teacher; ``"entropic"``, the biased ``OT_eps``; ``"exact"``, by
        assignment.
      epsilon: entropic weight in units of the squared distance; None is 0.02 times
        the mean squared distance, as a constant.  Less than the costs' round-off
        counts as that.
      threshold: L1 error of a marginal at which Sinkhorn stops.
      max_iterations: at which it stops anyway; above ten, in whole tens.
      compat: ``"released"`` is ``solver="exact"``.

    Returns:
      Scalar, squared distance, averaged over samples.

    Raises:
      ValueError: shapes, dtypes, an unknown solver, ``pairing < 0``, ``n != m`` for
        "exact" or with ``pairing``.

    References:
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), empirical case; kappa is ours.

    Examples:
      >>> x = jnp.array([[0.0], [1.0]])
      >>> wasserstein(x, x + 3, solver="exact")  # a translation by 3
      Array(9., dtype=float32)
    """
    return _wasserstein(
        x,
        y,
        pairing=pairing,
        solver=solver,
        epsilon=epsilon,
        threshold=threshold,
        max_iterations=max_iterations,
        compat=compat,
    )[0]


def _class_wasserstein(
    x,
    y,
    labels,
    *,
    num_classes=None,
    reduction="mean",
    solver="sinkhorn",
    compat=None,
    **precision,
):
    reduction, solver = as_released(
        compat,
        reduction=(reduction, "mean", "sum"),
        solver=(solver, "sinkhorn", "exact"),
    )
    x, y, groups = labelled_pair(x, y, labels, num_classes, reduction)
    # Solved at mass 1; "sum" is rescaled.  All-padding batches have mass 0.
    a = groups.weights / jnp.maximum(groups.mass, 1)
    within = lambda side: squared_distances(*((x, x), (y, y))[side])
    between = squared_distances(x, y)
    value, stats = _solve(
        x, y, between, within, a, a, groups.same, solver=solver, **precision
    )
    return groups.mass * value, stats


def class_wasserstein(
    x: jax.Array,
    y: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int | None = None,
    reduction: str = "mean",
    solver: str = "sinkhorn",
    epsilon: float | jax.Array | None = None,
    threshold: float = 1e-3,
    max_iterations: int = 2000,
    compat: str | None = None,
) -> jax.Array:
    r"""Computes the class-conditional squared Wasserstein distance, CW2(E).

    .. math:: \sum_c w_c W_2^2(x_{|c}, y_{|c}), \quad w_c = 1 / n_{classes}

    One transport problem whose mask forbids pairs of different classes: its plan is
    block-diagonal, and it costs what `wasserstein` costs, at 10 classes or 1000.
    Classes absent from the batch have no part; a class with one sample pairs it
    with itself.

    Cost: n² d + iterations n².  Gradient: that of `wasserstein` within each class.
    Not for: batches in which most classes have one sample: those are then paired, as
    by `paired_l2`.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``.
      labels: int, shape ``[n]``; negative ones carry no weight.
      num_classes: checks concrete labels, nothing else.
      reduction: ``"mean"`` over the classes present (the paper), ``"weighted"`` by
        class frequency, ``"sum"`` (the released code).
      solver: as in `wasserstein`; all three are right on unbalanced classes.
      epsilon: as in `wasserstein`; None takes the mean over same-class pairs.
      threshold: as in `wasserstein`.
      max_iterations: as in `wasserstein`.
      compat: ``"released"`` is ``solver="exact", reduction="sum"``.

    Returns:
      Scalar, squared distance, averaged over samples within a class.

    Raises:
      ValueError: shapes, dtypes, labels, unknown options.

    References:
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), class-conditional case.

    Examples:
      >>> x = jnp.array([[0.0], [1.0], [5.0]])
      >>> y = jnp.array([[1.0], [0.0], [7.0]])
      >>> class_wasserstein(x, y, jnp.array([0, 0, 1]), solver="exact")  # (0 + 4) / 2
      Array(2., dtype=float32)
    """
    return _class_wasserstein(
        x,
        y,
        labels,
        num_classes=num_classes,
        reduction=reduction,
        solver=solver,
        epsilon=epsilon,
        threshold=threshold,
        max_iterations=max_iterations,
        compat=compat,
    )[0]


def _probs_cost(logits_x, logits_y):
    return squared_distances(jax.nn.softmax(logits_x), jax.nn.softmax(logits_y))


def _kl_cost(logits_x, logits_y):
    """KL(student_i || teacher_j) for all pairs."""
    log_p = jax.nn.log_softmax(logits_x)
    p = jnp.exp(log_p)
    log_q = jax.nn.log_softmax(logits_y)
    return jnp.sum(p * log_p, axis=1)[:, None] - matmul(p, log_q.T)


LABEL_COSTS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = (
    MappingProxyType(
        {"probs": _probs_cost, "logits": squared_distances, "kl": _kl_cost}
    )
)


def _check_joint(x, y, logits_x, logits_y, same_rows):
    """All four in one float dtype, a row per sample."""
    x, y = check_pair(x, y, same_rows=same_rows)
    logits_x, logits_y = check_pair(logits_x, logits_y, names=("logits_x", "logits_y"))
    if logits_x.shape[0] != x.shape[0] or logits_y.shape[0] != y.shape[0]:
        raise ValueError(
            "logits_x and logits_y must have a row per sample of x and y, got "
            f"{logits_x.shape[0]} and {logits_y.shape[0]} rows for "
            f"{x.shape[0]} and {y.shape[0]}"
        )
    dtype = jnp.promote_types(x.dtype, logits_x.dtype)
    return [z.astype(dtype) for z in (x, y, logits_x, logits_y)]


def _released_joint_cost(x, label_costs):
    """The released code's: features of the student to *itself*, a constant."""
    features = constant(squared_distances(x, x))
    largest = jnp.max(features)
    return features / jnp.where(largest > 0, largest, 1) + label_costs


def _joint_wasserstein(
    x,
    y,
    logits_x,
    logits_y,
    *,
    beta: float | jax.Array | str = "max",
    label_cost="probs",
    pairing: float | jax.Array | None = 0.0,
    solver="sinkhorn",
    compat=None,
    **precision,
):
    check_choice("label_cost", label_cost, LABEL_COSTS)
    if isinstance(beta, str):
        check_choice("beta", beta, ("max",))
    released_cost = "kl" if label_cost == "kl" else "logits"
    label_cost, _, pairing, solver = as_released(
        compat,
        label_cost=(label_cost, "probs", released_cost),
        beta=(beta, "max", "max"),
        pairing=(pairing, 0.0, 0.0),
        solver=(solver, "sinkhorn", "exact"),
    )
    pairing = _price_of_strangers(pairing)
    arrays = x, y, logits_x, logits_y
    same_rows = compat is not None or pairing is not None
    x, y, logits_x, logits_y = _check_joint(*arrays, same_rows=same_rows)
    label = LABEL_COSTS[label_cost]
    features = squared_distances(x, y)
    scale = jnp.max(features) if isinstance(beta, str) else jnp.asarray(beta, x.dtype)
    scale = constant(scale)

    def within(side):
        features, logits = ((x, logits_x), (y, logits_y))[side]
        return squared_distances(features, features) + scale * label(logits, logits)

    between = features + scale * label(logits_x, logits_y)
    if compat is not None:
        between = _released_joint_cost(x, label(logits_x, logits_y))
    weights = _uniform(x), _uniform(y)
    more = {"solver": solver, "pairing": pairing}
    return _solve(x, y, between, within, *weights, **more, **precision)


def joint_wasserstein(
    x: jax.Array,
    y: jax.Array,
    logits_x: jax.Array,
    logits_y: jax.Array,
    *,
    beta: float | jax.Array | str = "max",
    label_cost: str = "probs",
    pairing: float | jax.Array = 0.0,
    solver: str = "sinkhorn",
    epsilon: float | jax.Array | None = None,
    threshold: float = 1e-3,
    max_iterations: int = 2000,
    compat: str | None = None,
) -> jax.Array:
    r"""Computes the joint squared Wasserstein distance of features and labels, JW2(E).

    .. math:: \min_{P \in \Gamma(1/n, 1/m)} \sum_{ij} P_{ij}
              \big(\|x_i - y_j\|^2 + \beta\, \ell(s_i, t_j)
              + \kappa\, 1_{i \ne j}\big)

    ``s`` and ``t`` are the predictions of student and teacher.  With ``beta=1`` the
    labels move the value by 0.04 to 0.2 % only (features weigh in the hundreds), so
    the default is the largest feature cost.

    Cost: n² (d + k) + iterations n².  Gradient: by features and logits, at the plan
    found; epsilon and beta are constants.  Not for: large weights: where predictions
    are still wrong, the plan moves samples to other classes.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``.
      logits_x: student logits, shape ``[n, k]``.
      logits_y: teacher logits, shape ``[m, k]``.
      beta: weight of the label cost; ``"max"`` is the largest feature cost as a
        constant (the released code's scaling, up to a factor).
      label_cost: ``"probs"``, squared distance of softmax outputs, in [0, 2];
        ``"logits"``, of raw logits; ``"kl"``, ``KL(student_i || teacher_j)``, which
        is not symmetric, so that the debiased value may fall below zero at a large
        ``epsilon``.
      pairing: kappa, as in `wasserstein`; needs ``n = m``.
      solver: as in `wasserstein`.
      epsilon: as in `wasserstein`, from the joint cost without kappa.
      threshold: as in `wasserstein`.
      max_iterations: as in `wasserstein`.
      compat: ``"released"`` is the cost that the released code computes: squared
        distances of the *student to itself*, divided by the largest, without
        gradient, plus that of raw logits (or "kl"); exact.  It does not see the
        teacher's features.

    Returns:
      Scalar, squared distance, averaged over samples.

    Raises:
      ValueError: shapes, dtypes, unknown options.

    References:
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), joint case.

    Examples:
      >>> x, s = jnp.array([[0.0], [1.0]]), jnp.array([[9.0, -9.0], [-9.0, 9.0]])
      >>> joint_wasserstein(x, x[::-1], s, s, beta=10.0, solver="exact")  # labels bind
      Array(1., dtype=float32)
    """
    return _joint_wasserstein(
        x,
        y,
        logits_x,
        logits_y,
        beta=beta,
        label_cost=label_cost,
        pairing=pairing,
        solver=solver,
        epsilon=epsilon,
        threshold=threshold,
        max_iterations=max_iterations,
        compat=compat,
    )[0]


# ---------------------------------------------------------------------------
# Transport along directions, and of distances within the clouds.


def _quantiles(n, m):
    """Where two samples' quantile functions are constant: indices and lengths.

    Both step at multiples of 1/n or 1/m; between two steps sample i of one meets
    sample j of the other.  Integers in units of 1/(n m).
    """
    steps = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    start, length = steps[:-1], np.diff(steps)
    return start // m, start // n, length / (n * m)


def _sliced(x, y, directions):
    """Mean over unit ``directions`` ``[d, p]`` of the squared distance along each."""
    n, m = x.shape[0], y.shape[0]
    i, j, length = _quantiles(n, m)
    u, v = (jnp.sort(matmul(z, directions), axis=0) for z in (x, y))  # [n, p], [m, p]
    length = jnp.asarray(length, x.dtype)
    return jnp.mean(jnp.sum(length[:, None] * (u[i] - v[j]) ** 2, axis=0))


def sliced_wasserstein(
    x: jax.Array, y: jax.Array, key: jax.Array, *, num_projections: int = 128
) -> jax.Array:
    r"""Computes the squared sliced Wasserstein distance, by random directions.

    .. math:: \frac1p \sum_k W_2^2(x \theta_k, y \theta_k),
              \quad \theta_k \text{ uniform on the sphere}

    Along a direction transport is a matter of sorting, exact for any n and m.  An
    unbiased estimate of the mean over all directions, which lies below
    ``W_2^2(x, y) / d``.

    Cost: p n (d + log n).  Gradient: that of the sorted pairing along each direction.
    Not for: a key that stays the same, which leaves all other directions unseen.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``.
      key: of the directions; another one at every step.
      num_projections: number of directions, p.

    Returns:
      Scalar, squared distance, averaged over samples and directions.

    Raises:
      ValueError: shapes or dtypes, ``num_projections < 1``.

    References:
      Bonneel et al., Sliced and Radon Wasserstein barycenters of measures, 2015,
      equation 3.

    Examples:
      >>> x = jnp.array([[0.0], [1.0]])
      >>> sliced_wasserstein(x, x + 3, jax.random.key(0))  # one direction: W2
      Array(9., dtype=float32)
    """
    x, y = check_pair(x, y)
    if num_projections < 1:
        raise ValueError(f"num_projections must be at least 1, got {num_projections}")
    shape = (x.shape[1], num_projections)
    # drawn in float32 whatever the features are: the same directions
    directions = jax.random.normal(key, shape, jnp.float32).astype(x.dtype)
    norms = jnp.sqrt(jnp.sum(directions**2, axis=0, keepdims=True))
    return _sliced(x, y, directions / norms)


def _distances(x):
    """All Euclidean distances within x; a sample's from itself is 0, not round-off."""
    off = 1 - jnp.eye(x.shape[0], dtype=x.dtype)
    return off * safe_sqrt(squared_distances(x, x))


def _cosine_distances(x):
    x = unit(x, axis=1)
    return (1 - jnp.eye(x.shape[0], dtype=x.dtype)) * (1 - matmul(x, x.T))


METRICS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "euclidean": _distances,
        "sqeuclidean": lambda x: squared_distances(x, x),
        "cosine": _cosine_distances,
    }
)


def _gromov_wasserstein(x, y, *, metric="euclidean", epsilon=None):
    check_choice("metric", metric, METRICS)
    x, y = check_pair(x, y, same_columns=False)
    distances = METRICS[metric]
    return gromov_cost(distances(x), distances(y), epsilon=epsilon)


def gromov_wasserstein(
    x: jax.Array,
    y: jax.Array,
    *,
    metric: str = "euclidean",
    epsilon: float | jax.Array | None = None,
) -> jax.Array:
    r"""Computes a squared Gromov-Wasserstein distance.

    .. math:: \min_{P \in \Gamma(1/n, 1/m)} \sum_{ijkl}
              \big(d(x_i, x_k) - d(y_j, y_l)\big)^2 P_{ij} P_{kl}

    Compares distances within the clouds, so that widths may differ and each cloud may
    be moved and turned.  The problem is not convex: the value is that of a local
    minimum, an upper bound of the global one, found from two starts (samples paired
    as they come, and by their mean distance).  It is zero for isometric clouds in the
    same order.

    Cost: n² d + iterations n³.  Gradient: that of the value at the plan found.
    Not for: batches far beyond some hundred samples, or a student whose width fits:
    `wasserstein` is convex and cheaper.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features, shape ``[m, d_t]``; for ``n != m`` without epsilon, n and m
        need a common multiple of at most 1024.
      metric: d: ``"euclidean"``, ``"sqeuclidean"`` or ``"cosine"`` (1 - cosine).
      epsilon: None solves by assignments; a number adds ``epsilon KL(P | 1/nm)`` to
        the value, in units of d^2, and solves by Sinkhorn; less than round-off
        counts as that.

    Returns:
      Scalar, in units of d^2, averaged over pairs of samples.

    Raises:
      ValueError: shapes, dtypes, unknown metric, bad epsilon.

    References:
      Mémoli, Gromov-Wasserstein distances and the metric approach to object matching,
      2011, definition 5.7.

    Examples:
      >>> x = jnp.array([[0.0], [1.0]])
      >>> y = jnp.array([[5.0, 0.0], [5.0, 3.0]])
      >>> gromov_wasserstein(x, y)  # (1 - 3)^2 in two of four pairs
      Array(2., dtype=float32)
    """
    return _gromov_wasserstein(x, y, metric=metric, epsilon=epsilon)[0]


# ---------------------------------------------------------------------------
# Maximum mean discrepancies and the paired distance.


def _all_squares(x, y):
    """Squared distances within x, within y and between, free of round-off below 0.

    A kernel is flat at distance zero, so that clipping takes no gradient away; a
    negative square over a tiny bandwidth would blow the exponential up.  Diagonals
    keep their round-off: that of identical clouds cancels.
    """
    pairs = ((x, x), (y, y), (x, y))
    return [jnp.maximum(squared_distances(*pair), 0) for pair in pairs]


def _bandwidth(bandwidth, mean_distance, x, y):
    """The number given, or the mean distance, away from its round-off; a constant."""
    if bandwidth is None:
        # four standard roundings of a distance
        least = 4 * safe_sqrt(_cost_floor(x, y)) + jnp.finfo(x.dtype).tiny ** 0.25
        return constant(jnp.maximum(mean_distance, least))
    cure = "; None takes the mean distance"
    check_number("bandwidth", bandwidth, positive=True, cure=cure)
    return constant(jnp.asarray(bandwidth, x.dtype))


KERNELS = ("rbf", "linear")


def mmd(
    x: jax.Array,
    y: jax.Array,
    *,
    kernel: str = "rbf",
    bandwidth: float | jax.Array | None = None,
) -> jax.Array:
    r"""Computes the squared maximum mean discrepancy (biased V-statistic).

    .. math:: \overline{k(x, x')} + \overline{k(y, y')} - 2\,\overline{k(x, y)}, \quad
              k = \exp(-r^2 / 2\sigma^2)

    Means over all pairs, those of a sample with itself included.

    Cost: n² d, or n d if linear.  Gradient: that of the value, sigma being constant.
    Not for: telling clouds of one mean apart by the linear kernel, or far ones by the
    rbf kernel, whose value and gradient level off.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``.
      kernel: ``"rbf"``, or ``"linear"``: ``||mean(x) - mean(y)||^2``.
      bandwidth: sigma of the rbf kernel; None is the mean of all entries of the
        three distance matrices (zero diagonals included), a constant.

    Returns:
      Scalar: squared; in [0, 2] for "rbf", in units of the features for "linear".

    Raises:
      ValueError: shapes, dtypes, unknown kernel, ``bandwidth <= 0``.

    References:
      Gretton et al., A kernel two-sample test, 2012, equation 5.

    Examples:
      >>> x = jnp.array([[0.0], [2.0]])
      >>> mmd(x, x + 3, kernel="linear")
      Array(9., dtype=float32)
    """
    check_choice("kernel", kernel, KERNELS)
    x, y = check_pair(x, y)
    if kernel == "linear":
        return jnp.sum((jnp.mean(x, axis=0) - jnp.mean(y, axis=0)) ** 2)
    squares = _all_squares(x, y)
    total = sum(jnp.sum(safe_sqrt(s)) for s in squares)
    sigma = _bandwidth(bandwidth, total / sum(s.size for s in squares), x, y)
    within_x, within_y, between = (
        jnp.mean(jnp.exp(-s / (2 * sigma**2))) for s in squares
    )
    return within_x + within_y - 2 * between


def class_mmd(
    x: jax.Array,
    y: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int | None = None,
    kernel: str = "rbf",
    bandwidth: float | jax.Array | None = None,
    reduction: str = "mean",
    compat: str | None = None,
) -> jax.Array:
    r"""Computes the class-conditional squared maximum mean discrepancy.

    .. math:: \sum_c w_c\, MMD^2(x_{|c}, y_{|c})

    Cost: n² d.  Gradient: that of the value, sigma being constant.  Not for: classes
    of very different spread: one bandwidth serves them all.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``.
      labels: int, shape ``[n]``; negative ones carry no weight.
      num_classes: checks concrete labels, nothing else.
      kernel: ``"rbf"`` or ``"linear"``.
      bandwidth: sigma of the rbf kernel, one for all classes; None is the mean over
        the same-class entries of the three distance matrices, a constant.  (A class
        of one sample has no scale of its own.)
      reduction: ``"mean"`` over the classes present, ``"weighted"`` by class
        frequency, ``"sum"`` (the released code).
      compat: ``"released"`` is ``reduction="sum"``, each class with a bandwidth of its
        own.

    Returns:
      Scalar, squared.

    Raises:
      ValueError: shapes, dtypes, labels, unknown options, ``bandwidth <= 0``.

    References:
      Gretton et al., A kernel two-sample test, 2012, equation 5.

    Examples:
      >>> x, labels = jnp.array([[0.0], [2.0], [1.0]]), jnp.array([0, 0, 1])
      >>> class_mmd(x, x + 3, labels, kernel="linear")
      Array(9., dtype=float32)
    """
    check_choice("kernel", kernel, KERNELS)
    reduction, bandwidth = as_released(
        compat,
        reduction=(reduction, "mean", "sum"),
        bandwidth=(bandwidth, None, None),
    )
    x, y, groups = labelled_pair(x, y, labels, num_classes, reduction)
    if kernel == "linear":
        difference = class_means(x - y, groups)
        return jnp.sum(groups.weights[:, None] * difference**2)
    # padding may hold anything: it moves to the origin
    valid = (groups.weights > 0).astype(x.dtype)[:, None]
    x, y = valid * x, valid * y
    squares = _all_squares(x, y)
    within = lambda pairs: jnp.sum(groups.same * pairs, axis=1)  # [n]
    total = sum(within(safe_sqrt(s)) for s in squares)  # [n]
    if compat is None:
        mean = jnp.sum(total) / (3 * jnp.maximum(jnp.sum(groups.same), 1))
    else:  # each row has its class's, [n, 1]
        mean = class_means((total / (3 * groups.counts))[:, None], groups)
    sigma = _bandwidth(bandwidth, mean, x, y)
    within_x, within_y, between = (
        within(jnp.exp(-s / (2 * sigma**2))) / groups.counts for s in squares
    )
    return jnp.sum(groups.weights * (within_x + within_y - 2 * between))


def paired_l2(x: jax.Array, y: jax.Array) -> jax.Array:
    r"""Computes the mean squared distance of paired features.

    .. math:: \frac1n \sum_i \|x_i - y_i\|^2

    The upper end of the chain ``||mean||^2 <= W2(G, diag) <= W2(G) <= W2 <= CW2
    (weighted) <= paired``: it asks for the teacher's features, not for their
    distribution.

    Cost: n d.  Gradient: ``2 (x_i - y_i) / n``.  Not for: a student that may arrange
    its features otherwise than the teacher (`procrustes`), or is of another width
    (`kddm_jax.projectors`).

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``.

    Returns:
      Scalar, squared distance, summed over features, averaged over samples.

    Raises:
      ValueError: shapes or dtypes.

    References:
      Romero et al., FitNets: hints for thin deep nets, 2015 (arXiv 1412.6550),
      equation 3, up to its factor 1/2.

    Examples:
      >>> paired_l2(jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0]]))
      Array(25., dtype=float32)
    """
    x, y = check_pair(x, y, same_rows=True)
    return jnp.mean(jnp.sum((x - y) ** 2, axis=1))


# ---------------------------------------------------------------------------
# The catalogue.

Options = Mapping[str, object] | tuple[tuple[str, object], ...]


def hashable_options(options: Options) -> tuple[tuple[str, object], ...]:
    """Sorts options into pairs, which can be hashed.

    Args:
      options: a mapping from names to values, or its pairs.

    Returns:
      The pairs, sorted by name.

    Raises:
      ValueError: a value is an array.

    Examples:
      >>> hashable_options({"solver": "exact", "pairing": 1.0})
      (('pairing', 1.0), ('solver', 'exact'))
    """
    pairs = tuple(sorted(dict(options).items()))
    for name, value in pairs:
        if isinstance(value, np.ndarray | jax.Array):
            raise ValueError(
                f"option {name} is an array of shape {list(value.shape)}, but options "
                "are constants of the program; pass a Python number, or pass an array "
                f"that is computed from the teacher as teacher_data={{{name!r}: ...}}"
            )
    return pairs


@dataclass(frozen=True)
class Distance:
    """An entry of `DISTANCES`; a distance of your own is passed as one, too.

    It is hashable.

    Attributes:
      fn: ``fn(*arrays, **options) -> scalar``, the arrays named by ``inputs``.
      inputs: names of the arrays: ``"features"``, ``"maps"``, ``"logits"`` (each a
        pair: student, teacher), ``"labels"``, ``"key"``; every other name is looked up
        in the loss's ``teacher_data``.
      options: fixed keyword arguments of the entry, as a mapping; stored as sorted
        pairs.
      title: name in tables.
      complexity: cost of value and gradient.
      promises: properties that the tests check: "zero" for identical clouds,
        "symmetric", invariant to a common "translation" or "rotation", "squared":
        ``D(a x, a y) = a^2 D(x, y)``, different "widths".
      per_sample: a mean over images, so that devices need not gather.
      diagnose: same arguments as ``fn``, gives ``(value, {name: scalar})``; of several
        devices the least "converged" and the largest of all else is shown.
      weights: default of lambda for each ``normalization`` of `distill_loss`; without
        an entry the caller has to pass a number.
    """

    fn: Callable[..., jax.Array]
    _: KW_ONLY
    inputs: tuple[str, ...] = ("features",)
    options: Options = ()
    title: str = ""
    complexity: str = ""
    promises: frozenset[str] = frozenset()
    per_sample: bool = False
    diagnose: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None
    weights: Mapping[str | None, float] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        """Makes it immutable throughout."""
        object.__setattr__(self, "options", hashable_options(self.options))
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))


def _diagnosed(fn):
    """The same function, its solver's stats as a dictionary."""

    def diagnose(*arrays, **options):
        value, stats = fn(*arrays, **options)
        return value, stats._asdict()

    return diagnose


_LABELLED = ("features", "labels")
_RIGID = frozenset({"zero", "symmetric", "translation", "rotation"})
_METRIC = _RIGID | {"squared"}
_GEOMETRY = _RIGID | {"widths"}


def _either(weight):
    """The same default, since a common factor of both sides changes nothing."""
    return {None: weight, "teacher": weight}


# Squared distances have a default of lambda for normalization="teacher" only, whose
# unit they share.  The others do not change with it, but for "linear_projection", whose
# default is for features as they are.  Those down to "l2": held-out digits, 3 seeds
# (experiments/results/digits-weights*.json).  Between 1e-2 and 1 most entries are flat
# within a standard error of one point; the smaller is taken where more is known to hurt
# ("w2" pairs across classes, the Kullback-Leibler divergences and "jw2" diverge).
# After "l2" they are those of the works named above them, not measured here.
DISTANCES: Mapping[str, Distance] = MappingProxyType(
    {
        "w2": Distance(
            wasserstein,
            title="W2 (E)",
            weights={"teacher": 1e-2},
            complexity="n² d + iterations n²",
            promises=_METRIC,
            diagnose=_diagnosed(_wasserstein),
        ),
        "cw2": Distance(
            class_wasserstein,
            inputs=_LABELLED,
            title="CW2 (E)",
            weights={"teacher": 1.0},
            complexity="n² d + iterations n²",
            promises=_METRIC,
            diagnose=_diagnosed(_class_wasserstein),
        ),
        "jw2": Distance(
            joint_wasserstein,
            inputs=("features", "logits"),
            title="JW2 (E)",
            weights={"teacher": 1e-2},
            complexity="n² (d + k) + iterations n²",
            promises=_METRIC,
            diagnose=_diagnosed(_joint_wasserstein),
        ),
        "w2_gaussian": Distance(
            gaussian_wasserstein,
            title="W2 (G)",
            weights={"teacher": 0.1},
            complexity="n² d + n³",
            promises=_METRIC,
        ),
        "cw2_gaussian": Distance(
            class_gaussian_wasserstein,
            inputs=_LABELLED,
            title="CW2 (G)",
            weights={"teacher": 1.0},
            complexity="n² d + n³",
            promises=_METRIC,
        ),
        "kl_gaussian": Distance(
            gaussian_kl,
            title="KL (G)",
            weights=_either(1e-2),
            complexity="n d",
            promises=frozenset({"zero", "translation"}),
        ),
        "ckl_gaussian": Distance(
            class_gaussian_kl,
            inputs=_LABELLED,
            title="CKL (G)",
            weights=_either(1e-5),
            complexity="n² d",
            promises=frozenset({"zero", "translation"}),
        ),
        "mmd_linear": Distance(
            mmd,
            options={"kernel": "linear"},
            title="MMD linear",
            weights={"teacher": 1e-2},
            complexity="n d",
            promises=_METRIC,
        ),
        "mmd_rbf": Distance(
            mmd,
            title="MMD rbf",
            weights=_either(0.1),
            complexity="n² d",
            promises=_RIGID,
        ),
        "cmmd_rbf": Distance(
            class_mmd,
            inputs=_LABELLED,
            title="CMMD rbf",
            weights=_either(1.0),
            complexity="n² d",
            promises=_RIGID,
        ),
        # One over the share of the squared distance that a direction sees would be d:
        # as "w2" at d = 100.
        "sliced_w2": Distance(
            sliced_wasserstein,
            inputs=("features", "key"),
            title="sliced W2",
            weights={"teacher": 1.0},
            complexity="p n (d + log n)",
            promises=frozenset({"zero", "symmetric", "translation", "squared"}),
        ),
        # That of "w2".
        "gromov_w2": Distance(
            gromov_wasserstein,
            title="Gromov W2",
            weights={"teacher": 1e-2},
            complexity="n² d + iterations n³",
            promises=_METRIC | {"widths"},
            diagnose=_diagnosed(_gromov_wasserstein),
        ),
        "l2": Distance(
            paired_l2,
            title="paired L2",
            weights={"teacher": 0.1},
            complexity="n d",
            promises=_METRIC,
            per_sample=True,
        ),
        # arXiv 2509.25253 holds its factor fixed and does not print it; these are of
        # order one, as the cross-entropy is.
        "procrustes": Distance(
            procrustes,
            title="Procrustes",
            weights=_either(1.0),
            complexity="n d² + d³",
            promises=_GEOMETRY,
        ),
        "gram": Distance(
            feature_gram,
            title="feature Gram",
            weights=_either(1.0),
            complexity="n² d",
            promises=_GEOMETRY,
        ),
        "cka": Distance(
            cka,
            title="CKA",
            weights=_either(1.0),
            complexity="n² d",
            promises=_GEOMETRY,
        ),
        # RepDistiller's weight of FitNets, whose regressor is learnt.
        "linear_projection": Distance(
            linear_projection,
            title="linear projection",
            weights={None: 100.0},
            complexity="n d²",
            promises=frozenset({"zero", "rotation", "widths"}),
        ),
        # RepDistiller.
        "similarity": Distance(
            similarity_preserving,
            title="SP",
            weights=_either(3000.0),
            complexity="n² d",
            promises=frozenset({"zero", "symmetric", "rotation", "widths"}),
        ),
        # RepDistiller.
        "nst": Distance(
            nst,
            inputs=("maps",),
            title="NST",
            weights=_either(50.0),
            complexity="n h w c min(h w, c)",
            promises=frozenset({"zero", "symmetric", "widths"}),
            per_sample=True,
        ),
        # CE + T² KL at T = 4: "vanilla KD" of arXiv 2511.14981; RepDistiller weighs
        # 0.1 and 0.9.
        "kd": Distance(
            kd,
            inputs=("logits",),
            title="KD",
            weights=_either(1.0),
            complexity="n k",
            promises=frozenset({"zero"}),
            per_sample=True,
        ),
        "kd_standardized": Distance(
            kd,
            inputs=("logits",),
            options={"standardize": True},
            title="KD, standardised",
            weights=_either(1.0),
            complexity="n k",
            promises=frozenset({"zero"}),
            per_sample=True,
        ),
        # The released settings for ResNet34 to ResNet18.
        "wkd_logits": Distance(
            wkd_logits,
            inputs=("logits", "labels", "class_cost"),
            options={"temperature": 2.0, "gamma": 30.0},
            title="WKD-L",
            weights=_either(1.0),
            complexity="iterations n k²",
            per_sample=True,
            diagnose=_diagnosed(wkd_logits_stats),
        ),
        # The released setting for ResNet34 to ResNet18.
        "wkd_features": Distance(
            wkd_features,
            inputs=("maps",),
            title="WKD-F",
            weights=_either(0.02),
            complexity="n h w c",
            promises=frozenset({"zero", "symmetric", "translation"}),
            per_sample=True,
        ),
    }
)
