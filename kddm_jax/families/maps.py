"""Computes distances between the feature maps of two networks, image by image.

``maps_x`` are the student's maps ``[b, h, w, c]`` and ``maps_y`` the teacher's ``[b,
h', w', c']`` of the same images.  Both distances average over images.  Those of
attention maps are in `families.attention`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import as_float, check_choice, check_count, check_number
from kddm_jax.numerics.linalg import constant, matmul, squared_distances, unit
from kddm_jax.numerics.pooling import adaptive_cells, average_pool


def check_maps(
    maps_x: jax.Array, maps_y: jax.Array, *, same_channels: bool
) -> tuple[jax.Array, jax.Array]:
    """Checks ranks, images and channels of two maps and casts them to one dtype.

    Args:
      maps_x: student maps, shape ``[b, h, w, c]``.
      maps_y: teacher maps of the same images, shape ``[b, h', w', c']``.
      same_channels: True if ``c`` must equal ``c'``.

    Returns:
      Both maps, as float32 or float64.

    Raises:
      ValueError: an array has a wrong rank, dtype or shape.
    """
    pair = {"maps_x": maps_x, "maps_y": maps_y}
    pair = {name: as_float(name, maps) for name, maps in pair.items()}
    for name, maps in pair.items():
        if maps.ndim != 4 or 0 in maps.shape:
            raise ValueError(
                f"{name} must have shape [images, height, width, channels], got "
                f"{list(maps.shape)}; choose a layer that gives maps, with layers=(...)"
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
            "teacher's with kddm_jax.networks.projectors"
        )
    dtype = np.promote_types(maps_x.dtype, maps_y.dtype)
    return maps_x.astype(dtype), maps_y.astype(dtype)


def same_grid(maps_x: jax.Array, maps_y: jax.Array) -> list[jax.Array]:
    """Averages the larger map, along each side, down to the size of the smaller one.

    Args:
      maps_x: student maps, shape ``[b, h, w, c]``.
      maps_y: teacher maps, shape ``[b, h', w', c']``.

    Returns:
      Both maps, shapes ``[b, g, g', c]`` and ``[b, g, g', c']``.
    """
    size = tuple(np.minimum(maps_x.shape[1:3], maps_y.shape[1:3]).tolist())
    return [average_pool(maps, size) for maps in (maps_x, maps_y)]


# Discrepancies of one image, [h w, c]; the samples are channels, columns of norm 1.
def _poly_nst(x, y):
    """Computes the discrepancy for the kernel (u^T v)^2.

    With few positions it is computed from second moments, which costs less.
    """
    positions, channels = x.shape[0], max(x.shape[1], y.shape[1])
    if positions <= channels:
        moment = lambda z: matmul(z, z.T) / z.shape[1]
        return jnp.sum((moment(x) - moment(y)) ** 2)
    gram = lambda a, b: jnp.mean(matmul(a.T, b) ** 2)
    return gram(x, x) + gram(y, y) - 2 * gram(x, y)


def _linear_nst(x, y):
    """Computes the discrepancy for the kernel u^T v."""
    return jnp.sum((jnp.mean(x, axis=1) - jnp.mean(y, axis=1)) ** 2)


def _rbf_nst(x, y):
    """Computes the discrepancy for the kernel exp(-r^2 / 2 sigma^2).

    sigma^2 is the mean of r^2 over all pairs, a constant.
    """
    pairs = ((x, x), (y, y), (x, y))
    squares = [jnp.maximum(squared_distances(a.T, b.T), 0) for a, b in pairs]
    mean = sum(jnp.sum(s) for s in squares) / sum(s.size for s in squares)
    # Channels have norm 1, so this floor is far below the square of any difference.
    variance = constant(jnp.maximum(mean, 100 * jnp.finfo(x.dtype).eps))
    within_x, within_y, between = (
        jnp.mean(jnp.exp(-s / (2 * variance))) for s in squares
    )
    return within_x + within_y - 2 * between


NST_KERNELS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = (
    MappingProxyType({"poly": _poly_nst, "linear": _linear_nst, "rbf": _rbf_nst})
)


def nst(
    maps_x: jax.Array,
    maps_y: jax.Array,
    *,
    kernel: str = "poly",
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the neuron selectivity transfer loss between the channels of two maps.

    .. math:: \frac1b \sum_i \overline{k(f, f')} + \overline{k(g, g')}
              - 2\,\overline{k(f, g)}, \quad k(f, g) = (f^\top g)^2

    ``f`` are the student's channels of image i, ``g`` the teacher's, as vectors of norm
    1 over positions, so that only the places of activations count, not their strength.
    The numbers of channels may differ; the larger map is averaged down to the size of
    the smaller one.

    Cost: n h w c min(h w, c).  Gradient: that of the value; the rbf bandwidth is a
    constant.  Not for: pooled features, because in a map of one pixel every channel has
    norm 1.

    Args:
      maps_x: student maps, shape ``[b, h, w, c]``.
      maps_y: teacher maps of the same images, shape ``[b, h', w', c']``.
      kernel: ``"poly"``, the squared inner product; ``"linear"``; or ``"rbf"``, with
        the mean squared distance of all pairs as squared bandwidth, a constant.
      mask: shape ``[b]``; images whose mask is zero are ignored, whatever their values.
        None uses all images.

    Returns:
      Scalar: squared discrepancy, averaged over images (without a factor 1/2).

    Raises:
      ValueError: shapes or dtypes are wrong, or the kernel is unknown.

    References:
      Huang and Wang, Like what you like: knowledge distill via neuron selectivity
      transfer, 2017 (arXiv 1707.01219), equation 4.

    Examples:
      >>> left, right = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])  # 1 x 2 pixels
      >>> nst(left.reshape(1, 1, 2, 1), right.reshape(1, 1, 2, 1))
      Array(2., dtype=float32)
    """
    check_choice("kernel", kernel, NST_KERNELS)
    maps_x, maps_y = check_maps(maps_x, maps_y, same_channels=False)
    mask = masks.check_mask(mask, maps_x.shape[0])
    maps_x, maps_y = masks.zeroed(mask, maps_x, maps_y)
    channels = []
    for maps in same_grid(maps_x, maps_y):
        flat = maps.reshape(maps.shape[0], -1, maps.shape[3])  # [b, h w, c]
        channels.append(unit(flat, axis=1))
    return masks.mean(jax.vmap(NST_KERNELS[kernel])(*channels), mask)


def _cell_moments(maps, grid):
    """Computes the mean and unbiased variance of each cell and channel.

    Both have shape ``[b, g, g, c]``.
    """
    # The shift leaves the variance unchanged and reduces its round-off.
    shift = constant(jnp.mean(maps, axis=(1, 2), keepdims=True))
    shifted = maps - shift
    mean, square = (average_pool(z, (grid, grid)) for z in (shifted, shifted**2))
    pixels = [adaptive_cells(size, grid).sum(1) for size in maps.shape[1:3]]
    count = np.multiply.outer(*pixels)  # [g, g]
    # A cell of one pixel gets variance 0 rather than 0 / 0.
    unbiased = jnp.asarray(count / np.maximum(count - 1, 1), maps.dtype)
    spread = jnp.maximum(square - mean**2, 0) * unbiased[None, :, :, None]
    return mean + shift, spread


def wkd_features(
    maps_x: jax.Array,
    maps_y: jax.Array,
    *,
    grid: int = 1,
    ratio: float = 2.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the Wasserstein distance between feature maps, WKD-F.

    .. math:: \frac{1}{b g^2} \sum_{i, cells, channels}
              \rho\,(\mu_x - \mu_y)^2 + (\sigma_x - \sigma_y)^2

    Each cell of an image is fitted by a diagonal Gaussian over its pixels, with
    ``sigma = sqrt(variance + 1e-5)`` and the unbiased variance (0 in a cell of one
    pixel).

    Cost: n h w c.  Gradient: that of the value.  Not for: maps whose channels do not
    correspond, because each channel is compared with the channel of the same index;
    learn a projector.

    Args:
      maps_x: student maps, shape ``[b, h, w, c]``.
      maps_y: teacher maps of the same images, shape ``[b, h', w', c']``.
      grid: number of cells along each side, g; if it does not divide the map's side,
        cells overlap as in adaptive pooling.
      ratio: weight of the means, rho.
      mask: shape ``[b]``; images whose mask is zero are ignored, whatever their values.
        None uses all images.

    Returns:
      Scalar: squared distance, summed over channels, averaged over images and cells.

    Raises:
      ValueError: shapes or dtypes are wrong, ``grid < 1``, or the ratio is negative.

    References:
      Lv, Yang and Li, Wasserstein distance rivals Kullback-Leibler divergence for
      knowledge distillation, 2024 (arXiv 2412.08139), section 3.2.

    Examples:
      >>> maps = jnp.zeros((1, 2, 2, 1))
      >>> wkd_features(maps, maps + 3.0)  # 2 (3 - 0)^2
      Array(18., dtype=float32)
    """
    maps_x, maps_y = check_maps(maps_x, maps_y, same_channels=True)
    mask = masks.check_mask(mask, maps_x.shape[0])
    maps_x, maps_y = masks.zeroed(mask, maps_x, maps_y)
    check_number("ratio", ratio, positive=False)
    check_count("grid", grid)
    (mean_x, spread_x), (mean_y, spread_y) = (
        _cell_moments(maps, grid) for maps in (maps_x, maps_y)
    )
    sigma_x, sigma_y = jnp.sqrt(spread_x + 1e-5), jnp.sqrt(spread_y + 1e-5)
    total = ratio * (mean_x - mean_y) ** 2 + (sigma_x - sigma_y) ** 2
    total = jnp.sum(total, axis=3)  # [b, g, g]
    return jnp.mean(total) if mask is None else jnp.mean(masks.mean(total, mask))
