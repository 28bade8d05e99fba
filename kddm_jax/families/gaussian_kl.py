"""Computes Kullback-Leibler divergences between Gaussian fits of two samples.

``x`` are the student's features ``[n, d]``, ``y`` the teacher's ``[m, d]``; means and
covariances are those of the sample (``1/n``).  A batch often has fewer samples than
features, so that full covariances are singular and the divergence needs a ridge.

References:
  Fernandes Montesuma, KD2M: a unifying framework for feature knowledge
  distillation, 2025 (arXiv 2504.01757).
"""

import jax
import jax.numpy as jnp

from kddm_jax.families.gaussian import COVARIANCES
from kddm_jax.numerics import masks
from kddm_jax.numerics.bank import own_classes
from kddm_jax.numerics.checks import (
    DIRECTIONS,
    as_released,
    check_choice,
    check_number,
    check_pair,
)
from kddm_jax.numerics.classes import class_means, labelled_pair
from kddm_jax.numerics.linalg import constant, matmul, safe_sqrt


def _ridge(ridge, y, mask):
    """Returns the given ridge or 1e-3 of the teacher's mean variance, as a constant."""
    if ridge is not None:
        check_number("ridge", ridge, positive=False)
        return constant(jnp.asarray(ridge, y.dtype))
    weights = (jnp.ones(y.shape[0], bool) if mask is None else mask).astype(y.dtype)
    weights = weights[:, None] / jnp.maximum(jnp.sum(weights), 1e-6)
    mean = jnp.sum(weights * y, axis=0, keepdims=True)
    variance = jnp.mean(jnp.sum(weights * (y - mean) ** 2, axis=0))
    # A constant teacher has no variance, so its features set the scale.
    square = jnp.mean(y * y) if mask is None else jnp.mean(masks.mean(y * y, mask))
    # Features of zero have no scale either. The gradient divides by the ridge squared.
    least = jnp.finfo(y.dtype).eps * square + jnp.finfo(y.dtype).tiny ** (1 / 3)
    return constant(jnp.maximum(1e-3 * variance, least))


def _excess(change, ratio):
    """Computes ``change - log(1 + change)`` for a ratio ``1 + change`` of variances."""
    # Unlike a sum of logarithms, r - 1 - log r does not cancel at r = 1.  Near it, the
    # series log(1 + t) = 2 artanh s at s = t / (2 + t) is more accurate.
    near = jnp.abs(change) < 0.01
    t = jnp.where(near, change, 0)
    s = t / (2 + t)
    series = s * (t - 2 * s**2 * (1 / 3 + s**2 / 5))
    ratio = jnp.where(near, 2, ratio)
    return jnp.where(near, series, ratio - 1 - jnp.log(ratio))


def _diagonal_kl(squared_shift, variances_p, variances_q, change=None):
    """Computes the KL of diagonal Gaussians, summed over the last axis.

    The variances contain the ridge.  ``change`` is p minus q, if it is known better
    than the difference of both.
    """
    change = variances_p - variances_q if change is None else change
    terms = _excess(change / variances_q, variances_p / variances_q)
    return 0.5 * jnp.sum(terms + squared_shift / variances_q, axis=-1)


def _above_rounding(ridge, *grams):
    """Raises the ridge to the round-off of the Cholesky factors, if it is smaller.

    A smaller ridge may give NaN, for instance if the student's features are 1e4 times
    larger than the teacher's.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.diagonal(g)) for g in grams]))
    side = grams[0].shape[0]
    rounding = 4 * side**0.5 * jnp.finfo(ridge.dtype).eps * constant(largest)
    return jnp.maximum(ridge, rounding)


def _full_kl(shift, factor_p, factor_q, ridge):
    """Computes KL of N(shift, A^T A + ridge) from N(0, B^T B + ridge), A, B factors.

    ``shift`` are s differences of means, ``[s, d]``; the result has a value for each.
    """
    d = factor_p.shape[1]
    eye = jnp.eye(d, dtype=factor_p.dtype)
    grams = [matmul(f.T, f) for f in (factor_p, factor_q)]
    ridge = _above_rounding(ridge, *grams)
    chol_p, chol_q = (jnp.linalg.cholesky(g + ridge * eye) for g in grams)
    solve = lambda b: jax.scipy.linalg.solve_triangular(chol_q, b, lower=True)
    # The squares on the diagonal are ratios r, whose r - 1 - log r does not cancel.
    ratio = (jnp.diagonal(chol_p) / jnp.diagonal(chol_q)) ** 2
    common = jnp.sum(jnp.tril(solve(chol_p), -1) ** 2)
    common += jnp.sum(_excess(ratio - 1, ratio))
    return 0.5 * (common + jnp.sum(solve(shift.T) ** 2, axis=0))


def _released_kl(shift, variances_x, variances_y):
    """Computes the released code's KL(student || teacher) of diagonal Gaussians.

    It is summed over the last axis.  The code adds 1e-9 to deviations, not to
    variances, so the value is infinite if a feature of the teacher is constant.
    """
    sigma_x, sigma_y = safe_sqrt(variances_x), safe_sqrt(variances_y)
    ratio, shift = sigma_x / (sigma_y + 1e-9), shift / (sigma_y + 1e-9)
    logs = jnp.log(sigma_y / (sigma_x + 1e-9))
    return 0.5 * jnp.sum(ratio**2 + shift**2 - 1 + 2 * logs, axis=-1)


def gaussian_kl(
    x: jax.Array,
    y: jax.Array,
    *,
    covariance: str = "diag",
    ridge: float | jax.Array | None = None,
    direction: str = "student||teacher",
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the Kullback-Leibler divergence between Gaussian fits, KL(G).

    .. math:: KL(P\|Q) = \tfrac12\big[\mathrm{Tr}\,(S_Q^{-1} S_P) - d
              + \Delta\mu^\top S_Q^{-1} \Delta\mu + \log\det S_Q - \log\det S_P\big]

    The ridge is added to both covariances.  Diagonal covariances are the default: with
    fewer samples than features, the full divergence is governed by the inverse of the
    ridge (70,760 at 1e-3 for n=128, d=512).

    Cost: n d, or n d² + d³ if full.  Gradient: that of the value; the ridge is a
    constant.  Not for: large weights: the divergence divides by the teacher's smallest
    variances, and training diverges sooner than with any Wasserstein distance.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``.
      covariance: ``"diag"`` or ``"full"``, in the population form (``1/n``).
      ridge: number added to every variance; None uses 1e-3 times the teacher's mean
        variance, as a constant.  With ``"full"`` it is at least the round-off of the
        covariances.
      direction: ``"student||teacher"`` (as in the released code) or
        ``"teacher||student"``.
      compat: ``"released"`` adds 1e-9 to the deviations and has no ridge; the value is
        infinite if a feature of the teacher is constant.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples; otherwise ``n = m``.

    Returns:
      Scalar: in nats, summed over features.

    Raises:
      ValueError: shapes or dtypes are wrong, an option is unknown, or the ridge is
        negative.

    References:
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), Gaussian case.

    Examples:
      >>> x = jnp.array([[-1.0], [1.0]])
      >>> gaussian_kl(x, x + 3, ridge=0.0)  # 3^2 / 2
      Array(4.5, dtype=float32)
    """
    check_choice("covariance", covariance, COVARIANCES)
    check_choice("direction", direction, DIRECTIONS)
    _check_released_kl(compat, covariance, ridge, direction)
    x, y = check_pair(x, y, same_rows=mask is not None)
    mask = masks.check_mask(mask, x.shape[0])
    x, y = masks.zeroed(mask, x, y)
    mean_x, mean_y = masks.mean(x, mask), masks.mean(y, mask)
    shift = mean_x - mean_y
    centred = masks.zeroed(mask, x - mean_x[None, :], y - mean_y[None, :])
    factor_x, factor_y = (z / masks.size(mask, z) ** 0.5 for z in centred)
    if compat is not None:
        variances = [jnp.sum(f * f, axis=0) for f in (factor_x, factor_y)]
        return masks.zero_if_empty(_released_kl(shift, *variances), mask)
    ridge = _ridge(ridge, y, mask)
    if covariance == "diag":
        pair = [jnp.sum(f * f, axis=0) + ridge for f in (factor_x, factor_y)]
        return _diagonal_kl(shift**2, *_directed(pair, direction))
    factor_p, factor_q = _directed([factor_x, factor_y], direction)
    value = _full_kl(shift[None, :], factor_p, factor_q, ridge)[0]
    return masks.zero_if_empty(value, mask)


def _check_released_kl(compat, covariance, ridge, direction):
    """Raises for options that the released code does not have."""
    as_released(
        compat,
        covariance=(covariance, "diag", "diag"),
        ridge=(ridge, None, None),
        direction=(direction, DIRECTIONS[0], DIRECTIONS[0]),
    )


def _directed(pair, direction):
    return pair if direction == DIRECTIONS[0] else pair[::-1]


def class_gaussian_kl(
    x: jax.Array,
    y: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int | None = None,
    covariance: str = "diag",
    ridge: float | jax.Array | None = None,
    direction: str = "student||teacher",
    reduction: str = "mean",
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the class-conditional Kullback-Leibler divergence, CKL(G).

    .. math:: \sum_c w_c KL\big(N(\mu_{P|c}, S_{P|c}) \| N(\mu_{Q|c}, S_{Q|c})\big)

    A class with one sample has no variance.  On both sides, it gets the pooled
    within-class variance of the classes with at least two samples.

    Cost: n² d, or n k d if there is a ``num_classes`` k of at most n.  If full, n² d +
    n³; with more samples than features n² d², or k (n d² + d³) with ``num_classes``.
    Gradient: that of the value; the ridge is a constant.  Not for: few samples per
    class in a batch, whose variances are close to zero, unless the weight is tiny (1e-5
    by default).

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``.
      labels: class labels, int, shape ``[n]``; negative labels have no weight.
      num_classes: number of classes k, which makes large batches fast.  Labels must be
        less; one that is traced is not checked and may count as no label.
      covariance: ``"diag"`` or ``"full"``; see `gaussian_kl` about ``"full"``.
      ridge: as in `gaussian_kl`; None uses the variance of the whole batch.
      direction: as in `gaussian_kl`.
      reduction: ``"mean"`` averages over the classes present, ``"weighted"`` weights
        classes by their frequency, ``"sum"`` adds them up (as in the released code).
      compat: ``"released"`` is ``reduction="sum"`` with the released `gaussian_kl`; the
        value is infinite for a class of one sample.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: in nats, summed over features.

    Raises:
      ValueError: shapes, dtypes or labels are wrong, an option is unknown, or the ridge
        is negative.

    References:
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), class-conditional case.

    Examples:
      >>> x, labels = jnp.array([[-1.0], [1.0], [5.0]]), jnp.array([0, 0, 1])
      >>> class_gaussian_kl(x, x + 2, labels, ridge=0.0)  # both classes: 2^2 / 2
      Array(2., dtype=float32)
    """
    check_choice("covariance", covariance, COVARIANCES)
    check_choice("direction", direction, DIRECTIONS)
    _check_released_kl(compat, covariance, ridge, direction)
    (reduction,) = as_released(compat, reduction=(reduction, "mean", "sum"))
    if _has_few_classes(x, num_classes, covariance):
        few = {"num_classes": num_classes, "reduction": reduction, "mask": mask}
        x, y, of = own_classes(x, y, labels, **few)
        ridge = None if compat else _ridge(ridge, y, jnp.any(of.of_x > 0, axis=1))
        values = _of_each_class(x, y, of, covariance, ridge, direction)
        return jnp.sum(of.weights * values)
    x, y, groups = labelled_pair(x, y, labels, num_classes, reduction, mask)
    ridge = _ridge(ridge, y, groups.labelled)
    mean_x, mean_y = class_means(x, groups), class_means(y, groups)
    # Samples without a label have weight 0: set them to zero.
    valid = groups.labelled.astype(x.dtype)[:, None]
    shift = valid * (mean_x - mean_y)
    x, y = valid * (x - mean_x), valid * (y - mean_y)
    if compat is not None:
        # Samples without a label get variance 1, so that their divergence is finite.
        variances = [class_means(z * z, groups) + (1 - valid) for z in (x, y)]
        return jnp.sum(groups.weights * _released_kl(shift, *variances))
    p, q = _directed([x, y], direction)
    single = groups.counts < 2
    wide = _class_full_kl if x.shape[0] <= x.shape[1] else _class_full_kl_tall
    kernel = _class_diagonal_kl if covariance == "diag" else wide
    return jnp.sum(groups.weights * kernel(shift, p, q, groups, single, ridge))


def _has_few_classes(x, num_classes, covariance):
    """Returns whether an axis of classes is shorter than one of samples."""
    if num_classes is None or jnp.ndim(x) != 2:
        return False
    n, d = jnp.shape(x)
    return num_classes <= n and (covariance == "diag" or n > d)


def _of_each_class(x, y, of, covariance, ridge, direction):
    """Computes the divergence of each class, ``[k]``; the released one without ridge.

    An absent class has some finite divergence.
    """
    # A small difference of student and teacher is the mean of the differences.
    shift = of.mean(x - y)
    p, q = _directed([of.centered(x), of.centered(y)], direction)
    counts = jnp.sum(of.of_x, axis=0)  # [k]
    absent = (counts == 0).astype(x.dtype)[:, None]
    if ridge is None:
        variances = [of.mean(z * z) + absent for z in (p, q)]
        return _released_kl(shift, *variances)
    # A class of one sample, and an absent one, takes the samples of all larger classes.
    single = counts < 2
    pooled = matmul(of.of_x, (~single).astype(x.dtype)[:, None])  # [n, 1]
    pooled = pooled / jnp.maximum(jnp.sum(pooled), 1)
    shares = jnp.where(single[None, :], pooled, of.of_x * of.share_x[:, None])  # [n, k]
    if covariance == "diag":
        mean = lambda z: matmul(shares.T, z) + absent
        variances_p, variances_q = (mean(z * z) + ridge for z in (p, q))
        change = matmul(shares.T, (p - q) * (p + q))
        return _diagonal_kl(shift**2, variances_p, variances_q, change)

    def of_class(share, moved):
        root = jnp.sqrt(share)[:, None]
        return _full_kl(moved[None, :], root * p, root * q, ridge)[0]

    of_class = jax.checkpoint(of_class)  # keeps no array [n, d] of each class
    return jax.lax.map(lambda pair: of_class(*pair), (shares.T, shift))


def _pooled_factor(centered, single):
    """Scales features so that their squares sum to the pooled within-class variance."""
    count = jnp.maximum(jnp.sum(~single), 1).astype(centered.dtype)
    return centered / jnp.sqrt(count)  # a single sample of a class is zero already


def _class_diagonal_kl(shift, p, q, groups, single, ridge):
    """Computes the divergence of each sample's class, ``[n]``."""
    variances = []
    for centered in (p, q):
        pooled = jnp.sum(_pooled_factor(centered, single) ** 2, axis=0)
        own = class_means(centered**2, groups)
        variances.append(jnp.where(single[:, None], pooled[None, :], own) + ridge)
    return _diagonal_kl(shift**2, *variances)


def _class_full_kl_tall(shift, p, q, groups, single, ridge):
    """Computes the divergence of each sample's class, ``[n]``, by d x d problems.

    This form is for more samples than features.  A class may then have full rank, and
    the n x n form below would divide round-off by a small ridge.
    """
    pooled = (~single).astype(p.dtype) / jnp.maximum(
        jnp.sum((~single).astype(p.dtype)), 1
    )
    own = groups.same / groups.counts[:, None]
    shares = jnp.where(single[:, None], pooled[None, :], own)  # [n, n]

    def of_sample(sample):
        share, moved = sample
        root = jnp.sqrt(share)[:, None]
        return _full_kl(moved[None, :], root * p, root * q, ridge)[0]

    return jax.lax.map(of_sample, (shares, shift))


# Full covariances have a class axis in d x d form, but not in n x n form.  With
# factors A, B (rows, scaled by 1/sqrt(n_c)) of one class and r the ridge,
#   log det(A^T A + r I) = d log r + log det(I + A A^T / r),
#   (B^T B + r I)^-1     = (I - B^T (r I + B B^T)^-1 B) / r,
# and masked Grams contain all classes, because a Cholesky factor keeps the blocks.
def _class_full_kl(shift, p, q, groups, single, ridge):
    """Computes the divergence of each sample's class, ``[n]``."""
    scale = 1 / jnp.sqrt(groups.counts)[:, None]
    p_own, q_own = scale * p, scale * q
    eye = jnp.eye(p.shape[0], dtype=p.dtype)
    gram_p = groups.same * matmul(p_own, p_own.T)
    gram_q = groups.same * matmul(q_own, q_own.T)
    ridge = _above_rounding(ridge, gram_p, gram_q)
    chol_p, chol_q = (jnp.linalg.cholesky(g + ridge * eye) for g in (gram_p, gram_q))
    solve = lambda b: jax.scipy.linalg.solve_triangular(chol_q, b, lower=True)
    total = lambda values: matmul(groups.same, values)  # sum over each sample's class
    log_p, log_q = (jnp.log(jnp.diagonal(c)) for c in (chol_p, chol_q))
    cross = solve(groups.same * matmul(q_own, p_own.T))
    trace = jnp.sum(p_own * p_own, axis=1) - jnp.sum(cross * cross, axis=0)
    trace_ridge = jnp.sum(solve(gram_q) * solve(eye), axis=0)
    # B shift_c for the shift of each sample's own class, one column per sample
    moved = solve(groups.same * matmul(q_own, shift.T))
    maha = (jnp.sum(shift * shift, axis=1) - jnp.sum(moved * moved, axis=0)) / ridge
    own = total(trace / ridge - trace_ridge + 2 * (log_q - log_p)) + maha

    pooled_p, pooled_q = (_pooled_factor(c, single) for c in (p, q))
    pooled = _full_kl(shift, pooled_p, pooled_q, ridge)
    return jnp.where(single, pooled, 0.5 * own)
