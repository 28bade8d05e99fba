"""Averages feature maps over a grid of adaptive cells.

Along a side, cell k covers the positions from ``floor(k size / count)`` up to
``ceil((k + 1) size / count)``, as in PyTorch's adaptive pooling. Maps of any size are
thus reduced to a grid of a given size.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.numerics.linalg import HIGHEST


def adaptive_cells(size: int, count: int) -> np.ndarray:
    """Computes which of ``size`` positions each of ``count`` adaptive cells covers.

    Cell k covers the positions from floor(k size / count) up to, but not including,
    ceil((k + 1) size / count).  Cells overlap if ``count`` does not divide ``size``.

    Args:
      size: number of positions along a side.
      count: number of cells along the side.

    Returns:
      One where a cell covers a position, else zero; float64, shape ``[count, size]``.

    Examples:
      >>> adaptive_cells(3, 2)
      array([[1., 1., 0.],
             [0., 1., 1.]])
    """
    k, position = np.arange(count)[:, None], np.arange(size)[None, :]
    start, stop = k * size // count, -((k + 1) * size // -count)
    return ((position >= start) & (position < stop)).astype(np.float64)


def average_pool(maps: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Averages maps over a grid of adaptive cells.

    Args:
      maps: shape ``[b, h, w, c]``.
      grid: numbers of cells along height and width.

    Returns:
      The averages, shape ``[b, *grid, c]``; the maps themselves if they have the
      grid's size.

    Examples:
      >>> maps = jnp.arange(4.0).reshape(1, 1, 4, 1)
      >>> average_pool(maps, (1, 2))[0, 0, :, 0]
      Array([0.5, 2.5], dtype=float32)
    """
    if maps.shape[1:3] == grid:
        return maps
    average = lambda inside: inside / inside.sum(1, keepdims=True)
    rows, columns = (
        jnp.asarray(average(adaptive_cells(size, count)), maps.dtype)
        for size, count in zip(maps.shape[1:3], grid, strict=True)
    )
    pooled = jnp.einsum("gh,bhwc->bgwc", rows, maps, precision=HIGHEST)
    return jnp.einsum("kw,bgwc->bgkc", columns, pooled, precision=HIGHEST)
