"""Compares Gram matrices without an array of all pairs of samples.

``x x^T - y y^T`` has shape ``[n, n]``. If there are many more samples than features,
its squared norm follows from products ``[d, d]``. The expanded form ``||x^T x||^2 +
||y^T y||^2 - 2 ||x^T y||^2`` would lose its digits for a student that is close to its
teacher: at a relative difference of 1e-3 it is off by 5 % in float32. With the
difference ``D = x - y`` and the sum ``S = x + y``, all products are as small as the
distance:

  x x^T - y y^T = (D S^T + S D^T) / 2

They are not if the student is a rotation of its teacher. Then the error is that of the
expanded form, about 1e-7 of ``||x x^T||^2``.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kddm_jax.numerics.linalg import constant, matmul

ROWS = 512  # arrays [n, n] with more rows are computed in blocks of ROWS // 4 rows


def is_tall(x: jax.Array, y: jax.Array) -> bool:
    """Returns whether the widths are equal and at most half the number of samples.

    Args:
      x: shape ``[n, d_s]``.
      y: shape ``[n, d_t]``.
    """
    return x.shape == y.shape and x.shape[0] >= 2 * x.shape[1]


def squared_gram_norm(x: jax.Array) -> jax.Array:
    """Computes the squared Frobenius norm of ``x x^T``.

    Args:
      x: shape ``[n, d]``.

    Returns:
      Scalar, from the smaller of ``x x^T`` and ``x^T x``.
    """
    small = x if x.shape[0] < x.shape[1] else x.T
    return jnp.sum(matmul(small, small.T) ** 2)


def map_rows(
    of_rows: Callable[..., jax.Array], arrays: Sequence[jax.Array]
) -> jax.Array:
    """Applies a function to blocks of rows.

    Args:
      of_rows: function ``of_rows(*rows)`` of the same r rows of all arrays, with a
        result ``[r, ...]``.
      arrays: each ``[n, d]``.

    Returns:
      The results of all rows, ``[n, ...]``.  The derivative computes each block again
      instead of keeping it.

    Examples:
      >>> map_rows(lambda rows: jnp.sum(rows, axis=1), [jnp.ones((3, 2))])
      Array([2., 2., 2.], dtype=float32)
    """
    n = len(arrays[0])
    if n <= ROWS:
        return of_rows(*arrays)
    of_block = jax.checkpoint(lambda rows: of_rows(*rows))
    found = jax.lax.map(of_block, _blocks(arrays))
    return found.reshape(-1, *found.shape[2:])[:n]


def _blocks(arrays):
    """Returns the arrays as ``[blocks, rows, d]``, with rows of zeros at the end."""
    size = ROWS // 4
    pad = lambda a: jnp.pad(a, ((0, -len(a) % size), (0, 0)))
    return [pad(a).reshape(-1, size, a.shape[1]) for a in arrays]


def sum_over_rows(
    of_rows: Callable[..., jax.Array], arrays: Sequence[jax.Array]
) -> jax.Array:
    """Sums a function of some rows over blocks of rows.

    Args:
      of_rows: function ``of_rows(*rows) -> scalar`` of the same rows of all arrays,
        which is a sum over rows, and zero for rows of zeros.
      arrays: each ``[n, d]``.

    Returns:
      Scalar.  The derivative computes each block again instead of keeping it.

    Examples:
      >>> sum_over_rows(lambda rows: jnp.sum(rows**2), [jnp.ones((3, 2))])
      Array(6., dtype=float32)
    """
    if len(arrays[0]) <= ROWS:
        return of_rows(*arrays)
    of_block = jax.checkpoint(lambda rows: of_rows(*rows))
    return jnp.sum(jax.lax.map(of_block, _blocks(arrays)), axis=0)


def squared_difference(x: jax.Array, y: jax.Array) -> jax.Array:
    r"""Computes the squared distance between two Gram matrices.

    .. math:: \|x x^\top - y y^\top\|_F^2

    Cost: n d² if `is_tall`, and otherwise n² d, in blocks of rows.

    Args:
      x: shape ``[n, d_s]``.
      y: shape ``[n, d_t]``.

    Returns:
      Scalar, not negative.

    Examples:
      >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [1.0]])
      >>> squared_difference(x, y)  # of [[1, 2], [2, 4]] and [[1, 1], [1, 1]]
      Array(11., dtype=float32)
    """
    if is_tall(x, y):
        small, large = x - y, x + y
        cross = matmul(large.T, small)
        squares = matmul(small.T, small) * matmul(large.T, large)
        total = jnp.sum(squares + cross * cross.T) / 2
        # Round-off below zero is removed from the value, but keeps its gradient.
        return total + constant(jnp.maximum(total, 0) - total)
    difference = lambda a, b: jnp.sum((matmul(a, x.T) - matmul(b, y.T)) ** 2)
    return sum_over_rows(difference, (x, y))
