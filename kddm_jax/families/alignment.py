"""Distances of geometry: do two networks arrange the same images alike?

Unlike distances between distributions they compare representations sample by sample,
and most of them care for inner products only, so that the widths may differ.  ``x``
holds the student's features ``[n, d_s]`` and ``y`` the teacher's ``[n, d_t]`` of the
same images; ``R`` stands for features centred and of unit Frobenius norm, ``K = R
R^T`` for their Gram matrix.  The last two functions compare feature *maps*
``[b, h, w, c]`` of the same images.

References:
  Geometry-aware feature alignment for knowledge distillation, 2025 (arXiv
  2509.25253).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.numerics.checks import as_float, check_choice, check_number, check_pair
from kddm_jax.numerics.linalg import (
    adaptive_cells,
    average_pool,
    constant,
    cross_nuclear_norm,
    matmul,
    squared_distances,
    unit,
)

# ---------------------------------------------------------------------------
# Normalisation.


def _rounding(x):
    """What the squared norm of a difference of entries of ``x`` may be by round-off."""
    return (10 * jnp.finfo(x.dtype).eps) ** 2 * constant(jnp.sum(x * x))


def normalized(x: jax.Array) -> jax.Array:
    """Centres features and divides them by their Frobenius norm.

    Args:
      x: features, shape ``[n, d]``.

    Returns:
      Shape ``[n, d]``, of norm 1; zeros for features that are constant but for
      round-off.

    Examples:
      >>> normalized(jnp.array([[1.0], [3.0]]))
      Array([[-0.7071],
             [ 0.7071]], dtype=float32)
    """
    centred = x - jnp.mean(x, axis=0, keepdims=True)
    return unit(centred, axis=(0, 1), floor=_rounding(x))


def _pair_of(x, y):
    return check_pair(x, y, same_rows=True, same_columns=False)


# ---------------------------------------------------------------------------
# Representations of one batch.


def procrustes(
    x: jax.Array, y: jax.Array, *, normalize: bool = True, method: str = "auto"
) -> jax.Array:
    r"""Computes the squared Procrustes distance, D_P^2.

    .. math:: \min_{Q^\top Q = I} \|R_x - R_y Q\|_F^2
              = \|R_x\|_F^2 + \|R_y\|_F^2 - 2 \|R_x^\top R_y\|_*

    What no rotation removes.  It equals the squared Bures distance of the two Gram
    matrices.  A narrower ``x`` counts as padded with zeros.

    Cost: n d² + d³, in the smaller of n and d.  Gradient: that of the value, by the
    nuclear norm's own rule.  Not for: a student that is to keep the teacher's
    coordinates, or its scale unless ``normalize=False``: `paired_l2`.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features of the same samples, shape ``[n, d_t]``.
      normalize: whether to centre both and to divide them by their Frobenius norm;
        False takes them as they are.
      method: of the nuclear norm, ``"svd"``, ``"newton_schulz"`` or ``"auto"``, by
        platform; see `linalg.nuclear_norm`.

    Returns:
      Scalar, squared distance; in [0, 2] if normalised.

    Raises:
      ValueError: shapes or dtypes, unknown ``method``.

    References:
      arXiv 2509.25253, the distance D_P.  Schoenemann, A generalized solution of the
      orthogonal Procrustes problem, 1966.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
      >>> turned = x @ jnp.array([[0.0, 1.0], [-1.0, 0.0]])
      >>> float(abs(procrustes(x, turned))) < 1e-6
      True
      >>> procrustes(x, 3 * turned, normalize=False)  # (3 - 1)^2 ||x||^2
      Array(40., dtype=float32)
    """
    x, y = _pair_of(x, y)
    if normalize:
        x, y = normalized(x), normalized(y)
    cross = cross_nuclear_norm(x.T, y.T, method=method)
    return jnp.sum(x * x) + jnp.sum(y * y) - 2 * cross


def feature_gram(x: jax.Array, y: jax.Array, *, normalize: bool = True) -> jax.Array:
    r"""Computes the squared distance of the Gram matrices, D_FG^2.

    .. math:: \|R_x R_x^\top - R_y R_y^\top\|_F^2

    Cost: n² d.  Gradient: that of the value.  Not for: small directions of the
    teacher, since squared inner products favour large ones more than `procrustes` does.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features of the same samples, shape ``[n, d_t]``.
      normalize: as in `procrustes`.

    Returns:
      Scalar, squared (the paper's D_FG is its root); in [0, 2] if normalised.

    Raises:
      ValueError: shapes or dtypes.

    References:
      arXiv 2509.25253, the distance D_FG.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> feature_gram(x, 2 * x, normalize=False)  # twice (4 - 1)^2
      Array(18., dtype=float32)
    """
    x, y = _pair_of(x, y)
    if normalize:
        x, y = normalized(x), normalized(y)
    return jnp.sum((matmul(x, x.T) - matmul(y, y.T)) ** 2)


def _u_centred(gram):
    """Rows and columns of sum zero, the diagonal left out (Székely and Rizzo)."""
    n = gram.shape[0]
    off = 1 - jnp.eye(n, dtype=gram.dtype)
    gram = gram * off
    rows = jnp.sum(gram, axis=1, keepdims=True) / (n - 2)
    total = jnp.sum(gram) / ((n - 1) * (n - 2))
    return off * (gram - rows - rows.T + total)


def cka(x: jax.Array, y: jax.Array, *, debiased: bool = False) -> jax.Array:
    r"""Computes one minus the linear centred kernel alignment, 1 - CKA.

    .. math:: 1 - \frac{\|R_x^\top R_y\|_F^2}{\|R_x^\top R_x\|_F \|R_y^\top R_y\|_F}
              = \frac12 \Big\|\frac{K_x}{\|K_x\|_F} - \frac{K_y}{\|K_y\|_F}\Big\|_F^2

    Cost: n² d.  Gradient: that of the value.  Not for: small directions of the teacher:
    it may be nearly zero for clouds of different geometry (their largest directions
    decide); `procrustes` and `feature_gram` tell those apart.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features of the same samples, shape ``[n, d_t]``.
      debiased: whether to take the unbiased estimate of HSIC, whose alignment of
        independent features is 0 on average; needs four samples.

    Returns:
      Scalar in [0, 1], in [0, 2] if debiased; 1/2 if one side alone is constant.

    Raises:
      ValueError: shapes or dtypes, fewer than four samples for ``debiased``.

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
    x, y = _pair_of(x, y)
    n = x.shape[0]
    if debiased and n < 4:
        raise ValueError(
            f"debiased=True needs at least 4 samples, got {n}; use debiased=False"
        )
    grams = []
    for features in (normalized(x), normalized(y)):
        gram = matmul(features, features.T)
        if debiased:
            gram = unit(_u_centred(gram), axis=(0, 1), floor=_rounding(gram))
        else:
            gram = unit(gram, axis=(0, 1))
        grams.append(gram)
    return jnp.sum((grams[0] - grams[1]) ** 2) / 2


# min_W mean (x W - y)^2 has the residual E = x W - y, orthogonal to x, so that W's own
# change has no part in the derivative: d = 2 mean E * (dx W - dy).
@jax.custom_jvp
def _regression_error(x, y):
    return jnp.mean(_regress(x, y)[0] ** 2)


def _regress(x, y):
    """The residual of the least-squares fit and its map, of minimal norm."""
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


def linear_projection(x: jax.Array, y: jax.Array) -> jax.Array:
    r"""Computes the mean squared error of the best linear map to the teacher.

    .. math:: \min_W \frac{1}{n d_t} \|X W - Y\|_F^2

    The map is the batch's own least-squares fit, without bias.  An invertible map of
    the student changes nothing: the value may be zero where the geometry differs.

    Cost: n d².  Gradient: ``2 E W^T / (n d_t)``, E the residual: the map's own change
    has no part in it.  Not for: geometry, or batches of fewer samples than features.

    Args:
      x: student features, shape ``[n, d_s]`` with ``n > d_s + 1``.
      y: teacher features of the same samples, shape ``[n, d_t]``.

    Returns:
      Scalar, squared error, averaged over samples and teacher features.

    Raises:
      ValueError: shapes or dtypes, or too few samples: then a linear map fits
        whatever teacher.

    References:
      arXiv 2509.25253, the baseline "LinProj".

    Examples:
      >>> x = jnp.array([[1.0], [-1.0], [2.0]])
      >>> linear_projection(x, jnp.array([[1.0], [1.0], [0.0]]))  # 2 / 3
      Array(0.6667, dtype=float32)
    """
    x, y = _pair_of(x, y)
    n, d = x.shape
    if n <= d + 1:
        raise ValueError(
            f"x has {n} samples of {d} features: a linear map fits any teacher unless "
            "n > d + 1; raise the batch size, or learn the map with "
            "kddm_jax.projectors and distance l2"
        )
    return _regression_error(x, y)


def similarity_preserving(x: jax.Array, y: jax.Array) -> jax.Array:
    r"""Computes the similarity-preserving loss.

    .. math:: \frac{1}{n^2} \|G_x - G_y\|_F^2, \quad
              G = X X^\top \text{ with rows of unit norm}

    Neither side is centred.

    Cost: n² d.  Gradient: that of the value.  Not for: features far from the origin
    (large means after a ReLU), all of whose inner products look alike.

    Args:
      x: student features, shape ``[n, d_s]``.
      y: teacher features of the same samples, shape ``[n, d_t]``.

    Returns:
      Scalar, squared, averaged over pairs of samples; at most ``4 / n``.

    Raises:
      ValueError: shapes or dtypes.

    References:
      Tung and Mori, Similarity-preserving knowledge distillation, 2019 (arXiv
      1907.09682), equations 2 to 4.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])  # rows (1, 0) and (0, 1)
      >>> y = jnp.array([[1.0], [1.0]])  # rows (1, 1) / sqrt 2, twice
      >>> similarity_preserving(x, y)  # 1 - 1 / sqrt 2
      Array(0.2929, dtype=float32)
    """
    x, y = _pair_of(x, y)
    # A common factor of all features cancels; taken out, no square overflows.
    x, y = unit(x, axis=(0, 1)), unit(y, axis=(0, 1))
    gram_x, gram_y = (unit(matmul(z, z.T), axis=1) for z in (x, y))
    return jnp.mean((gram_x - gram_y) ** 2)


# ---------------------------------------------------------------------------
# Feature maps.


def _check_maps(maps_x, maps_y, *, same_channels):
    """Casts both to one float dtype; ranks, images and channels are checked."""
    pair = {"maps_x": maps_x, "maps_y": maps_y}
    pair = {name: as_float(name, maps) for name, maps in pair.items()}
    for name, maps in pair.items():
        if maps.ndim != 4 or 0 in maps.shape:
            raise ValueError(
                f"{name} must have shape [images, height, width, channels], got "
                f"{list(maps.shape)}; choose a map of the network, with layers=(...)"
            )
    maps_x, maps_y = pair.values()
    if maps_x.shape[0] != maps_y.shape[0]:
        raise ValueError(
            "maps_x and maps_y must hold the same images, got "
            f"{maps_x.shape[0]} and {maps_y.shape[0]}; pass both networks the same "
            "batch"
        )
    if same_channels and maps_x.shape[3] != maps_y.shape[3]:
        raise ValueError(
            "maps_x and maps_y must have the same number of channels, got "
            f"{maps_x.shape[3]} and {maps_y.shape[3]}; map the student to the "
            "teacher's with kddm_jax.projectors"
        )
    dtype = jnp.promote_types(maps_x.dtype, maps_y.dtype)
    return maps_x.astype(dtype), maps_y.astype(dtype)


# Kernels of one image: its channels are the samples, [h w, c] with columns of norm 1.
def _poly_nst(x, y):
    """Kernel (u^T v)^2: its mean over pairs is that of products of second moments."""
    positions, channels = x.shape[0], max(x.shape[1], y.shape[1])
    if positions <= channels:
        moment = lambda z: matmul(z, z.T) / z.shape[1]
        return jnp.sum((moment(x) - moment(y)) ** 2)
    gram = lambda a, b: jnp.mean(matmul(a.T, b) ** 2)
    return gram(x, x) + gram(y, y) - 2 * gram(x, y)


def _linear_nst(x, y):
    """Kernel u^T v."""
    return jnp.sum((jnp.mean(x, axis=1) - jnp.mean(y, axis=1)) ** 2)


def _rbf_nst(x, y):
    """Kernel exp(-r^2 / 2 sigma^2), sigma^2 the mean r^2 of all pairs, a constant."""
    pairs = ((x, x), (y, y), (x, y))
    squares = [jnp.maximum(squared_distances(a.T, b.T), 0) for a, b in pairs]
    mean = sum(jnp.sum(s) for s in squares) / sum(s.size for s in squares)
    # of channels of norm 1, so that this is far below any that differ
    variance = constant(jnp.maximum(mean, 100 * jnp.finfo(x.dtype).eps))
    within_x, within_y, between = (
        jnp.mean(jnp.exp(-s / (2 * variance))) for s in squares
    )
    return within_x + within_y - 2 * between


NST_KERNELS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = (
    MappingProxyType({"poly": _poly_nst, "linear": _linear_nst, "rbf": _rbf_nst})
)


def nst(maps_x: jax.Array, maps_y: jax.Array, *, kernel: str = "poly") -> jax.Array:
    r"""Computes the neuron selectivity transfer: a discrepancy between channels.

    .. math:: \frac1b \sum_i \overline{k(f, f')} + \overline{k(g, g')}
              - 2\,\overline{k(f, g)}, \quad k(f, g) = (f^\top g)^2

    ``f`` are the student's channels of image i, ``g`` the teacher's, as vectors over
    space of norm 1: where a channel looks, not how strongly.  Numbers of channels
    may differ; the larger map is averaged down to the smaller one's size.

    Cost: n h w c min(h w, c).  Gradient: that of the value, the rbf bandwidth being
    constant.  Not for: pooled features: in a map of one pixel every channel has norm 1.

    Args:
      maps_x: student maps, shape ``[b, h, w, c]``.
      maps_y: teacher maps of the same images, shape ``[b, h', w', c']``.
      kernel: ``"poly"``, the squared inner product; ``"linear"``; ``"rbf"``, its
        squared bandwidth the mean squared distance of all pairs, a constant.

    Returns:
      Scalar, squared discrepancy, averaged over images (no factor 1/2).

    Raises:
      ValueError: shapes, dtypes, unknown kernel.

    References:
      Huang and Wang, Like what you like: knowledge distill via neuron selectivity
      transfer, 2017 (arXiv 1707.01219), equation 4.

    Examples:
      >>> left, right = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])  # 1 x 2 pixels
      >>> nst(left.reshape(1, 1, 2, 1), right.reshape(1, 1, 2, 1))
      Array(2., dtype=float32)
    """
    check_choice("kernel", kernel, NST_KERNELS)
    maps_x, maps_y = _check_maps(maps_x, maps_y, same_channels=False)
    size = tuple(np.minimum(maps_x.shape[1:3], maps_y.shape[1:3]).tolist())
    channels = []
    for maps in (maps_x, maps_y):
        pooled = average_pool(maps, size)
        flat = pooled.reshape(maps.shape[0], -1, maps.shape[3])  # [b, h w, c]
        channels.append(unit(flat, axis=1))
    return jnp.mean(jax.vmap(NST_KERNELS[kernel])(*channels))


def _cell_moments(maps, grid):
    """Mean and unbiased variance of every cell and channel, ``[b, g, g, c]``."""
    # The variance does not see this shift, but its round-off does.
    shift = constant(jnp.mean(maps, axis=(1, 2), keepdims=True))
    shifted = maps - shift
    mean, square = (average_pool(z, (grid, grid)) for z in (shifted, shifted**2))
    pixels = [adaptive_cells(size, grid).sum(1) for size in maps.shape[1:3]]
    count = np.multiply.outer(*pixels)  # [g, g]
    # A cell of one pixel has no variance: 0, not 0 / 0.
    unbiased = jnp.asarray(count / np.maximum(count - 1, 1), maps.dtype)
    spread = jnp.maximum(square - mean**2, 0) * unbiased[None, :, :, None]
    return mean + shift, spread


def wkd_features(
    maps_x: jax.Array, maps_y: jax.Array, *, grid: int = 1, ratio: float = 2.0
) -> jax.Array:
    r"""Computes the Wasserstein distance of feature maps, WKD-F.

    .. math:: \frac{1}{b g^2} \sum_{i, cells, channels}
              \rho\,(\mu_x - \mu_y)^2 + (\sigma_x - \sigma_y)^2

    Every image's cell is a diagonal Gaussian over its pixels, with
    ``sigma = sqrt(variance + 1e-5)`` and the unbiased variance (0 in a cell of one
    pixel).

    Cost: n h w c.  Gradient: that of the value.  Not for: maps whose channels do not
    correspond, since each is compared with its namesake: learn a projector.

    Args:
      maps_x: student maps, shape ``[b, h, w, c]``.
      maps_y: teacher maps of the same images, shape ``[b, h', w', c]``.
      grid: cells along each side, g; where it does not divide the map's side, cells
        overlap as in adaptive pooling.
      ratio: weight of the means, rho.

    Returns:
      Scalar, squared distance, summed over channels, averaged over images and cells.

    Raises:
      ValueError: shapes, dtypes, ``grid < 1``, a negative ratio.

    References:
      Lv, Yang and Li, Wasserstein distance rivals Kullback-Leibler divergence for
      knowledge distillation, 2024 (arXiv 2412.08139), section 3.2.

    Examples:
      >>> maps = jnp.zeros((1, 2, 2, 1))
      >>> wkd_features(maps, maps + 3.0)  # 2 (3 - 0)^2
      Array(18., dtype=float32)
    """
    maps_x, maps_y = _check_maps(maps_x, maps_y, same_channels=True)
    check_number("ratio", ratio, positive=False)
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    (mean_x, spread_x), (mean_y, spread_y) = (
        _cell_moments(maps, grid) for maps in (maps_x, maps_y)
    )
    sigma_x, sigma_y = jnp.sqrt(spread_x + 1e-5), jnp.sqrt(spread_y + 1e-5)
    total = ratio * (mean_x - mean_y) ** 2 + (sigma_x - sigma_y) ** 2
    return jnp.mean(jnp.sum(total, axis=3))
