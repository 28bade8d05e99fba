"""Brings the features of both sides to comparable units before a distance sees them.

Features have arbitrary units: a network whose features are ten times larger has
squared distances a hundred times larger.  A normalization transforms the inputs of a
distance, ``x`` of the student and ``y`` of the teacher, not its value, so that it means
the same for every distance.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import as_float
from kddm_jax.numerics.linalg import constant

Pair = Sequence[jax.Array]  # student's and teacher's array


def check_normalization(normalization: object) -> None:
    """Raises ``ValueError`` unless there is such a normalization.

    Args:
      normalization: the value that the caller passed.

    Raises:
      ValueError: an unknown name, or one that is not available yet.
    """
    if normalization is None or normalization in tuple(NORMALIZATIONS):
        return
    available = ", ".join(repr(name) for name in NORMALIZATIONS)
    if normalization in NOT_YET:
        raise ValueError(
            f"normalization={normalization!r} is not available yet; "
            f"available are {available}"
        )
    raise ValueError(f"normalization must be one of {available}; got {normalization!r}")


def teacher_factor(y: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    r"""Computes one over the teacher's root mean squared deviation, a constant.

    .. math:: \Big(\frac1n \sum_i \|y_i - \bar y\|^2\Big)^{-1/2}

    Args:
      y: teacher features of the whole batch, shape ``[n, d]``.
      mask: from `masks.check_mask`, or None.

    Returns:
      Scalar; 0 for features that are constant over the batch up to rounding, which
      have no unit; NaN for features that are not finite.

    Examples:
      >>> teacher_factor(jnp.array([[3.0], [7.0]]))
      Array(0.5, dtype=float32)
    """
    (y,) = masks.zeroed(mask, y)
    peak = jnp.max(jnp.abs(y))  # squares of y / peak neither overflow nor vanish
    unit = y / jnp.where(peak == 0, 1, peak)
    square = lambda z: masks.mean(jnp.sum(z * z, axis=1), mask)
    deviation = square(unit - masks.mean(unit, mask)[None, :])
    rounding = jnp.finfo(y.dtype).eps * square(unit)
    flat = deviation <= rounding  # False for NaN, which must not be hidden
    length = peak * jnp.sqrt(jnp.where(flat, 1, deviation))
    return constant(jnp.where(flat, 0, 1 / jnp.where(flat, 1, length)))


def _as_they_are(pair, whole, mask):
    del whole, mask
    return list(pair)


def _by_teacher(pair, whole, mask):
    """Divides both sides by the teacher's deviation; zeros if the teacher has none."""
    factor = teacher_factor(as_float("teacher_features", whole[1]), mask)
    names = ("student_features", "teacher_features")
    return [factor * as_float(name, z) for name, z in zip(names, pair, strict=True)]


NORMALIZATIONS: Mapping[str | None, Callable[..., list[jax.Array]]] = MappingProxyType(
    {None: _as_they_are, "teacher": _by_teacher}
)
NOT_YET = ("unit", "centered", "standardized")


def normalize(
    pair: Pair,
    whole: Pair,
    normalization: str | None,
    mask: jax.Array | None = None,
) -> list[jax.Array]:
    """Normalizes the features of student and teacher.

    Args:
      pair: both sides' features, shape ``[n, d]`` each.
      whole: both sides' features of all samples that statistics run over: the same, or
        those of all devices.
      normalization: a key of `NORMALIZATIONS`.
      mask: of the samples of ``whole``, from `masks.check_mask`, or None.

    Returns:
      Both sides, in float32 at least unless the normalization is None.

    Examples:
      >>> pair = [jnp.array([[1.0], [1.0]]), jnp.array([[3.0], [7.0]])]
      >>> [z.ravel().tolist() for z in normalize(pair, pair, "teacher")]
      [[0.5, 0.5], [1.5, 3.5]]
    """
    return NORMALIZATIONS[normalization](pair, whole, mask)
