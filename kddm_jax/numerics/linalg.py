"""Computes what distances need of linear algebra: nuclear norms, roots, distances.

The most important function is the nuclear norm ``||M||_* = sum_i s_i(M)``, the sum of
the singular values. Gaussian Wasserstein distances with full covariances use the
nuclear norm of ``Xc Yc^T``, Procrustes distances that of ``X^T Y``. Its derivative is
the partial isometry ``U_r V_r^T`` (Watson, 1992). It exists also at repeated and at
zero singular values, where the derivative of an eigendecomposition does not.

The rows of ``x`` ``[n, d]`` and ``y`` ``[m, d]`` are samples.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import as_float, check_choice

Tree = TypeVar("Tree")
HIGHEST = jax.lax.Precision.HIGHEST


@jax.custom_jvp
def constant(x: jax.Array) -> jax.Array:
    """Returns ``x`` as a constant: its derivative is zero in forward and reverse mode.

    Distances use it for numbers that they compute from data and treat as fixed, such as
    epsilon, bandwidths and ridges.  Unlike ``jax.lax.stop_gradient``, it works in the
    numerical gradient checks of ``chex``, which replace ``stop_gradient`` by ones.

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

    By default, accelerators would multiply in TF32 or bfloat16.

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
      x: array of any shape; negative entries count as zero, NaN stays NaN.

    Returns:
      ``sqrt(max(x, 0))``, same shape.

    Examples:
      >>> jax.vmap(jax.grad(safe_sqrt))(jnp.array([0.0, 4.0]))
      Array([0.  , 0.25], dtype=float32)
    """
    # The inner `where` keeps 0/0 out of the derivative.
    positive = ~(x <= 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def unit(
    x: jax.Array, *, axis: int | tuple[int, ...], floor: jax.Array | float = 0.0
) -> jax.Array:
    """Divides an array by its norm along some axes.

    Where the norm is zero, the result and its derivative are zero, too.

    Args:
      x: array of any shape.
      axis: axes along which the norm is computed.
      floor: squared norm up to which ``x`` counts as zero, because it is round-off.

    Returns:
      ``x / norm``, same shape.

    Examples:
      >>> unit(jnp.array([[3.0, 4.0], [0.0, 0.0]]), axis=1)
      Array([[0.6, 0.8],
             [0. , 0. ]], dtype=float32)
    """
    squares = jnp.sum(x * x, axis=axis, keepdims=True)
    # For smaller norms, the factor 1 / norm^3 of the derivative would overflow.
    known = ~(squares <= floor + jnp.finfo(x.dtype).tiny ** 0.5)  # true for NaN
    return jnp.where(known, x, 0) / jnp.sqrt(jnp.where(known, squares, 1))


def squared_rounding(x: jax.Array) -> jax.Array:
    """Estimates the round-off in the squared norm of centred features.

    Args:
      x: features before centring, any shape.

    Returns:
      Scalar, a constant.
    """
    return (10 * jnp.finfo(x.dtype).eps) ** 2 * constant(jnp.sum(x * x))


def normalized(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Centres features and divides them by their Frobenius norm.

    Args:
      x: features, shape ``[n, d]``.
      mask: a mask from `masks.check_mask`, or None.

    Returns:
      The features, shape ``[n, d]``, with norm 1; zeros if the features are constant up
      to round-off.

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
    """Holds the nuclear norm of M, and the partial isometry ``U_r V_r^T``."""

    norm: jax.Array
    isometry: jax.Array


def singular_rounding(s: jax.Array) -> jax.Array:
    """Returns the size up to which singular values ``[..., d]`` count as zero."""
    return 10 * jnp.finfo(s.dtype).eps * jnp.max(s, axis=-1, keepdims=True)


def _polar_svd(matrix):
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    # The singular vectors of (numerically) zero singular values are arbitrary.  If they
    # were kept, half of the gradient would be noise once a few features are dead.  The
    # minimal-norm subgradient leaves them out.
    u = jnp.where((s > singular_rounding(s))[..., None, :], u, 0)
    return _Polar(jnp.sum(s, axis=-1), matmul(u, vt))


def polar_newton_schulz(matrix: jax.Array, iterations: int = 36) -> _Polar:
    """Computes the nuclear norm and the isometry by matrix products; `nuclear_norm`."""
    # Each step maps the singular values by x <- 1.5 x - 0.5 x^3, which keeps 0 and
    # moves values in ]0, 1] towards 1.  A singular value of relative size r needs about
    # log(1/r) / log(1.5) steps: 36 steps suffice for r = 1e-6, below which float32 has
    # only noise.  By then, noise in the directions beyond the rank has grown, too (to
    # 0.15 for a student of rank 3 and n = 128).  Cubing all singular values twice
    # reduces it to 1e-6; two steps after each cube return values near 1 to 1.
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
    # The values alone are cheaper than values and vectors.
    return jnp.sum(jnp.linalg.svd(matrix, compute_uv=False), axis=-1)


def _norm_newton_schulz(matrix):
    return polar_newton_schulz(matrix).norm


class _Method(NamedTuple):
    """Holds an algorithm for the nuclear norm and its derivative.

    Attributes:
      norm: function that computes the norm alone.
      polar: function that computes the norm and the isometry.
      rows: ratio of rows to columns above which a factor is first reduced by QR.
    """

    norm: Callable[[jax.Array], jax.Array]
    polar: Callable[[jax.Array], _Polar]
    rows: int


# Up to n = 2 d, products of [n, n] matrices are assumed to be cheaper than two QR
# decompositions of [n, d], which process one column after the other; not measured.
_METHODS: Mapping[str, _Method] = MappingProxyType(
    {
        "svd": _Method(_norm_svd, _polar_svd, 1),
        "newton_schulz": _Method(_norm_newton_schulz, polar_newton_schulz, 2),
    }
)
METHODS = ("auto", *_METHODS)


# On a GPU an SVD calls cuSOLVER. For a float64 matrix of side 256 it takes 12 ms on an
# A100 and 82 ms on an RTX 3060 (github.com/tensor4all/tenferro-rs/issues/1720), many
# times as long as matrix products. On a TPU it is a loop of QR decompositions.
def by_method(
    method: str, choices: Mapping[str, Callable[..., Tree]], *arrays: jax.Array
) -> Tree:
    """Calls a function of ``choices``; "auto" chooses by the platform of the program.

    Outside jit, this is the default backend, even if the arrays are on another one.

    Args:
      method: one of `METHODS`.
      choices: a function for each method but "auto".
      *arrays: arguments of the function.

    Returns:
      What the function returns.
    """
    if method != "auto":
        return choices[method](*arrays)
    if jnp.result_type(*arrays) == jnp.float64:
        return choices["svd"](*arrays)
    return jax.lax.platform_dependent(
        *arrays, cpu=choices["svd"], default=choices["newton_schulz"]
    )


def _by_method(method, fn, *arrays):
    """Calls ``fn(_Method, *arrays)``."""
    choices = {name: partial(fn, how) for name, how in _METHODS.items()}
    return by_method(method, choices, *arrays)


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

    The derivative is the minimal-norm subgradient: singular values up to ``10 eps``
    times the largest are left out.  With ``"newton_schulz"``, these are values up to
    about 1e-6 times an upper bound of the largest.

    Args:
      matrix: matrix, shape ``[n, m]``.
      method: ``"svd"``, or ``"newton_schulz"``, which takes 42 iterations of matrix
        products.  The relative error of its gradient is 4e-4 for well-conditioned
        inputs, including rank-deficient ones, and 5e-3 for badly scaled ones.
        ``"auto"`` uses ``"newton_schulz"`` in float32 on accelerators, where an SVD is
        expected to take many times as long (not measured), and ``"svd"`` otherwise.

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


# The derivative of ||X Y^T||_* is <P, dX Y^T + X dY^T> with P = U_r V_r^T, so the
# gradients are P Y for X and P^T X for Y.  With more rows than columns, X = Q_x R_x and
# Y = Q_y R_y reduce the problem to R_x R_y^T = U S V^T of side d, and
# P Y = Q_x (U_r V_r^T) R_y.  The derivative rule is defined for the whole product,
# because a QR decomposition of features with a dead column has no derivative.
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
    """Returns (Q, R) with Q R = x if x has many rows, else (None, x)."""
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

    The decomposed matrix has ``min(n, d)`` rows and ``min(m, d)`` columns; with
    ``"newton_schulz"``, sides up to ``2 d`` are not reduced to ``d``.  The derivative
    is finite for rank-deficient and dead features.

    Args:
      x: first matrix, shape ``[n, d]``.
      y: second matrix, shape ``[m, d]``.
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


# R^2 = A gives R dR + dR R = dA.  In the eigenbasis of A, where R = diag(r), this is
# dR_ij = dA_ij / (r_i + r_j).  The derivative through eigh would divide by a_i - a_j
# instead, which gives NaN at repeated eigenvalues.  Where r_i + r_j is round-off (both
# eigenvalues are zero), the root has no derivative, and zero is used.
@jax.custom_jvp
def sqrtm_psd(cov: jax.Array) -> jax.Array:
    r"""Computes the square root of a positive semi-definite matrix by ``eigh``.

    .. math:: R R = A, \quad R\, dR + dR\, R = dA

    The derivative is finite at repeated and at zero eigenvalues.  Between eigenvectors
    of eigenvalue zero it is zero, the minimal-norm limit.

    Args:
      cov: symmetric positive semi-definite matrix, shape ``[d, d]``.  It is symmetrised
        first, and negative eigenvalues (round-off) count as zero.

    Returns:
      The symmetric root, shape ``[d, d]``.

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
    # Eigenvalues have an error of eps * max, so roots have one of sqrt(eps) * max.
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

    The squares are expanded, which loses digits far from the origin.  Both arguments
    are therefore first shifted by the mean of ``y``, which changes no distance.

    Args:
      x: samples, shape ``[n, d]``.
      y: samples, shape ``[m, d]``.

    Returns:
      The squared distances, shape ``[n, m]``.  They are not clamped at zero and may be
      negative by round-off.

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
    """Estimates the round-off of squared distances, the smallest meaningful epsilon.

    Args:
      x: samples, shape ``[n, d]``.
      y: samples, shape ``[m, d]``.
      mask: a mask from `masks.check_mask`, or None.

    Returns:
      Scalar, in units of the squared distance.
    """
    mean = lambda z: masks.mean(jnp.sum(z * z, axis=1), mask)
    scale = mean(x) + mean(y)
    return jnp.finfo(x.dtype).eps * scale
