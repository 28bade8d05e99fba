"""Computes distances between the arrangements of the same samples by two networks.

Unlike distances between distributions, these compare the representations sample by
sample.  ``x`` are the student's features ``[n, d_s]`` and ``y`` the teacher's ``[n,
d_t]`` of the same samples.  ``R`` are features that are centred and divided by their
Frobenius norm, and ``K = R R^T`` is their Gram matrix.  All distances except
`paired_l2` allow rotations or linear maps of the student, so the widths may differ.

References:
  Geometry-aware feature alignment for knowledge distillation, 2025 (arXiv
  2509.25253).
"""

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import check_pair
from kddm_jax.numerics.grams import squared_difference, squared_gram_norm
from kddm_jax.numerics.linalg import (
    cross_nuclear_norm,
    matmul,
    normalized,
    squared_rounding,
    unit,
)


def _pair_of(x, y, mask):
    x, y = check_pair(x, y, same_rows=True, same_columns=False)
    mask = masks.check_mask(mask, x.shape[0])
    return *masks.zeroed(mask, x, y), mask


def procrustes(
    x: jax.Array,
    y: jax.Array,
    *,
    unit_norm: bool = True,
    method: str = "auto",
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the squared Procrustes distance between two representations, D_P^2.

    .. math:: \min_{Q^\top Q = I} \|R_x - R_y Q\|_F^2
              = \|R_x\|_F^2 + \|R_y\|_F^2 - 2 \|R_x^\top R_y\|_*

    This is the difference that remains after the best rotation or reflection.  It
    equals the squared Bures distance between the two Gram matrices.  If ``x`` is
    narrower than ``y``, it is padded with zeros.

    Cost: n d² + d³ if d < n, else with n and d exchanged.  Gradient: exact, with a
    custom derivative of the nuclear norm.  Not for: a student that must keep the
    teacher's coordinates (use `paired_l2`) or its scale (use ``unit_norm=False``).

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features of the same samples, shape ``[n, d_t]``.
      unit_norm: True centres the features of both networks and divides them by their
        Frobenius norm; False uses them unchanged.
      method: algorithm of the nuclear norm: ``"svd"``, ``"newton_schulz"``, or
        ``"auto"``, which chooses by platform; see `linalg.nuclear_norm`.
      mask: shape ``[n]``; samples where it is zero are ignored, whatever their features
        contain.  None uses all samples.

    Returns:
      Scalar: squared distance, in [0, 2] with ``unit_norm``.

    Raises:
      ValueError: shapes or dtypes are wrong, or ``method`` is unknown.

    References:
      arXiv 2509.25253, the distance D_P.  Schoenemann, A generalized solution of the
      orthogonal Procrustes problem, 1966.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
      >>> turned = x @ jnp.array([[0.0, 1.0], [-1.0, 0.0]])
      >>> float(abs(procrustes(x, turned))) < 1e-6
      True
      >>> procrustes(x, 3 * turned, unit_norm=False)  # (3 - 1)^2 ||x||^2
      Array(40., dtype=float32)
    """
    x, y, mask = _pair_of(x, y, mask)
    if unit_norm:
        x, y = normalized(x, mask), normalized(y, mask)
    cross = cross_nuclear_norm(x.T, y.T, method=method)
    return jnp.sum(x * x) + jnp.sum(y * y) - 2 * cross


def feature_gram(
    x: jax.Array,
    y: jax.Array,
    *,
    unit_norm: bool = True,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the squared distance between two Gram matrices, D_FG^2.

    .. math:: \|R_x R_x^\top - R_y R_y^\top\|_F^2

    Cost: n² d; n d² if the widths are equal and n >= 2 d.  No array is ``[n, n]`` for
    large n.  Gradient: that of the value.  Not for: small directions of the teacher,
    because squared inner products favour large directions more than `procrustes` does.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features of the same samples, shape ``[n, d_t]``.
      unit_norm: as in `procrustes`.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: squared distance (the paper's D_FG is its root), in [0, 2] with
      ``unit_norm``.

    Raises:
      ValueError: shapes or dtypes are wrong.

    References:
      arXiv 2509.25253, the distance D_FG.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> feature_gram(x, 2 * x, unit_norm=False)  # twice (4 - 1)^2
      Array(18., dtype=float32)
    """
    x, y, mask = _pair_of(x, y, mask)
    if unit_norm:
        x, y = normalized(x, mask), normalized(y, mask)
    return squared_difference(x, y)


def _u_centred(gram, mask):
    """Centres a Gram matrix without its diagonal (Székely and Rizzo).

    Rows and columns of the result sum to zero.
    """
    n = masks.size(mask, gram)
    off = 1 - jnp.eye(gram.shape[0], dtype=gram.dtype)
    if mask is not None:
        # With fewer than four samples only round-off would remain.
        off = jnp.where((n >= 4) & masks.pairs(mask), off, 0)
        n = jnp.maximum(n, 4)
    gram = gram * off
    rows = jnp.sum(gram, axis=1, keepdims=True) / (n - 2)
    total = jnp.sum(gram) / ((n - 1) * (n - 2))
    return off * (gram - rows - rows.T + total)


def cka(
    x: jax.Array,
    y: jax.Array,
    *,
    debiased: bool = False,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes one minus the linear centred kernel alignment, 1 - CKA.

    .. math:: 1 - \frac{\|R_x^\top R_y\|_F^2}{\|R_x^\top R_x\|_F \|R_y^\top R_y\|_F}
              = \frac12 \Big\|\frac{K_x}{\|K_x\|_F} - \frac{K_y}{\|K_y\|_F}\Big\|_F^2

    Cost: n² d.  With ``debiased=True`` it holds arrays ``[n, n]``; otherwise the cost
    is that of `feature_gram`.  Gradient: that of the value.  Not for: small directions
    of the teacher.  The largest directions dominate, so the value may be nearly zero
    for representations of different geometry; `procrustes` and `feature_gram`
    distinguish those.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features of the same samples, shape ``[n, d_t]``.
      debiased: True uses the unbiased estimate of HSIC, for which the alignment of
        independent features is 0 on average.  It needs four samples, and is 0 if a mask
        leaves fewer.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar in [0, 1], or in [0, 2] if debiased; 1/2 if only one side is constant.

    Raises:
      ValueError: shapes or dtypes are wrong, or there are fewer than four samples with
        ``debiased``.

    References:
      Kornblith et al., Similarity of neural network representations revisited, 2019
      (arXiv 1905.00414), section 3.  Song et al., Feature selection via dependence
      maximization, 2012, equation 5, for the debiased form.

    Examples:
      >>> x = jnp.array([[1.0], [-1.0], [1.0], [-1.0]])
      >>> y = jnp.array([[1.0], [1.0], [-1.0], [-1.0]])
      >>> cka(x, y)  # uncorrelated
      Array(1., dtype=float32)
    """
    x, y, mask = _pair_of(x, y, mask)
    n = x.shape[0]
    if debiased and n < 4:
        raise ValueError(
            f"debiased=True needs at least 4 samples, got {n}; use debiased=False"
        )
    x, y = normalized(x, mask), normalized(y, mask)
    if not debiased:
        x, y = _of_unit_gram(x), _of_unit_gram(y)
        return squared_difference(x, y) / 2
    grams = []
    for features in (x, y):
        gram = matmul(features, features.T)
        floor = squared_rounding(gram)
        grams.append(unit(_u_centred(gram, mask), axis=(0, 1), floor=floor))
    return jnp.sum((grams[0] - grams[1]) ** 2) / 2


def _of_unit_gram(x):
    """Scales features so that the norm of ``x x^T`` is 1, unless they are zero."""
    squares = squared_gram_norm(x)
    known = ~(squares <= jnp.finfo(x.dtype).tiny ** 0.5)  # true for NaN
    return jnp.where(known, x, 0) / jnp.where(known, squares, 1) ** 0.25


# At the minimum of mean (x W - y)^2 the residual E = x W - y is orthogonal to x, so a
# change of W has no effect on the derivative: d = 2 mean E * (dx W - dy).
@jax.custom_jvp
def _regression_error(x, y):
    return jnp.mean(_regress(x, y)[0] ** 2)


def _regress(x, y):
    """Computes the residual of the least-squares fit, and the map of minimal norm."""
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    cutoff = max(x.shape) * jnp.finfo(x.dtype).eps * jnp.max(s)
    keep = ~(s <= cutoff)  # NaN stays
    u = jnp.where(keep[None, :], u, 0)
    seen = matmul(u.T, y)
    inverse = jnp.where(keep, 1 / jnp.where(keep, s, 1), 0)
    return matmul(u, seen) - y, matmul(vt.T, inverse[:, None] * seen)


@_regression_error.defjvp
def _regression_error_jvp(primals, tangents):
    residual, weights = _regress(*primals)
    dx, dy = tangents
    moved = matmul(dx, weights) - dy
    return jnp.mean(residual**2), 2 * jnp.mean(residual * moved)


def linear_projection(
    x: jax.Array, y: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    r"""Computes the mean squared error of the best linear map from student to teacher.

    .. math:: \min_W \frac{1}{n d_t} \|X W - Y\|_F^2

    The map is the least-squares fit of the batch, without bias.  Any invertible linear
    map of the student leaves the value unchanged, so it may be zero for representations
    of different geometry.

    Cost: n d².  Gradient: ``2 E W^T / (n d_t)``, with the residual E; a change of the
    map has no effect on it.  Not for: geometry, or batches of fewer samples than
    features.

    Args:
      x: student features, shape ``[n, d_s]`` with ``n > d_s + 1``.
      y: teacher features of the same samples, shape ``[n, d_t]``.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: squared error, averaged over samples and teacher features.

    Raises:
      ValueError: shapes or dtypes are wrong, or there are so few samples that a linear
        map fits any teacher.

    References:
      arXiv 2509.25253, the baseline "LinProj".

    Examples:
      >>> x = jnp.array([[1.0], [-1.0], [2.0]])
      >>> linear_projection(x, jnp.array([[1.0], [1.0], [0.0]]))  # 2 / 3
      Array(0.6667, dtype=float32)
    """
    x, y, mask = _pair_of(x, y, mask)
    n, d = x.shape
    if n <= d + 1:
        raise ValueError(
            f"x has {n} samples of {d} features: a linear map fits any teacher unless "
            "n > d + 1; use a larger batch, or learn the map with "
            "kddm_jax.networks.projectors and distance l2"
        )
    error = _regression_error(x, y)  # averaged over all rows
    return error if mask is None else error * (n / masks.size(mask, x))


def paired_l2(
    x: jax.Array, y: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    r"""Computes the mean squared distance between the paired features of two networks.

    .. math:: \frac1n \sum_i \|x_i - y_i\|^2

    It is the largest distance of the chain ``||mean||^2 <= W2(G, diag) <= W2(G) <= W2
    <= CW2 (weighted) <= paired``, because it compares the features of each sample, and
    the others only compare their distributions.

    Cost: n d.  Gradient: ``2 (x_i - y_i) / n``.  Not for: a student that may arrange
    its features differently from the teacher (`procrustes`), or a student of another
    width (`kddm_jax.networks.projectors`).

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: squared distance, summed over features, averaged over samples.

    Raises:
      ValueError: shapes or dtypes are wrong.

    References:
      Romero et al., FitNets: hints for thin deep nets, 2015 (arXiv 1412.6550),
      equation 3, up to its factor 1/2.

    Examples:
      >>> paired_l2(jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0]]))
      Array(25., dtype=float32)
    """
    x, y = check_pair(x, y, same_rows=True)
    mask = masks.check_mask(mask, x.shape[0])
    x, y = masks.zeroed(mask, x, y)
    return masks.mean(jnp.sum((x - y) ** 2, axis=1), mask)
