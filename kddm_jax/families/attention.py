"""Computes distances between the attention maps of two networks, image by image.

The attention map of an image is the mean over channels of powers of its feature map's
absolute values, ``[h, w]``, divided by its norm.  It says where the network responds,
whatever the number of channels.  ``maps_x`` are the student's maps ``[b, h, w, c]`` and
``maps_y`` the teacher's ``[b, h', w', c']`` of the same images.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.families.maps import check_maps, same_grid
from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import as_released, check_count
from kddm_jax.numerics.linalg import HIGHEST, constant, safe_sqrt, unit


def _energies(maps_x, maps_y, power, mask):
    """Computes the means of powers over channels on a common grid, ``[b, h, w]`` each.

    Maps are divided by their largest absolute value, a constant, because a factor of an
    image changes nothing, and powers of large or small values are not representable.
    """
    maps_x, maps_y = check_maps(maps_x, maps_y, same_channels=False)
    mask = masks.check_mask(mask, maps_x.shape[0])
    energies = []
    for maps in same_grid(*masks.zeroed(mask, maps_x, maps_y)):
        peak = constant(jnp.max(jnp.abs(maps), axis=(1, 2, 3), keepdims=True))
        size = jnp.abs(maps / jnp.where(peak == 0, 1, peak))
        energies.append(jnp.mean(size**power, axis=3))
    return energies, mask


def attention_transfer(
    maps_x: jax.Array,
    maps_y: jax.Array,
    *,
    power: int = 2,
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the squared distance between the attention maps of two networks.

    .. math:: \frac1b \sum_i \Big\| \frac{a(x_i)}{\|a(x_i)\|}
              - \frac{a(y_i)}{\|a(y_i)\|} \Big\|^2, \quad
              a(f)_{hw} = \frac1c \sum_k |f_{hwk}|^p

    The numbers of channels may differ; the larger map is averaged down to the size of
    the smaller one.  A map of zeros has no attention: its normalized map is zero.

    Cost: n h w c.  Gradient: that of the value.  Not for: pooled features, because a
    map of one pixel has the attention 1.

    Args:
      maps_x: student maps, shape ``[b, h, w, c]``.
      maps_y: teacher maps of the same images, shape ``[b, h', w', c']``.
      power: exponent p, a whole number; larger ones favour the strongest channels.
      compat: ``"released"`` averages over positions instead of adding them up, as in
        RepDistiller, whose weight 1000 belongs to this form.
      mask: shape ``[b]``; images whose mask is zero are ignored, whatever their values.
        None uses all images.

    Returns:
      Scalar: squared distance, averaged over images; in [0, 2].

    Raises:
      ValueError: shapes or dtypes are wrong, or ``power < 1``.

    References:
      Zagoruyko and Komodakis, Paying more attention to attention, 2017 (arXiv
      1612.03928), equation 2, with the square of its norm and without its factor 1/2.

    Examples:
      >>> left, right = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 1.0]])  # 1 x 2 pixels
      >>> attention_transfer(left.reshape(1, 1, 2, 1), right.reshape(1, 1, 2, 1))
      Array(2., dtype=float32)
    """
    check_count("power", power)
    as_released(compat)
    (energy_x, energy_y), mask = _energies(maps_x, maps_y, power, mask)
    squares = (unit(energy_x, axis=(1, 2)) - unit(energy_y, axis=(1, 2))) ** 2
    reduce = jnp.sum if compat is None else jnp.mean
    return masks.mean(reduce(squares, axis=(1, 2)), mask)


def _waves(size, *, sine=False):
    """Computes the real or imaginary part of the discrete Fourier transform."""
    angles = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
    return np.sin(angles) if sine else np.cos(angles)


def _cosines(size):
    """Computes the orthonormal discrete cosine transform (DCT-II), ``[size, size]``."""
    k, position = np.arange(size)[:, None], np.arange(size)[None, :]
    basis = np.sqrt(2 / size) * np.cos(np.pi * k * (position + 0.5) / size)
    basis[0] /= np.sqrt(2)
    return basis


def _transformed(rows, columns, images):
    """Transforms images ``[b, h, w]`` along both sides."""
    rows, columns = (jnp.asarray(z, images.dtype) for z in (rows, columns))
    along = jnp.einsum("uh,bhw->buw", rows, images, precision=HIGHEST)
    return jnp.einsum("vw,buw->buv", columns, along, precision=HIGHEST)


def _ranged(images):
    """Computes (a - min) / max of each image; zero if it is constant or zero."""
    low, high = (f(images, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    zero = high == 0
    return jnp.where(zero, 0, (images - low) / jnp.where(zero, 1, high))


def _released_spectrum(energy):
    """Computes the released spectrum, the absolute real part of the maps' DFT."""
    ranged = _ranged(energy)
    centred = ranged - jnp.mean(ranged, axis=(1, 2), keepdims=True)
    parts = []
    for sine in (False, True):
        rows, columns = (_waves(size, sine=sine) for size in energy.shape[1:])
        parts.append(_transformed(rows, columns, centred))
    return _ranged(jnp.abs(parts[0] - parts[1]))


def attention_dct(
    maps_x: jax.Array,
    maps_y: jax.Array,
    *,
    frequencies: int | None = None,
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the squared distance between the cosine transforms of attention maps.

    .. math:: \frac1b \sum_i \sum_{(u, v) \ne (0, 0)} \big(C a_i C^\top
              - C b_i C^\top\big)_{uv}^2

    ``a`` and ``b`` are the attention maps of `attention_transfer` for p = 2, with unit
    norm, and C is the orthonormal cosine transform (DCT-II).  The mean of a map, its
    first coefficient, is left out.  The transform preserves distances, so with all
    frequencies this is `attention_transfer` without the difference of the means; with
    few of them it compares only the coarse form of the maps.

    Cost: n h w (c + h + w).  Gradient: that of the value.  Not for: maps of one pixel,
    which have no frequency but zero.

    Args:
      maps_x: student maps, shape ``[b, h, w, c]``.
      maps_y: teacher maps of the same images, shape ``[b, h', w', c']``.
      frequencies: number of the lowest frequencies along each side, zero included; at
        least 2.  None compares all.
      compat: ``"released"`` computes the released code's form: the absolute real part
        of the Fourier transform replaces the cosine transform, maps and spectra are
        ``(a - min) / max``, and the distance is not squared.
      mask: shape ``[b]``; images whose mask is zero are ignored, whatever their values.
        None uses all images.

    Returns:
      Scalar: squared distance, averaged over images; in [0, 2].

    Raises:
      ValueError: shapes or dtypes are wrong, or ``frequencies < 2``.

    References:
      López-Cifuentes et al., Attention-based knowledge distillation in scene
      recognition: the impact of a DCT-driven loss, 2022 (arXiv 2205.01997).

    Examples:
      >>> left, right = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 1.0]])  # 1 x 2 pixels
      >>> attention_dct(left.reshape(1, 1, 2, 1), right.reshape(1, 1, 2, 1))
      Array(2., dtype=float32)
    """
    (frequencies,) = as_released(compat, frequencies=(frequencies, None, None))
    if frequencies is not None:
        check_count("frequencies", frequencies)
        if frequencies == 1:
            raise ValueError(
                "frequencies must be at least 2, got 1, which compares nothing: the "
                "first coefficient is left out; take 2, or None for all"
            )
    (energy_x, energy_y), mask = _energies(maps_x, maps_y, 2, mask)
    if compat is not None:
        spectra = [_released_spectrum(energy) for energy in (energy_x, energy_y)]
        squares = jnp.sum((spectra[0] - spectra[1]) ** 2, axis=(1, 2))
        return masks.mean(safe_sqrt(squares), mask)
    difference = unit(energy_x, axis=(1, 2)) - unit(energy_y, axis=(1, 2))
    difference = difference - jnp.mean(difference, axis=(1, 2), keepdims=True)
    rows, columns = (_cosines(size)[:frequencies] for size in difference.shape[1:])
    squares = _transformed(rows, columns, difference) ** 2
    return masks.mean(jnp.sum(squares, axis=(1, 2)), mask)
