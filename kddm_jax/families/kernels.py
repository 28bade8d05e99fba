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
from kddm_jax.numerics.grams import map_rows, sum_over_rows
from kddm_jax.numerics.linalg import (
    constant,
    cost_floor,
    matmul,
    safe_sqrt,
    squared_distances,
)


def _squares(x, y):
    """Computes the squared distances ``[n, m]``, at least 0.

    A negative square (from round-off) divided by a small bandwidth would make the
    exponential overflow.  A kernel is flat at distance zero, so clipping removes no
    gradient.
    """
    return jnp.maximum(squared_distances(x, y), 0)


def _column(z):
    return jnp.asarray(z)[:, None]


def _sums_of_distances(x, y, pairs, columns):
    """Sums, for each sample, its distances to x, to y, and from x to y, ``[n]``.

    ``pairs(*rows)`` is the share of each pair, ``[r, n]``, from rows of ``columns``.
    """
    # A sample has distance 0 from itself.  The root of its square's round-off would
    # change the bandwidth of a class of one sample by 0.1 %.
    index = jnp.arange(len(x))

    def of_rows(rows_x, rows_y, at, *rows):
        apart = lambda z: jnp.where(at == index[None, :], 0, z)
        distances = lambda a, b: safe_sqrt(_squares(a, b))
        within = apart(distances(rows_x, x)) + apart(distances(rows_y, y))
        return jnp.sum(pairs(*rows) * (within + distances(rows_x, y)), axis=1)

    return map_rows(of_rows, (x, y, _column(index), *columns))


def _bandwidths(bandwidth, mean_distance, x, y, mask):
    """Returns the given bandwidths or the mean distance, as constants.

    The mean distance, a function without arguments, is raised to its round-off if it is
    smaller.
    """
    if bandwidth is None:
        # Four times the round-off of a distance.
        least = 4 * safe_sqrt(cost_floor(x, y, mask)) + jnp.finfo(x.dtype).tiny ** 0.25
        return [constant(jnp.maximum(mean_distance(), least))]
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


# The mean of k(x, x') - k(x, y') - k(y, x') + k(y, y') would cancel for a student that
# is close to its teacher.  With pairs of samples x_j and y_j, D = x - y and S = x + y,
#   |z - y_j|^2 - |z - x_j|^2 = D_j (2 z - S_j)
# has the digits of D, and so has the difference of two kernels by expm1.
def _change(z, x, y, rates):
    """Computes ``k(z_i, x_j) - k(z_i, y_j)``, ``[r, n]``, averaged over bandwidths.

    ``rates`` ``[r, s]`` are ``1 / 2 sigma^2`` for each row and bandwidth.
    """
    small, large = x - y, x + y
    farther = 2 * matmul(z, small.T) - jnp.sum(small * large, axis=1)[None, :]
    to_x, away = squared_distances(z, x), farther >= 0
    nearest = jnp.maximum(jnp.where(away, to_x, to_x + farther), 0)
    gap = jnp.where(away, -farther, farther)
    total = jnp.zeros_like(gap)
    for i in range(rates.shape[1]):
        rate = rates[:, i : i + 1]
        total += jnp.exp(-rate * nearest) * jnp.expm1(rate * gap)
    return jnp.where(away, -total, total) / rates.shape[1]


def _paired_discrepancy(x, y, sigmas, pairs, columns):
    """Sums the discrepancies of all pairs of samples; see `_sums_of_distances`."""
    n = len(x)
    rates = [jnp.broadcast_to(1 / (2 * s**2), (n, 1)) for s in sigmas]
    # Distances are the same from every origin; near the samples they have more digits.
    origin = constant(jnp.mean(y, axis=0, keepdims=True))
    x, y = x - origin, y - origin

    def of_rows(rows_x, rows_y, rates, *rows):
        change = _change(rows_x, x, y, rates) - _change(rows_y, x, y, rates)
        return jnp.sum(pairs(*rows) * change)

    return sum_over_rows(of_rows, (x, y, jnp.concatenate(rates, axis=1), *columns))


def _unpaired_mmd(x, y, bandwidth):
    """Computes the discrepancy between different numbers of samples."""
    sums = lambda a, b, of: sum_over_rows(
        lambda rows, real: jnp.sum(real * of(_squares(rows, b))),
        (a, jnp.ones((len(a), 1), a.dtype)),
    )
    every = ((x, x), (y, y), (x, y))
    sizes = [len(a) * len(b) for a, b in every]
    distance = lambda: sum(sums(a, b, safe_sqrt) for a, b in every) / sum(sizes)
    sigmas = _bandwidths(bandwidth, distance, x, y, None)
    kernel = lambda squares: _rbf(squares, sigmas)
    within_x, within_y, between = (
        sums(a, b, kernel) / size for (a, b), size in zip(every, sizes, strict=True)
    )
    return within_x + within_y - 2 * between


KERNELS = ("rbf", "linear")


def _check_kernel(kernel, bandwidth):
    check_choice("kernel", kernel, KERNELS)
    if kernel == "linear" and bandwidth is not None:
        raise ValueError(
            "bandwidth is the width of the rbf kernel, but kernel='linear' has none; "
            "leave it out"
        )


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

    Cost: n² d, in blocks of rows, or n d if linear.  Gradient: that of the value; sigma
    is a constant.  Not for: samples of equal means with the linear kernel, which cannot
    distinguish them, or distant samples with the rbf kernel, whose value and gradient
    level off.

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
      ValueError: shapes or dtypes are wrong, the kernel is unknown, ``bandwidth <=
        0``, or there is a bandwidth for the linear kernel.

    References:
      Gretton et al., A kernel two-sample test, 2012, equation 5.

    Examples:
      >>> x = jnp.array([[0.0], [2.0]])
      >>> mmd(x, x + 3, kernel="linear")
      Array(9., dtype=float32)
    """
    _check_kernel(kernel, bandwidth)
    x, y = check_pair(x, y, same_rows=mask is not None)
    mask = masks.check_mask(mask, x.shape[0])
    if kernel == "linear":
        return jnp.sum((masks.mean(x, mask) - masks.mean(y, mask)) ** 2)
    x, y = masks.filled(mask, x, y)
    if len(x) != len(y):
        return _unpaired_mmd(x, y, bandwidth)
    share = jnp.ones(len(x), x.dtype) if mask is None else mask.astype(x.dtype)
    share = share / masks.size(mask, x)
    pairs, columns = lambda rows: rows * share[None, :], [_column(share)]
    distance = lambda: jnp.sum(_sums_of_distances(x, y, pairs, columns)) / 3
    sigmas = _bandwidths(bandwidth, distance, x, y, mask)
    return _paired_discrepancy(x, y, sigmas, pairs, columns)


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

    Cost: n² d, in blocks of rows.  Gradient: that of the value; sigma is a constant.
    Not for: classes of very different spread, because all classes share one bandwidth.

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
      ValueError: shapes, dtypes or labels are wrong, an option is unknown,
        ``bandwidth <= 0``, or there is a bandwidth for the linear kernel.

    References:
      Gretton et al., A kernel two-sample test, 2012, equation 5.

    Examples:
      >>> x, labels = jnp.array([[0.0], [2.0], [1.0]]), jnp.array([0, 0, 1])
      >>> class_mmd(x, x + 3, labels, kernel="linear")
      Array(9., dtype=float32)
    """
    _check_kernel(kernel, bandwidth)
    reduction, bandwidth = as_released(
        compat,
        reduction=(reduction, "mean", "sum"),
        bandwidth=(bandwidth, None, None),
    )
    x, y, groups = labelled_pair(x, y, labels, num_classes, reduction, mask)
    if kernel == "linear":
        difference = class_means(x - y, groups)
        return jnp.sum(groups.weights[:, None] * difference**2)
    labelled = groups.labelled.astype(x.dtype)
    columns = [_column(groups.labels), _column(labelled)]
    same = lambda labels, real: real * groups.same_as(labels[:, 0])

    def distance():
        total = _sums_of_distances(x, y, same, columns)  # [n]
        if compat is None:
            pairs = jnp.maximum(jnp.sum(labelled * groups.counts), 1)
            return jnp.sum(total) / (3 * pairs)
        # a mean for each sample's class, [n, 1]
        return class_means(_column(total / (3 * groups.counts)), groups)

    sigmas = _bandwidths(bandwidth, distance, x, y, groups.labelled)
    weights = _column(groups.weights / groups.counts)
    weighted = lambda weight, labels, real: weight * same(labels, real)
    return _paired_discrepancy(x, y, sigmas, weighted, [weights, *columns])
