"""Computes means and sums over the samples that a mask marks.

A zero in a mask means no sample.  Such a row may contain anything, including NaN, so it
is replaced before any arithmetic (0 times NaN is NaN); sums then run over all rows and
are divided by the number of samples.  Shapes stay static.  With ``mask=None`` every
function here gives the same bits as the formula without masks.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kddm_jax.numerics.devices import unsharded


def as_booleans(name: str, mask: jax.Array) -> jax.Array:
    """Converts a mask to booleans; zeros mark what to leave out.

    Args:
      name: name of the mask, for the message.
      mask: any shape.

    Returns:
      The mask as booleans.

    Raises:
      ValueError: a number is negative, unless the mask is traced.

    Examples:
      >>> as_booleans("mask", jnp.array([1.0, 0.0]))
      Array([ True, False], dtype=bool)
    """
    mask = unsharded(jnp.asarray(mask))
    # Inside a trace, jnp would stage the minimum.
    known = not isinstance(mask, Tracer) and mask.is_fully_addressable
    if known and np.asarray(mask).min(initial=0) < 0:
        raise ValueError(
            f"{name} must not be negative, got {np.asarray(mask).min()}; pass ones and "
            "zeros, not the mask that is added to attention scores"
        )
    return mask.astype(bool)


def check_mask(mask: jax.Array | None, n: int) -> jax.Array | None:
    """Checks a mask of samples.

    Args:
      mask: shape ``[n]``, zero for no sample, or None for all samples.
      n: number of rows.

    Returns:
      The mask as booleans, or None.

    Raises:
      ValueError: the shape is wrong, a number is negative, or there are masks for
        several layers.

    Examples:
      >>> check_mask(jnp.array([1.0, 0.0]), 2)
      Array([ True, False], dtype=bool)
    """
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        raise ValueError(
            "mask must be an array [n], one number for each sample, got a mapping; "
            "masks of tokens are an argument of distill_loss, which pools them"
        )
    if jnp.shape(mask) != (n,):
        hint = "pass one number for each sample, zero where there is none"
        if jnp.ndim(mask) == 2:
            hint += "; for tokens of layers [n, t, c] pass {layer: mask [n, t]}"
        raise ValueError(
            f"mask must have shape [n]=[{n}], got {list(jnp.shape(mask))}; {hint}"
        )
    return as_booleans("mask", mask)


def _rows(mask, x):
    """Reshapes a mask to the rank of an array."""
    return mask.reshape(-1, *[1] * (x.ndim - 1))


def zeroed(mask: jax.Array | None, *arrays: jax.Array) -> list[jax.Array]:
    """Sets rows that are not samples to zero.

    Args:
      mask: from `check_mask`, or None.
      *arrays: shape ``[n, ...]`` each.

    Returns:
      The arrays.

    Examples:
      >>> zeroed(jnp.array([True, False]), jnp.array([3.0, jnp.nan]))
      [Array([3., 0.], dtype=float32)]
    """
    if mask is None:
        return list(arrays)
    return [jnp.where(_rows(mask, x), x, jnp.zeros((), x.dtype)) for x in arrays]


def filled(mask: jax.Array | None, *arrays: jax.Array) -> list[jax.Array]:
    """Sets rows that are not samples to the mean of the samples.

    Distances to the mean are no larger than the largest distance to a sample.  Neither
    maxima nor the mean of all rows change, and no digits are lost far from the origin.

    Args:
      mask: from `check_mask`, or None.
      *arrays: features, shape ``[n, d]`` each.

    Returns:
      The arrays; zeros if the mask has no samples.

    Examples:
      >>> filled(jnp.array([True, False]), jnp.array([[3.0], [jnp.nan]]))[0].tolist()
      [[3.0], [3.0]]
    """
    if mask is None:
        return list(arrays)
    return [jnp.where(mask[:, None], x, mean(x, mask)[None, :]) for x in arrays]


def size(mask: jax.Array | None, x: jax.Array) -> jax.Array | int:
    """Counts the samples of an array.

    Args:
      mask: from `check_mask`, or None.
      x: shape ``[n, ...]``.

    Returns:
      The number of samples, at least 1: n without a mask, otherwise a scalar of the
      array's dtype.
    """
    if mask is None:
        return x.shape[0]
    return jnp.maximum(jnp.sum(mask.astype(x.dtype)), 1)


def mean(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Averages an array over samples.

    Args:
      x: shape ``[n, ...]``.
      mask: from `check_mask`, or None.

    Returns:
      Shape ``[...]``; zero if the mask has no samples.

    Examples:
      >>> mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False]))
      Array(2., dtype=float32)
    """
    if mask is None:
        return jnp.mean(x, axis=0)
    return jnp.sum(zeroed(mask, x)[0], axis=0) / size(mask, x)


def pairs(mask: jax.Array) -> jax.Array:
    """Marks the pairs of rows that are both samples.

    Args:
      mask: from `check_mask`.

    Returns:
      Shape ``[n, n]``, True where both rows are samples.
    """
    return mask[:, None] & mask[None, :]


def zero_if_empty(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Sets an array to zero if there are no samples.

    Args:
      x: any array.
      mask: from `check_mask`, or None.

    Returns:
      The array, or zeros of its shape.
    """
    return x if mask is None else jnp.where(jnp.any(mask), x, 0)


def mean_of_pairs(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Averages an array over all pairs of samples.

    Args:
      x: shape ``[n, n]``.
      mask: from `check_mask`, or None.

    Returns:
      Scalar; zero if the mask has no samples.
    """
    if mask is None:
        return jnp.mean(x)
    return jnp.sum(jnp.where(pairs(mask), x, 0)) / size(mask, x) ** 2
