"""Turns maps and tokens, which have positions, into features ``[n, d]``.

``"pool"`` averages a layer over its positions, so that an image stays one sample.
``"each"`` makes every position a sample; the positions of student and teacher must then
correspond.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kddm_jax.numerics.checks import as_float
from kddm_jax.numerics.pooling import average_pool

POSITIONS = ("pool", "each")


def _grids_alike(pair):
    """Pools maps to the smaller grid along each side; tokens must already match."""
    if all(array.ndim == 4 for array in pair):
        grid = tuple(
            min(sides) for sides in zip(*(a.shape[1:3] for a in pair), strict=True)
        )
        pair = [average_pool(as_float("maps", array), grid) for array in pair]
    if pair[0].shape[1:-1] != pair[1].shape[1:-1]:
        raise ValueError(
            "positions of student and teacher must correspond, got "
            f"{list(pair[0].shape)} and {list(pair[1].shape)}; give both as "
            '[n, h, w, c], or use positions="pool"'
        )
    return pair


def as_matrices(
    pair: Sequence[jax.Array], labels: jax.Array, positions: str
) -> tuple[list[jax.Array], jax.Array]:
    """Turns two layers of any rank into features.

    Args:
      pair: student's and teacher's layer: features ``[n, d]``, tokens ``[n, t, c]`` or
        maps ``[n, h, w, c]``.
      labels: shape ``[n]``.
      positions: a key of `POSITIONS`.

    Returns:
      Features of both sides, shape ``[m, c]`` each, and the labels ``[m]``.

    Raises:
      ValueError: positions of the two sides do not correspond.

    Examples:
      >>> maps, labels = jnp.ones((2, 3, 3, 5)), jnp.array([0, 1])
      >>> (x, y), labels = as_matrices([maps, maps], labels, "each")
      >>> x.shape, labels.shape
      ((18, 5), (18,))
    """
    if all(array.ndim <= 2 for array in pair):
        return list(pair), labels
    if positions == "pool":
        average = lambda a: jnp.mean(a, axis=tuple(range(1, a.ndim - 1)))
        return [
            a if a.ndim == 2 else average(as_float("maps", a)) for a in pair
        ], labels
    pair = _grids_alike(pair)
    flat = [array.reshape(-1, array.shape[-1]) for array in pair]
    return flat, jnp.repeat(labels, len(flat[0]) // len(labels))
