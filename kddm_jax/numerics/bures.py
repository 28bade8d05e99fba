"""Sums the Bures distances between the classes of two centred batches.

The rows X and Y of a class have covariances ``X^T X`` and ``Y^T Y``.  With more samples
than features, QR decompositions leave factors R_x and R_y of shape ``[d, d]``, and the
squared distance is

  min_W ||R_x - W R_y||^2 = ||R_x||^2 + ||R_y||^2 - 2 ||R_x R_y^T||_*

over orthogonal matrices W.  The right side loses its digits for a student that is close
to its teacher: at a relative difference of 1e-2, it is off by 20 % in float32.  On the
left side and in the derivatives, all differences are as small as the distance:

  2 Q_x (R_x - P R_y) for X,  2 Q_y (R_y - P^T R_x) for Y

P is W without the directions in which one side has no variance; see
`linalg.nuclear_norm`.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kddm_jax.numerics.linalg import (
    by_method,
    matmul,
    polar_newton_schulz,
    singular_rounding,
)
from kddm_jax.numerics.varying import call_varying


def _residuals_svd(rx, ry):
    """Returns the distance, ``R_x - P R_y`` and ``R_y - P^T R_x``."""
    u, s, vt = jnp.linalg.svd(matmul(rx, ry.T))
    turn = matmul(u, vt)
    # One step of Newton and Schulz removes most of what the SVD's round-off takes from
    # the orthogonality of W.  At a relative difference of 1e-4, it reduces the error of
    # the value in float32 from 2e-3 to 2e-4.
    turn = 1.5 * turn - 0.5 * matmul(turn, matmul(turn.T, turn))
    moved = matmul(turn, ry)
    rest = rx - moved
    # At the minimum, R_x (W R_y)^T is symmetric.  Its antisymmetric part, computed from
    # the small difference, gives the angles that W still has to turn.  At 1e-4, they
    # reduce the error of the gradient from 1e-2 to 4e-3.
    skew = matmul(rest, moved.T)
    skew = matmul(u.T, matmul(skew - skew.T, u))
    known = s > singular_rounding(s)
    both = known[:, None] & known[None, :]
    angles = jnp.where(both, skew, 0) / jnp.where(both, s[:, None] + s[None, :], 1)
    rest = rest - matmul(u, matmul(angles, matmul(u.T, moved)))
    unknown = jnp.where(known[None, :], 0, u)
    null = matmul(unknown, unknown.T)
    of_x, of_y = rest + matmul(null, moved), matmul(turn.T, matmul(null, rx) - rest)
    return jnp.sum(rest**2), of_x, of_y


def _residuals_newton_schulz(rx, ry):
    """Returns the same by products; P lacks the directions without variance."""
    isometry = polar_newton_schulz(matmul(rx, ry.T)).isometry
    moved = matmul(isometry, ry)
    left = ry - matmul(isometry.T, moved)
    of_x, of_y = rx - moved, ry - matmul(isometry.T, rx)
    return jnp.sum(of_x**2) + jnp.sum(left**2), of_x, of_y


_RESIDUALS = {"svd": _residuals_svd, "newton_schulz": _residuals_newton_schulz}


def _of_class(method, x, y, member):
    """Returns the distance of one class and its derivatives ``[n, d]``."""
    (qx, rx), (qy, ry) = (jnp.linalg.qr(member[:, None] * z) for z in (x, y))
    value, of_x, of_y = by_method(method, _RESIDUALS, rx, ry)
    # Where a class has fewer samples than features, Q has noise in other rows.
    lift = lambda q, residual: 2 * member[:, None] * matmul(q, residual)
    return value, lift(qx, of_x), lift(qy, of_y)


def _gradients(method, x, y, members):
    """Returns the value and the gradients of `class_bures`, class by class."""
    add = lambda total, member: (
        jax.tree.map(jnp.add, total, _of_class(method, x, y, member)),
        None,
    )
    start = jnp.zeros((), x.dtype), jnp.zeros_like(x), jnp.zeros_like(y)
    return jax.lax.scan(add, start, members.T)[0]


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def class_bures(
    x: jax.Array, y: jax.Array, members: jax.Array, method: str
) -> jax.Array:
    r"""Sums the squared Bures distances between the classes of two batches.

    .. math:: \sum_c \min_{W^\top W = I} \|R_{x|c} - W R_{y|c}\|_F^2

    One class is computed after the other, so that no array has axes of samples,
    features and classes.

    Cost: k (n d² + d³).  Gradient: as that of `linalg.nuclear_norm`.

    Args:
      x: features minus the mean of their class, times the root of the sample's weight,
        shape ``[n, d]`` with ``n > d``.
      y: the same of the other side, shape ``[m, d]`` with ``m = n``.
      members: 1 at the class of each sample, else 0, shape ``[n, k]``.
      method: one of `linalg.METHODS`.

    Returns:
      Scalar, not negative.

    Examples:
      >>> x = jnp.array([[-1.0], [1.0], [0.0]])
      >>> class_bures(x, 3 * x, jnp.array([[1.0], [1.0], [0.0]]), "svd")  # 2 (3 - 1)^2
      Array(8., dtype=float32)
    """
    of_class = lambda member: _of_class(method, x, y, member)[0]
    return jnp.sum(jax.lax.map(of_class, members.T))


@class_bures.defjvp
def _class_bures_jvp(method, primals, tangents):
    value, of_x, of_y = call_varying(partial(_gradients, method), *primals)
    return value, jnp.sum(of_x * tangents[0]) + jnp.sum(of_y * tangents[1])
