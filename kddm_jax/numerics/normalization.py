"""Brings the features of both networks to comparable units.

Features have arbitrary units: a network whose features are ten times larger has
squared distances a hundred times larger.  A normalization transforms the inputs of a
distance, ``x`` of the student and ``y`` of the teacher, rather than its value, so that
it has the same meaning for every distance:

- ``"teacher"`` divides both sides by the teacher's root mean squared deviation;
- ``"unit"`` gives every row length one, which leaves only its direction;
- ``"centered"`` subtracts each side's mean and divides by its own root mean squared
  deviation;
- ``"standardized"`` does the same with each feature separately; see `normalize`.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import check_pair
from kddm_jax.numerics.linalg import constant

Pair = Sequence[jax.Array]  # student's and teacher's array
Mask = jax.Array | None  # zero for no sample

# A feature's deviation counts as at least this share of the side's root mean squared
# deviation, because the rounding errors of a feature that hardly varies are no signal.
FLOOR = 1e-3


def check_normalization(normalization: object) -> None:
    """Checks that a normalization exists.

    Args:
      normalization: the value that the caller passed.

    Raises:
      ValueError: the name is unknown.
    """
    if normalization is None or normalization in tuple(NORMALIZATIONS):
        return
    available = ", ".join(repr(name) for name in NORMALIZATIONS)
    raise ValueError(f"normalization must be one of {available}; got {normalization!r}")


class _Moments(NamedTuple):
    """Contains the statistics of one side, in units of its largest absolute value.

    In these units the squares of features neither overflow nor vanish.
    """

    peak: jax.Array  # 1 for zeros
    mean: jax.Array  # [1, d]
    variances: jax.Array  # [1, d]
    deviation: jax.Array  # mean squared distance from the mean; 1 if flat
    flat: jax.Array  # constant over the samples up to rounding


def _moments(z, mask):
    (z,) = masks.zeroed(mask, z)
    peak = constant(jnp.max(jnp.abs(z)))
    peak = jnp.where(peak == 0, 1, peak)
    unit = z / peak
    mean = masks.mean(unit, mask)[None, :]
    squares = (unit - mean) ** 2
    deviation = masks.mean(jnp.sum(squares, axis=1), mask)
    size = masks.mean(jnp.sum(unit**2, axis=1), mask)
    # False for NaN, which must not be hidden
    flat = deviation <= jnp.finfo(z.dtype).eps * size
    deviation = jnp.where(flat, 1, deviation)
    return _Moments(peak, mean, masks.mean(squares, mask)[None, :], deviation, flat)


def teacher_factor(y: jax.Array, *, mask: Mask = None) -> jax.Array:
    r"""Computes the inverse of the teacher's root mean squared deviation, a constant.

    .. math:: \Big(\frac1n \sum_i \|y_i - \bar y\|^2\Big)^{-1/2}

    Args:
      y: teacher features of the whole batch, shape ``[n, d]``.
      mask: shape ``[n]``, zero for no sample.

    Returns:
      Scalar; 0 for features that are constant over the batch up to rounding, which
      have no unit; NaN for features that are not finite.

    Examples:
      >>> teacher_factor(jnp.array([[3.0], [7.0]]))
      Array(0.5, dtype=float32)
    """
    of = _moments(y, mask)
    length = of.peak * jnp.sqrt(of.deviation)
    return constant(jnp.where(of.flat, 0, 1 / jnp.where(of.flat, 1, length)))


def _by_teacher(pair, whole, mask):
    """Divides both sides by the teacher's deviation; gives zeros if it is zero."""
    factor = teacher_factor(whole[1], mask=mask)
    return [factor * z for z in pair]


def _unit_row(z):
    """Divides rows by their lengths; a row of zeros stays zero, with gradient zero."""
    peak = constant(jnp.max(jnp.abs(z), axis=1, keepdims=True))
    # 1 / peak, times a slope of some hundreds, is still finite; False for NaN.
    zero = peak < 100 * jnp.finfo(z.dtype).tiny
    row = jnp.where(zero, 1, z / jnp.where(zero, 1, peak))
    length = jnp.sqrt(jnp.sum(row**2, axis=1, keepdims=True))
    return jnp.where(zero, 0, row / length)


def _by_row(pair, whole, mask):
    del whole, mask
    return [_unit_row(z) for z in pair]


def _centered(z, of):
    return (z / of.peak - of.mean) / jnp.sqrt(of.deviation)


def _standardized(z, of):
    variances = jnp.maximum(of.variances, FLOOR**2 * of.deviation)
    return (z / of.peak - of.mean) / jnp.sqrt(variances)


def _by_own(transform):
    """Makes a normalization that transforms each side by its own moments."""

    def normalized(pair, whole, mask):
        moments = [_moments(side, mask) for side in whole]
        return [
            jnp.where(of.flat, 0, transform(z, of))
            for z, of in zip(pair, moments, strict=True)
        ]

    return normalized


NORMALIZATIONS: Mapping[str | None, Callable[[Pair, Pair, Mask], list[jax.Array]]] = (
    MappingProxyType(
        {
            None: lambda pair, whole, mask: list(pair),
            "teacher": _by_teacher,
            "unit": _by_row,
            "centered": _by_own(_centered),
            "standardized": _by_own(_standardized),
        }
    )
)


def normalize(
    pair: Pair,
    whole: Pair,
    normalization: str | None,
    *,
    mask: Mask = None,
    whole_mask: Mask = None,
) -> list[jax.Array]:
    r"""Normalizes the features of student and teacher.

    .. math:: \sigma_x^2 = \tfrac1n \textstyle\sum_i \|x_i - \bar x\|^2, \quad
              \sigma_{x,j}^2 = \tfrac1n \textstyle\sum_i (x_{ij} - \bar x_j)^2

    ===================  ============================  ==============================
    normalization        ``x`` becomes                 and does not change with
    ===================  ============================  ==============================
    ``"teacher"``        x / σ_y                       a common factor of both sides
    ``"unit"``           x_i / ‖x_i‖                   a factor of each row
    ``"centered"``       (x - mean) / σ_x              a factor and a shift of a side
    ``"standardized"``   (x_j - mean_j) / σ_{x,j}      those of each feature of a side
    ===================  ============================  ==============================

    ``y`` is transformed likewise, by its own statistics in the last two.  σ_{x,j} is at
    least 1e-3 σ_x.  Under ``"unit"``, a row of zeros stays zero.  Under ``"centered"``
    and ``"standardized"``, a side that is constant over the batch up to rounding
    becomes zero; under ``"teacher"``, both sides become zero if the teacher is
    constant.  The gradient is zero there.

    Cost: n d.  Gradient: the student's statistics are differentiated, the teacher's are
    constants.  A teacher that is not finite gives NaN.

    Args:
      pair: both sides' features, shape ``[n, d]`` each.
      whole: both sides' features that statistics are computed over: ``pair`` itself, or
        the features of all devices.
      normalization: a key of `NORMALIZATIONS`.
      mask: shape ``[n]``; samples whose mask is zero are left out of the statistics and
        become zeros, whatever their values.
      whole_mask: mask of ``whole``; None uses ``mask``.

    Returns:
      Both sides, in float32 or float64 unless the normalization is None.

    Raises:
      ValueError: features are not floating with shape ``[n, d]``; this is not checked
        if the normalization is None.

    Examples:
      >>> pair = [jnp.array([[1.0], [1.0]]), jnp.array([[3.0], [7.0]])]
      >>> [z.ravel().tolist() for z in normalize(pair, pair, "teacher")]
      [[0.5, 0.5], [1.5, 3.5]]
      >>> [z.ravel().tolist() for z in normalize(pair, pair, "centered")]
      [[0.0, 0.0], [-1.0, 1.0]]
    """
    if normalization is not None:
        names = ("student_features", "teacher_features")
        checked = lambda pair: check_pair(*pair, names=names, same_columns=False)
        pair, whole = checked(pair), checked(whole)
        whole = whole[0], constant(whole[1])
    mask = masks.check_mask(mask, len(pair[0]))
    whole_mask = (
        mask if whole_mask is None else masks.check_mask(whole_mask, len(whole[0]))
    )
    pair = masks.zeroed(mask, *pair)
    return masks.zeroed(mask, *NORMALIZATIONS[normalization](pair, whole, whole_mask))
