"""Linear algebra of the distances: nuclear norms, roots, pairwise distances.

Most of the library needs the nuclear norm ``||M||_* = sum_i s_i(M)``: full Gaussian
Wasserstein distances take that of ``Xc Yc^T``, Procrustes distances that of ``X^T Y``.
Its derivative is the partial isometry ``U_r V_r^T`` (Watson, 1992), which exists at
repeated and at zero singular values, where that of an eigen-decomposition does not.

``x`` and ``y`` hold samples in rows, ``[n, d]`` and ``[m, d]``.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import as_float, check_choice

HIGHEST = jax.lax.Precision.HIGHEST


@jax.custom_jvp
def constant(x: jax.Array) -> jax.Array:
    """Returns ``x`` as a constant: its derivative is zero, forward and reverse.

    It is for numbers that a distance computes from data and treats as fixed (epsilon,
    bandwidths, ridges).  Unlike ``jax.lax.stop_gradient``, it works in the numerical
    gradient checks of ``chex``, which replace that function by ones.

    Args:
      x: any array.

    Returns:
      The same array.

    Examples:
      >>> float(jax.grad(lambda x: x * constant(x))(3.0))
      3.0
    """
    return x


@constant.defjvp
def _constant_jvp(primals, tangents):
    return primals[0], jnp.zeros_like(tangents[0])


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies two matrices in full precision.

    Accelerators take TF32 or bfloat16 by default.

    Args:
      a: matrix, shape ``[n, d]``.
      b: matrix, shape ``[d, m]``.

    Returns:
      ``a @ b``, shape ``[n, m]``.
    """
    return jnp.matmul(a, b, precision=HIGHEST)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Computes the square root, with a zero derivative for ``x <= 0``.

    Args:
      x: array of any shape; negative entries count as zero, NaN stays.

    Returns:
      ``sqrt(max(x, 0))``, same shape.

    Examples:
      >>> jax.vmap(jax.grad(safe_sqrt))(jnp.array([0.0, 4.0]))
      Array([0.  , 0.25], dtype=float32)
    """
    # `where` twice: the inner one keeps 0/0 out of the derivative.
    positive = ~(x <= 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def unit(
    x: jax.Array, *, axis: int | tuple[int, ...], floor: jax.Array | float = 0.0
) -> jax.Array:
    """Divides by the norm along axes.

    Where the norm is zero, so are the result and its derivative.

    Args:
      x: array of any shape.
      axis: axes of the norm.
      floor: squared norm up to which ``x`` is round-off and counts as zero.

    Returns:
      ``x / norm``, same shape.

    Examples:
      >>> unit(jnp.array([[3.0, 4.0], [0.0, 0.0]]), axis=1)
      Array([[0.6, 0.8],
             [0. , 0. ]], dtype=float32)
    """
    squares = jnp.sum(x * x, axis=axis, keepdims=True)
    # Below the root of the smallest number, 1 / norm^3 of the derivative overflows.
    known = ~(squares <= floor + jnp.finfo(x.dtype).tiny ** 0.5)  # NaN stays
    return jnp.where(known, x, 0) / jnp.sqrt(jnp.where(known, squares, 1))


def squared_rounding(x: jax.Array) -> jax.Array:
    """Estimates the round-off in the squared norm of centred features.

    Args:
      x: features before they are centred, any shape.

    Returns:
      Scalar, a constant.
    """
    return (10 * jnp.finfo(x.dtype).eps) ** 2 * constant(jnp.sum(x * x))


def normalized(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Centres features and divides them by their Frobenius norm.

    Args:
      x: features, shape ``[n, d]``.
      mask: from `masks.check_mask`, or None.

    Returns:
      Shape ``[n, d]``, of norm 1; zeros if the features are constant up to round-off.

    Examples:
      >>> normalized(jnp.array([[1.0], [3.0]]))
      Array([[-0.7071],
             [ 0.7071]], dtype=float32)
    """
    (x,) = masks.zeroed(mask, x)
    (centred,) = masks.zeroed(mask, x - masks.mean(x, mask)[None, :])
    return unit(centred, axis=(0, 1), floor=squared_rounding(x))


# ---------------------------------------------------------------------------
# Nuclear norms.


class _Polar(NamedTuple):
    """Nuclear norm of M and its partial isometry ``U_r V_r^T``, of the shape of M."""

    norm: jax.Array
    isometry: jax.Array


def _polar_svd(matrix):
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    # Directions of (numerically) zero singular values are arbitrary; keeping them
    # makes half the gradient noise once a few features are dead.  The minimal-norm
    # subgradient drops them.
    cutoff = 10 * jnp.finfo(matrix.dtype).eps * jnp.max(s, axis=-1, keepdims=True)
    u = jnp.where((s > cutoff)[..., None, :], u, 0)
    return _Polar(jnp.sum(s, axis=-1), matmul(u, vt))


def _polar_newton_schulz(matrix, iterations=36):
    # x <- 1.5 x - 0.5 x^3 on the singular values, which fixes 0 and drives ]0, 1]
    # to 1.  A singular value of relative size r needs log(1/r) / log(1.5) steps: 36
    # reach 1e-6, below which float32 has only noise.  Noise has grown to 0.15 by then
    # (a student of rank 3, n = 128), in every direction that the rank is short of: two
    # cubes take it to 1e-6, two steps after each what was near 1 back to it.
    bound = jnp.sqrt(jnp.max(jnp.sum(jnp.abs(matrix), axis=0))) * jnp.sqrt(
        jnp.max(jnp.sum(jnp.abs(matrix), axis=1))
    )  # ||M||_2^2 <= ||M||_1 ||M||_inf
    scale = jnp.where(bound > 0, 1 / jnp.where(bound > 0, bound, 1), 0)
    wide = matrix.shape[0] < matrix.shape[1]
    start = (matrix.T if wide else matrix) * scale

    def body(_, p):
        return 1.5 * p - 0.5 * matmul(p, matmul(p.T, p))

    p = jax.lax.fori_loop(0, iterations, body, start)
    for _ in range(2):
        p = matmul(p, matmul(p.T, p))
        p = jax.lax.fori_loop(0, 2, body, p)
    p = p.T if wide else p
    return _Polar(jnp.sum(p * matrix), p)


def _norm_svd(matrix):
    # Values alone are cheaper than values and vectors.
    return jnp.sum(jnp.linalg.svd(matrix, compute_uv=False), axis=-1)


def _norm_newton_schulz(matrix):
    return _polar_newton_schulz(matrix).norm


class _Method(NamedTuple):
    """Algorithm for a nuclear norm and its derivative.

    Attributes:
      norm: function that computes the norm alone.
      polar: function that computes norm and isometry.
      rows: a factor with more rows than this times its columns is reduced by QR first.
    """

    norm: Callable[[jax.Array], jax.Array]
    polar: Callable[[jax.Array], _Polar]
    rows: int


# Up to n = 2 d products of side n are taken to be cheaper than two QRs of [n, d], whose
# columns follow one another; not measured.
_METHODS: Mapping[str, _Method] = MappingProxyType(
    {
        "svd": _Method(_norm_svd, _polar_svd, 1),
        "newton_schulz": _Method(_norm_newton_schulz, _polar_newton_schulz, 2),
    }
)
METHODS = ("auto", *_METHODS)


# On a GPU an SVD is a call of cuSOLVER: 12 ms for a float64 matrix of side 256 on an
# A100, 82 on an RTX 3060 (github.com/tensor4all/tenferro-rs/issues/1720), many times
# its products' time; on a TPU it is a loop of QR decompositions.
def _by_method(method, fn, *arrays):
    """Calls ``fn(_Method, *arrays)``; "auto" chooses by the platform of the program.

    Outside of jit that is the default backend, wherever the arrays are.
    """
    if method != "auto":
        return fn(_METHODS[method], *arrays)
    exact = partial(fn, _METHODS["svd"])
    if jnp.result_type(*arrays) == jnp.float64:
        return exact(*arrays)
    products = partial(fn, _METHODS["newton_schulz"])
    return jax.lax.platform_dependent(*arrays, cpu=exact, default=products)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _nuclear_norm(matrix, method):
    return _by_method(method, lambda how, matrix: how.norm(matrix), matrix)


@_nuclear_norm.defjvp
def _nuclear_norm_jvp(method, primals, tangents):
    polar = _by_method(method, lambda how, matrix: how.polar(matrix), primals[0])
    return polar.norm, jnp.sum(polar.isometry * tangents[0])


def nuclear_norm(matrix: jax.Array, *, method: str = "auto") -> jax.Array:
    r"""Computes the nuclear norm of a matrix, the sum of its singular values.

    .. math:: \|M\|_* = \sum_i \sigma_i(M),  \quad
              d\|M\|_* = \langle U_r V_r^\top, dM \rangle

    Singular values up to ``10 eps`` times the largest (by products: up to about 1e-6
    times a bound of it) are left out of the derivative: the minimal-norm subgradient.

    Args:
      matrix: shape ``[n, m]``.
      method: ``"svd"``, or ``"newton_schulz"``: 42 iterations of matrix products.  The
        relative error of its gradient is 4e-4 for well-conditioned inputs, also if
        rank-deficient, and 5e-3 for badly scaled ones.  ``"auto"`` takes
        ``"newton_schulz"`` in float32 on accelerators, where an SVD is expected to take
        many times as long (not measured here), and ``"svd"`` elsewhere.

    Returns:
      Scalar.

    Raises:
      ValueError: ``matrix`` is not a matrix, or ``method`` is unknown.

    References:
      Watson, Characterization of the subdifferential of some matrix norms, 1992.

    Examples:
      >>> nuclear_norm(jnp.diag(jnp.array([3.0, -4.0])))
      Array(7., dtype=float32)
    """
    check_choice("method", method, METHODS)
    matrix = as_float("matrix", matrix)
    if matrix.ndim != 2:
        raise ValueError(
            f"matrix must have shape [n, m], got {list(matrix.shape)}; "
            "use jax.vmap for a batch"
        )
    return _nuclear_norm(matrix, method)


# ||X Y^T||_* differentiates to <P, dX Y^T + X dY^T> with P = U_r V_r^T, so
# dX = P Y and dY = P^T X.  With more rows than columns, X = Q_x R_x and
# Y = Q_y R_y reduce the problem to R_x R_y^T = U S V^T of side d, and
# P Y = Q_x (U_r V_r^T) R_y.  The rule sits on the whole product: a QR of features
# with a dead column has no derivative, and none is asked for.
@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _cross_nuclear_norm(x, y, method):
    return _by_method(method, _cross_norm, x, y)


@_cross_nuclear_norm.defjvp
def _cross_nuclear_norm_jvp(method, primals, tangents):
    norm, grad_x, grad_y = _by_method(method, _cross_gradients, *primals)
    dx, dy = tangents
    return norm, jnp.sum(grad_x * dx) + jnp.sum(grad_y * dy)


def _cross_norm(how, x, y):
    (_, rx), (_, ry) = _reduce_rows(x, how.rows), _reduce_rows(y, how.rows)
    return how.norm(matmul(rx, ry.T))


def _cross_gradients(how, x, y):
    (qx, rx), (qy, ry) = _reduce_rows(x, how.rows), _reduce_rows(y, how.rows)
    norm, isometry = how.polar(matmul(rx, ry.T))
    grad_x = _expand_rows(qx, matmul(isometry, ry))
    return norm, grad_x, _expand_rows(qy, matmul(isometry.T, rx))


def _reduce_rows(x, ratio):
    """Returns (Q, R) with Q R = x if x is tall, else (None, x)."""
    n, d = x.shape
    return jnp.linalg.qr(x) if n > ratio * d else (None, x)


def _expand_rows(q, r):
    return r if q is None else matmul(q, r)


def cross_nuclear_norm(
    x: jax.Array, y: jax.Array, *, method: str = "auto"
) -> jax.Array:
    r"""Computes the nuclear norm of a product of two matrices, ``||x y^T||_*``.

    .. math:: \|X Y^\top\|_* = \mathrm{Tr}\,
              \big((S_x^{1/2} S_y S_x^{1/2})^{1/2}\big), \quad
              S_x = X^\top X,\ S_y = Y^\top Y

    It takes one decomposition of side ``min(n, d)`` by ``min(m, d)`` (by products: of
    ``n`` by ``m`` up to ``2 d``).  Its derivative is finite for rank-deficient and dead
    features.

    Args:
      x: shape ``[n, d]``.
      y: shape ``[m, d]``.
      method: as in `nuclear_norm`.

    Returns:
      Scalar.

    Raises:
      ValueError: the widths differ, or ``method`` is unknown.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> cross_nuclear_norm(x, x)  # the trace of x x^T
      Array(5., dtype=float32)
    """
    check_choice("method", method, METHODS)
    x, y = as_float("x", x), as_float("y", y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            "x and y must have shapes [n, d] and [m, d], "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    return _cross_nuclear_norm(x, y, method)


# ---------------------------------------------------------------------------
# Square roots of positive semi-definite matrices.


def _eigh_sqrt(cov):
    values, vectors = jnp.linalg.eigh((cov + cov.T) / 2)
    return jnp.sqrt(jnp.clip(values, 0)), vectors


# R^2 = A gives R dR + dR R = dA.  In the eigenbasis of A, where R = diag(r),
# dR_ij = dA_ij / (r_i + r_j).  A naive derivative through eigh divides by
# a_i - a_j instead, NaN at repeated eigenvalues.  Where r_i + r_j is round-off
# (both eigenvalues zero) the root has no derivative; zero is the limit taken.
@jax.custom_jvp
def sqrtm_psd(cov: jax.Array) -> jax.Array:
    r"""Computes the square root of a positive semi-definite matrix by ``eigh``.

    .. math:: R R = A, \quad R\, dR + dR\, R = dA

    The derivative is finite at repeated and at zero eigenvalues; on the common null
    space it is zero, the minimal-norm limit.

    Args:
      cov: symmetric positive semi-definite matrix, shape ``[d, d]``; it is symmetrised
        first, and negative eigenvalues (round-off) count as zero.

    Returns:
      Symmetric root, shape ``[d, d]``.

    References:
      Higham, Functions of Matrices, 2008, section 6.1.

    Examples:
      >>> sqrtm_psd(jnp.diag(jnp.array([4.0, 9.0])))
      Array([[2., 0.],
             [0., 3.]], dtype=float32)
    """
    roots, vectors = _eigh_sqrt(cov)
    return matmul(vectors * roots[None, :], vectors.T)


@sqrtm_psd.defjvp
def _sqrtm_psd_jvp(primals, tangents):
    (cov,), (dcov,) = primals, tangents
    roots, vectors = _eigh_sqrt(cov)
    root = matmul(vectors * roots[None, :], vectors.T)
    sums = roots[:, None] + roots[None, :]
    # eigenvalues are good to eps * max, so roots to sqrt(eps) * max
    tiny = jnp.sqrt(10 * jnp.finfo(cov.dtype).eps) * jnp.max(roots)
    keep = sums > tiny
    rotated = matmul(vectors.T, matmul((dcov + dcov.T) / 2, vectors))
    solved = jnp.where(keep, rotated, 0) / jnp.where(keep, sums, 1)
    return root, matmul(vectors, matmul(solved, vectors.T))


# ---------------------------------------------------------------------------
# Pairwise distances.


def squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    r"""Computes the squared Euclidean distances between all pairs of samples.

    .. math:: C_{ij} = \|x_i - y_j\|^2

    Both sides are shifted by the mean of ``y`` first, which changes no distance and
    keeps the digits that the expansion loses far from the origin.

    Args:
      x: shape ``[n, d]``.
      y: shape ``[m, d]``.

    Returns:
      Shape ``[n, m]``; elements are not clamped and may be negative by round-off.

    Examples:
      >>> squared_distances(jnp.array([[0.0], [3.0]]), jnp.array([[1.0]]))
      Array([[1.],
             [4.]], dtype=float32)
    """
    shift = constant(jnp.mean(y, axis=0, keepdims=True))
    x, y = x - shift, y - shift
    squares_x = jnp.sum(x * x, axis=1)[:, None]
    squares_y = jnp.sum(y * y, axis=1)[None, :]
    return squares_x + squares_y - 2 * matmul(x, y.T)


def cost_floor(x: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Estimates the round-off of squared distances, the least meaningful epsilon.

    Args:
      x: shape ``[n, d]``.
      y: shape ``[m, d]``.
      mask: from `masks.check_mask`, or None.

    Returns:
      Scalar, in units of the squared distance.
    """
    mean = lambda z: masks.mean(jnp.sum(z * z, axis=1), mask)
    scale = mean(x) + mean(y)
    return jnp.finfo(x.dtype).eps * scale
