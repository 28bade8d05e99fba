"""Compares Gram matrices without an array of all pairs of samples.

The squared distance of two products ``a x^T`` and ``b y^T`` of shape ``[n, n]`` follows
from products of shape ``[d, d]``, if there are many more samples than features. The
expanded form ``||a x^T||^2 + ||b y^T||^2 - 2 <a x^T, b y^T>`` would lose its digits for
a student that is close to its teacher: at a relative difference of 1e-3 it is off by
5 % in float32. Differences ``A = a - b``, ``D = x - y`` and sums ``B = a + b``,
``S = x + y`` give products that are as small as the distance:

  a x^T - b y^T = (A S^T + B D^T) / 2
"""

import jax
import jax.numpy as jnp

from kddm_jax.numerics.linalg import matmul

ROWS = 512  # of a block


def is_tall(x: jax.Array, y: jax.Array) -> bool:
    """Returns whether there are at least twice as many samples as features.

    Args:
      x: shape ``[n, d_s]``.
      y: shape ``[n, d_t]``; the widths must be equal, too.
    """
    return x.shape == y.shape and x.shape[0] >= 2 * x.shape[1]


def gram_norm(x: jax.Array) -> jax.Array:
    """Computes the squared Frobenius norm of ``x x^T``.

    Args:
      x: shape ``[n, d]``.

    Returns:
      Scalar, from the smaller one of ``x x^T`` and ``x^T x``.
    """
    small = x if x.shape[0] < x.shape[1] else x.T
    return jnp.sum(matmul(small, small.T) ** 2)


def squared_difference(
    a: jax.Array, x: jax.Array, b: jax.Array, y: jax.Array
) -> jax.Array:
    r"""Computes the squared distance between two products.

    .. math:: \|a x^\top - b y^\top\|_F^2

    Cost: n d² if `is_tall`, and otherwise n² d, in blocks of rows.

    Args:
      a: shape ``[n, d_s]``.
      x: shape ``[n, d_s]``.
      b: shape ``[n, d_t]``, close to ``a`` if ``x`` is close to ``y``.
      y: shape ``[n, d_t]``.

    Returns:
      Scalar, not negative.

    Examples:
      >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [1.0]])
      >>> squared_difference(x, x, y, y)  # of [[1, 2], [2, 4]] and [[1, 1], [1, 1]]
      Array(11., dtype=float32)
    """
    if is_tall(x, y):
        small_a, small_x, sum_a, sum_x = a - b, x - y, a + b, x + y
        product = lambda p, q, r, s: jnp.sum(matmul(p.T, q) * matmul(r.T, s))
        total = product(small_a, small_a, sum_x, sum_x)
        total += product(sum_a, sum_a, small_x, small_x)
        total += 2 * product(small_a, sum_a, sum_x, small_x)
        return jnp.maximum(total / 4, 0)

    def of_rows(rows):
        return jnp.sum((matmul(rows[0], x.T) - matmul(rows[1], y.T)) ** 2)

    n = len(x)
    if n <= ROWS:
        return of_rows((a, b))
    more = -n % ROWS  # rows of zeros add nothing
    blocks = [
        jnp.pad(z, ((0, more), (0, 0))).reshape(-1, ROWS, z.shape[1]) for z in (a, b)
    ]
    # The derivative computes a block again instead of keeping it.
    return jnp.sum(jax.lax.map(jax.checkpoint(of_rows), blocks))
