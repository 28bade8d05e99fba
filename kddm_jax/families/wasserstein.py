"""Computes empirical Wasserstein distances of features, by class, and with predictions.

``x`` are the student's features ``[n, d]``, ``y`` the teacher's ``[m, d]``; every
sample has the same mass.  The three distances solve one transport problem with
different costs: squared distances of features; the same, with pairs of different
classes forbidden; and squared distances plus a cost between the predictions.

References:
  Fernandes Montesuma, KD2M: a unifying framework for feature knowledge
  distillation, 2025 (arXiv 2504.01757).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kddm_jax.numerics import masks
from kddm_jax.numerics.bank import across, check_no_weights
from kddm_jax.numerics.checks import (
    LOGITS,
    as_released,
    check_choice,
    check_number,
    check_pair,
)
from kddm_jax.numerics.classes import classes, labelled_pair
from kddm_jax.numerics.linalg import constant, cost_floor, matmul, squared_distances
from kddm_jax.numerics.solver import Stats, solver_distance
from kddm_jax.numerics.transport import Costs, transport_cost


def _solve_all(x, y, xy, self_cost, mask, **options):
    """Solves the transport problem between all samples.

    With a mask, all samples are one class, and the other rows have no label.
    """
    if mask is None:
        a, b = (jnp.full(z.shape[0], 1 / z.shape[0], z.dtype) for z in (x, y))
        return _solve(x, y, xy, self_cost, a, b, **options)
    one = classes(jnp.where(mask, 0, -1), reduction="mean", dtype=x.dtype)
    a = one.weights
    value, stats = _solve(x, y, xy, self_cost, a, a, one.same, mask, **options)
    return one.mass * value, stats


def _solve(
    x, y, xy, self_cost, a, b, same=None, mask=None, pairing=None, within=(), **solver
):
    """Solves the transport problem of a cost.

    The debiased solver also needs the costs within x, ``self_cost(0)``, and within y,
    ``self_cost(1)``.  Samples have no weight where ``mask`` is False.  ``within`` are
    the masks of classes within x and within y; () takes ``same`` for both.
    """
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
        **dict(zip(("same_x", "same_y"), within, strict=False)),
    )
    return transport_cost(costs, floor=cost_floor(x, y, mask), **solver)


def _check_pairing(pairing):
    """Checks kappa and returns it, or None if it is known to be zero.

    n and m may differ only without kappa.
    """
    check_number("pairing", pairing, positive=False)
    if isinstance(pairing, Tracer):
        return pairing
    if np.isinf(pairing):
        raise ValueError(
            "pairing must be finite, got inf; use paired_l2, which is its limit"
        )
    return None if np.asarray(pairing) == 0 else pairing


@solver_distance
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
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    r"""Computes the squared 2-Wasserstein distance between two samples, W2(E).

    .. math:: W_2^2(x, y) = \min_{P \in \Gamma(1/n, 1/m)}
              \sum_{ij} P_{ij} \big(\|x_i - y_j\|^2 + \kappa\, 1_{i \ne j}\big)

    The gradient is ``2 sum_j P_ij (x_i - y_j)`` at the optimal plan.  The plan may
    match features of different classes, and so pull a sample towards another class.

    Cost: n² d + iterations n²; the debiased solver solves three such problems.  The
    exact solver costs at most n² d + n³.  Gradient: as above; the debiased solver
    subtracts half the gradients of OT_eps(x, x) and OT_eps(y, y).  The plan, epsilon
    and kappa are treated as constants.  Not for: keeping classes apart (use
    `class_wasserstein`), or second derivatives.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``; ``n != m`` is allowed unless the solver is
        "exact" or ``pairing`` is positive.
      pairing: kappa, a constant: cost added to matching different samples (i ≠ j), in
        units of the squared distance.  0 gives the plain Wasserstein distance.  As
        kappa grows, the value increases towards `paired_l2` (towards `paired_l2` plus
        ``epsilon log n`` with "entropic").
      solver: ``"sinkhorn"`` is the debiased Sinkhorn divergence.  It is within 5 % of
        the exact value for unrelated samples, and agrees with it to 6 digits once the
        student's features are close to the teacher's.  ``"entropic"`` is the biased
        entropic cost ``OT_eps``; ``"exact"`` solves an assignment problem.
      epsilon: weight of the entropy, in units of the squared distance.  None uses 0.02
        times the mean squared distance, without differentiating it.  A value below the
        rounding error of the costs is replaced by that rounding error.
      threshold: L1 error of the marginals at which Sinkhorn stops.
      max_iterations: maximum number of Sinkhorn iterations.
      compat: ``"released"`` reproduces the released code; it is the same as
        ``solver="exact"``.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples; otherwise ``n = m``.

    Returns:
      Scalar: squared distance, averaged over samples.

    Raises:
      ValueError: shapes or dtypes are wrong, the solver is unknown, ``pairing < 0``, or
        ``n != m`` with "exact" or with ``pairing``.

    References:
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), empirical case.  The option
      ``pairing`` is not in the paper.

    Examples:
      >>> x = jnp.array([[0.0], [1.0]])
      >>> wasserstein(x, x + 3, solver="exact")  # a translation by 3
      Array(9., dtype=float32)
    """
    pairing, solver = as_released(
        compat, pairing=(pairing, 0.0, 0.0), solver=(solver, "sinkhorn", "exact")
    )
    kappa = _check_pairing(pairing)
    x, y = check_pair(x, y, same_rows=kappa is not None or mask is not None)
    mask = masks.check_mask(mask, x.shape[0])
    x, y = masks.filled(mask, x, y)
    within = lambda side: squared_distances(*((x, x), (y, y))[side])
    return _solve_all(
        x,
        y,
        squared_distances(x, y),
        within,
        mask,
        solver=solver,
        pairing=kappa,
        epsilon=epsilon,
        threshold=threshold,
        max_iterations=max_iterations,
    )


def _by_class(x, y, labels, labels_y, weights_y, num_classes, reduction, mask):
    """Returns the features, the weights of both sides, and the masks.

    The masks are those of pairs, and of samples with a label; the second is None with a
    bank, whose rows without a label have been filled.
    """
    if labels_y is None:
        check_no_weights(weights_y)
        x, y, own = labelled_pair(x, y, labels, num_classes, reduction, mask)
        # Without the barrier, XLA computes the mask again for each of its uses: the
        # entropic value and gradient of 4,096 samples take 271 MB instead of 204 MB.
        same = jax.lax.optimization_barrier(own.same)
        return x, y, (own.weights, own.weights), (same,), own.labelled
    x, y, of = across(
        *(x, y, labels),
        labels_y=labels_y,
        weights_y=weights_y,
        num_classes=num_classes,
        reduction=reduction,
        mask=mask,
    )
    pairs = (of.of_x, of.of_y), (of.of_x, of.of_x), (of.of_y, of.of_y)
    return x, y, of.row_weights, tuple(matmul(a, b.T) for a, b in pairs), None


@solver_distance
def class_wasserstein(
    x: jax.Array,
    y: jax.Array,
    labels: jax.Array,
    *,
    labels_y: jax.Array | None = None,
    weights_y: jax.Array | None = None,
    num_classes: int | None = None,
    reduction: str = "mean",
    solver: str = "sinkhorn",
    epsilon: float | jax.Array | None = None,
    threshold: float = 1e-3,
    max_iterations: int = 2000,
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    r"""Computes the class-conditional squared Wasserstein distance, CW2(E).

    .. math:: \sum_c w_c W_2^2(x_{|c}, y_{|c}), \quad w_c = 1 / n_{classes}

    All classes are solved as one transport problem, with a mask that forbids pairs of
    different classes.  The plan is block-diagonal.  The cost is the same as that of
    `wasserstein`, for any number of classes.  Classes without a sample in the batch are
    left out.  If a class has one sample x_i, it is matched with y_i.

    With ``labels_y``, y are m features of other images: a `Bank`.  Classes without a
    row in y are left out, too.  The debiased solver then also takes m² d + iterations
    m², which does not change the gradient; with a large bank use "entropic".

    Cost: n² d + iterations n².  Gradient: as for `wasserstein`, within each class.
    Not for: batches in which most classes have one sample, because x_i is then matched
    with y_i, as in `paired_l2`.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``; with ``labels_y``,
        of any samples, ``[m, d]``.
      labels: class labels, int, shape ``[n]``; samples with a negative label are
        ignored.
      labels_y: class labels of y, int, shape ``[m]``; None uses ``labels``.
      weights_y: share of each row of y in its class, shape ``[m]``, not negative; only
        with ``labels_y``.  None weights the rows of a class alike.
      num_classes: number of classes, needed with ``labels_y``; otherwise used only to
        check the labels, and only outside `jit`, where their values are known.
      reduction: ``"mean"`` averages over the classes present (the paper),
        ``"weighted"`` weights classes by their frequency, ``"sum"`` adds them up (as in
        the released code).
      solver: as in `wasserstein`; all three also handle unbalanced classes.  "exact"
        needs the same samples on both sides.
      epsilon: as in `wasserstein`, but None uses 0.02 times the mean over pairs of the
        same class.
      threshold: as in `wasserstein`.
      max_iterations: as in `wasserstein`.
      compat: ``"released"`` is ``solver="exact", reduction="sum"``.
      mask: shape ``[n]``; samples where it is zero are ignored, whatever their
        features contain.  None uses all samples.

    Returns:
      Scalar: squared distance, averaged over samples within each class.

    Raises:
      ValueError: shapes, dtypes or labels are wrong, or an option is unknown.

    References:
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), class-conditional case.

    Examples:
      >>> x = jnp.array([[0.0], [1.0], [5.0]])
      >>> y = jnp.array([[1.0], [0.0], [7.0]])
      >>> class_wasserstein(x, y, jnp.array([0, 0, 1]), solver="exact")  # (0 + 4) / 2
      Array(2., dtype=float32)
    """
    reduction, solver = as_released(
        compat,
        reduction=(reduction, "mean", "sum"),
        solver=(solver, "sinkhorn", "exact"),
    )
    if labels_y is not None and solver == "exact":
        raise ValueError(
            'solver="exact" assigns samples one to one and cannot use labels_y; use '
            'solver="entropic" or "sinkhorn"'
        )
    x, y, (a, b), (same, *within), labelled = _by_class(
        x, y, labels, labels_y, weights_y, num_classes, reduction, mask
    )
    # The problem is solved at mass 1, and "sum" is rescaled.  A batch without labels
    # has mass 0.
    mass = jnp.sum(a)
    scale = jnp.maximum(mass, 1)
    value, stats = _solve(
        x,
        y,
        squared_distances(x, y),
        lambda side: squared_distances(*((x, x), (y, y))[side]),
        a / scale,
        b / scale,
        same,
        labelled,
        within=within,
        solver=solver,
        epsilon=epsilon,
        threshold=threshold,
        max_iterations=max_iterations,
    )
    return mass * value, stats


def _probs_cost(logits_x, logits_y):
    return squared_distances(jax.nn.softmax(logits_x), jax.nn.softmax(logits_y))


def _kl_cost(logits_x, logits_y):
    """Computes KL(student_i || teacher_j) for all pairs.

    A class without mass in both contributes nothing.  Its logarithm is a very large
    negative number rather than minus infinity, so that 0 times it is 0.
    """
    least = -(float(jnp.finfo(logits_x.dtype).max) ** 0.75)  # sums do not overflow
    log_p, log_q = (
        jnp.maximum(jax.nn.log_softmax(z), least) for z in (logits_x, logits_y)
    )
    p = jnp.exp(log_p)
    return jnp.sum(p * log_p, axis=1)[:, None] - matmul(p, log_q.T)


LABEL_COSTS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = (
    MappingProxyType(
        {"probs": _probs_cost, "logits": squared_distances, "kl": _kl_cost}
    )
)


def _check_joint(x, y, logits_x, logits_y, same_rows):
    """Checks that four arrays have the same samples, and casts them to one dtype."""
    x, y = check_pair(x, y, same_rows=same_rows)
    logits_x, logits_y = check_pair(logits_x, logits_y, names=LOGITS)
    if logits_x.shape[0] != x.shape[0] or logits_y.shape[0] != y.shape[0]:
        raise ValueError(
            "logits_x and logits_y must hold the samples of x and y, got "
            f"{logits_x.shape[0]} and {logits_y.shape[0]} rows for "
            f"{x.shape[0]} and {y.shape[0]}; pass the outputs of one batch"
        )
    dtype = np.promote_types(x.dtype, logits_x.dtype)
    return [z.astype(dtype) for z in (x, y, logits_x, logits_y)]


def _released_joint_cost(x, label_costs):
    """Computes the released code's cost, between the student's features *themselves*.

    The cost of features is a constant.
    """
    features = constant(squared_distances(x, x))
    largest = jnp.max(features)
    return features / jnp.where(largest > 0, largest, 1) + label_costs


@solver_distance
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
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    r"""Computes the joint squared Wasserstein distance of features and labels, JW2(E).

    .. math:: \min_{P \in \Gamma(1/n, 1/m)} \sum_{ij} P_{ij}
              \big(\|x_i - y_j\|^2 + \beta\, \ell(s_i, t_j)
              + \kappa\, 1_{i \ne j}\big)

    ``s`` and ``t`` are the predictions of student and teacher.  Squared distances of
    features are often in the hundreds, so with ``beta=1`` the label cost changes the
    value by only 0.04 to 0.2 %.  The default for beta is therefore the largest squared
    distance of features.

    Cost: n² (d + k) + iterations n².  Gradient: with respect to features and logits, at
    the plan that was found; epsilon and beta are constants.  Not for: large weights of
    the loss term, because the plan matches samples of different classes while
    predictions are still wrong.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``.
      logits_x: student logits, shape ``[n, k]``.
      logits_y: teacher logits, shape ``[m, k]``.
      beta: weight of the label cost; ``"max"`` uses the largest squared distance of
        features, as a constant.  Up to a factor, the released code scales this way.
      label_cost: ``"probs"`` is the squared distance of softmax outputs, in [0, 2];
        ``"logits"`` is that of raw logits; ``"kl"`` is ``KL(student_i || teacher_j)``,
        which is not symmetric, so that the debiased value may be negative at a large
        ``epsilon``.
      pairing: kappa, as in `wasserstein`; needs ``n = m``.
      solver: as in `wasserstein`.
      epsilon: as in `wasserstein`, computed from the joint cost without kappa.
      threshold: as in `wasserstein`.
      max_iterations: as in `wasserstein`.
      compat: ``"released"`` uses the cost of the released code: squared distances of
        the student's features to *each other*, divided by the largest, without
        gradient, plus the cost of raw logits (or "kl").  The plan is exact.  This cost
        does not depend on the teacher's features.
      mask: shape ``[n]``; samples where it is zero are ignored, whatever their arrays
        contain.  None uses all samples.  With a mask, n and m must be equal.

    Returns:
      Scalar: squared distance, averaged over samples.

    Raises:
      ValueError: shapes or dtypes are wrong, or an option is unknown.

    References:
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), joint case.

    Examples:
      >>> x, s = jnp.array([[0.0], [1.0]]), jnp.array([[9.0, -9.0], [-9.0, 9.0]])
      >>> joint_wasserstein(x, x[::-1], s, s, beta=10.0, solver="exact")  # labels rule
      Array(1., dtype=float32)
    """
    check_choice("label_cost", label_cost, LABEL_COSTS)
    if isinstance(beta, str):
        check_choice("beta", beta, ("max",))
    else:
        check_number("beta", beta, positive=False)
    released_cost = "kl" if label_cost == "kl" else "logits"
    label_cost, _, pairing, solver = as_released(
        compat,
        label_cost=(label_cost, "probs", released_cost),
        beta=(beta, "max", "max"),
        pairing=(pairing, 0.0, 0.0),
        solver=(solver, "sinkhorn", "exact"),
    )
    kappa = _check_pairing(pairing)
    arrays = x, y, logits_x, logits_y
    same_rows = compat is not None or kappa is not None or mask is not None
    x, y, logits_x, logits_y = _check_joint(*arrays, same_rows=same_rows)
    mask = masks.check_mask(mask, x.shape[0])
    x, y, logits_x, logits_y = masks.filled(mask, x, y, logits_x, logits_y)
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
    return _solve_all(
        x,
        y,
        between,
        within,
        mask,
        solver=solver,
        pairing=kappa,
        epsilon=epsilon,
        threshold=threshold,
        max_iterations=max_iterations,
    )
