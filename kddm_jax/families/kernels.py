"""Computes maximum mean discrepancies between two samples of features.

``x`` are the student's features ``[n, d]``, ``y`` the teacher's ``[m, d]``.  The
discrepancy is the distance between the mean embeddings of the two samples in the space
of the kernel.

References:
  Gretton et al., A kernel two-sample test, 2012.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import (
    as_released,
    check_choice,
    check_number,
    check_pair,
)
from kddm_jax.numerics.classes import class_means, labelled_pair
from kddm_jax.numerics.linalg import (
    constant,
    cost_floor,
    safe_sqrt,
    squared_distances,
)


def _all_squares(x, y):
    """Computes the squared distances within x, within y and between them, at least 0.

    A negative square (from round-off) divided by a small bandwidth would make the
    exponential overflow.  A kernel is flat at distance zero, so clipping removes no
    gradient.  Diagonals keep their round-off, which cancels for identical samples.
    """
    pairs = ((x, x), (y, y), (x, y))
    return [jnp.maximum(squared_distances(*pair), 0) for pair in pairs]


def _distances(squares):
    """Computes distances from the squares of `_all_squares`.

    A sample has distance 0 from itself.  The root of that square's round-off would
    change the bandwidth of a class of one sample by 0.1 %.
    """
    within_x, within_y, between = (safe_sqrt(s) for s in squares)
    apart = lambda z: jnp.where(jnp.eye(len(z), dtype=bool), 0, z)
    return apart(within_x), apart(within_y), between


def _bandwidths(bandwidth, mean_distance, x, y, mask):
    """Returns the given bandwidths or the mean distance, as constants.

    The mean distance is raised to its round-off if it is smaller.
    """
    if bandwidth is None:
        # Four times the round-off of a distance.
        least = 4 * safe_sqrt(cost_floor(x, y, mask)) + jnp.finfo(x.dtype).tiny ** 0.25
        return [constant(jnp.maximum(mean_distance, least))]
    several = bandwidth if isinstance(bandwidth, list | tuple) else [bandwidth]
    if not several:
        raise ValueError("bandwidth must be a number or several, got none")
    hint = "; None takes the mean distance, and a tuple of numbers averages kernels"
    for number in several:
        check_number("bandwidth", number, positive=True, hint=hint)
    return [constant(jnp.asarray(number, x.dtype)) for number in several]


def _rbf(squares, sigmas):
    """Averages the Gaussian kernels of several bandwidths."""
    first, *others = [jnp.exp(-squares / (2 * sigma**2)) for sigma in sigmas]
    return sum(others, first) / len(sigmas) if others else first


KERNELS = ("rbf", "linear")


def mmd(
    x: jax.Array,
    y: jax.Array,
    *,
    kernel: str = "rbf",
    bandwidth: float | jax.Array | Sequence[float | jax.Array] | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the squared maximum mean discrepancy between two samples.

    .. math:: \overline{k(x, x')} + \overline{k(y, y')} - 2\,\overline{k(x, y)}, \quad
              k = \exp(-r^2 / 2\sigma^2)

    This is the biased V-statistic: it averages over all pairs, including pairs of a
    sample with itself.

    Cost: n² d, or n d if linear.  Gradient: that of the value; sigma is a constant.
    Not for: samples of equal means with the linear kernel, which cannot distinguish
    them, or distant samples with the rbf kernel, whose value and gradient level off.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``.
      kernel: ``"rbf"``, or ``"linear"``, which gives ``||mean(x) - mean(y)||^2``.
      bandwidth: sigma of the rbf kernel.  None uses the mean of all elements of the
        three distance matrices (including zero diagonals), as a constant; a sequence of
        numbers averages their kernels.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples; otherwise ``n = m``.

    Returns:
      Scalar: squared discrepancy, in [0, 2] for "rbf", in squared units of the features
      for "linear".

    Raises:
      ValueError: shapes or dtypes are wrong, the kernel is unknown, or ``bandwidth <=
        0``.

    References:
      Gretton et al., A kernel two-sample test, 2012, equation 5.

    Examples:
      >>> x = jnp.array([[0.0], [2.0]])
      >>> mmd(x, x + 3, kernel="linear")
      Array(9., dtype=float32)
    """
    check_choice("kernel", kernel, KERNELS)
    x, y = check_pair(x, y, same_rows=mask is not None)
    mask = masks.check_mask(mask, x.shape[0])
    if kernel == "linear":
        return jnp.sum((masks.mean(x, mask) - masks.mean(y, mask)) ** 2)
    x, y = masks.filled(mask, x, y)
    squares = _all_squares(x, y)
    if mask is None:
        total = sum(jnp.sum(d) for d in _distances(squares))
        distance = total / sum(s.size for s in squares)
    else:
        means = [masks.mean_of_pairs(d, mask) for d in _distances(squares)]
        distance = sum(means) / 3
    sigmas = _bandwidths(bandwidth, distance, x, y, mask)
    within_x, within_y, between = (
        masks.mean_of_pairs(_rbf(s, sigmas), mask) for s in squares
    )
    return within_x + within_y - 2 * between


def class_mmd(
    x: jax.Array,
    y: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int | None = None,
    kernel: str = "rbf",
    bandwidth: float | jax.Array | Sequence[float | jax.Array] | None = None,
    reduction: str = "mean",
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the class-conditional squared maximum mean discrepancy.

    .. math:: \sum_c w_c\, MMD^2(x_{|c}, y_{|c})

    Cost: n² d.  Gradient: that of the value; sigma is a constant.  Not for: classes of
    very different spread, because all classes share one bandwidth.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``.
      labels: class labels, int, shape ``[n]``; negative labels have no weight.
      num_classes: number of classes, used only to check labels that are not traced.
      kernel: ``"rbf"`` or ``"linear"``.
      bandwidth: sigma of the rbf kernel, the same for all classes, because a class of
        one sample has no scale.  None uses the mean over pairs of the same class in the
        three distance matrices, as a constant; a sequence of numbers averages their
        kernels.
      reduction: ``"mean"`` averages over the classes present, ``"weighted"`` weights
        classes by their frequency, ``"sum"`` adds them up (as in the released code).
      compat: ``"released"`` is ``reduction="sum"`` with a bandwidth for each class.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: squared discrepancy.

    Raises:
      ValueError: shapes, dtypes or labels are wrong, an option is unknown, or
        ``bandwidth <= 0``.

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
    x, y, groups = labelled_pair(x, y, labels, num_classes, reduction, mask)
    if kernel == "linear":
        difference = class_means(x - y, groups)
        return jnp.sum(groups.weights[:, None] * difference**2)
    squares = _all_squares(x, y)
    within = lambda pairs: jnp.sum(groups.same * pairs, axis=1)  # [n]
    total = sum(within(d) for d in _distances(squares))  # [n]
    if compat is None:
        mean = jnp.sum(total) / (3 * jnp.maximum(jnp.sum(groups.same), 1))
    else:  # a mean for each sample's class, [n, 1]
        mean = class_means((total / (3 * groups.counts))[:, None], groups)
    sigmas = _bandwidths(bandwidth, mean, x, y, groups.labelled)
    within_x, within_y, between = (
        within(_rbf(s, sigmas)) / groups.counts for s in squares
    )
    return jnp.sum(groups.weights * (within_x + within_y - 2 * between))
