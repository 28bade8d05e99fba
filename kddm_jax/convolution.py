"""The convolution that XLA is slow at on the CPU, as patches times matrix.

XLA exchanges the image and the kernel of a convolution whenever the kernel has more
taps than the image has pixels. On the CPU the exchanged form has no fast
implementation: 3x3 kernels on 2x2 pixels, where every ResNet ends, run 50 to 100 times
slower than they need. Backwards the cotangent is the image, hence the rule: it is slow
where a kernel has more taps than the *output* (or the input) has pixels.

There, each output pixel is one matrix product of the image patch it sees with the
kernel taps that fall on the patch. Taps that would only meet zero padding are left out
(five of nine on 2x2 pixels), and autodiff derives the backward pass.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

# One product per output pixel: above 16 (7x7 kernel, 6x6 pixels: measured) the many
# small products cost as much as XLA's detour.
_MAX_PIXELS = 16


def _is_nhwc(lhs: jax.Array, rhs: jax.Array, dimension_numbers: object) -> bool:
    if lhs.ndim != 4 or rhs.ndim != 4:
        return False
    layouts = [
        lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
        for numbers in (dimension_numbers, ("NHWC", "HWIO", "NHWC"))
    ]
    return layouts[0] == layouts[1]


def _is_real(lhs: jax.Array, rhs: jax.Array) -> bool:
    return all(jnp.issubdtype(a.dtype, jnp.floating) for a in (lhs, rhs))


def _window(start: int, taps: int, size: int) -> tuple[slice, slice]:
    """The pixels under a window that starts at `start`, and the taps on them."""
    first, last = (min(max(i, 0), size) for i in (start, start + taps))
    return slice(first, last), slice(first - start, last - start)


def _products(
    lhs: jax.Array,
    rhs: jax.Array,
    rows: list[tuple[slice, slice]],
    columns: list[tuple[slice, slice]],
    precision: lax.PrecisionLike,
) -> jax.Array:
    # float32 from the start: the kernel's gradient is a sum over the output pixels.
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    pixels = [
        jnp.dot(
            lax.collapse(lhs[:, row, column], 1),  # [b, taps * c]
            lax.collapse(rhs[row_taps, column_taps], 0, 3),  # [taps * c, features]
            precision=precision,
        )
        for row, row_taps in rows
        for column, column_taps in columns
    ]
    shape = (lhs.shape[0], len(rows), len(columns), rhs.shape[-1])
    return jnp.stack(pixels, axis=1).reshape(shape)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Convolves as `jax.lax.conv_general_dilated`, without its slow cases on the CPU.

    Same arguments, same result up to rounding. Two-dimensional NHWC convolutions with
    more kernel taps than input or output pixels, at most 16 output pixels, no dilation
    and no groups become matrix products when compiled for a CPU; every other case, and
    every other platform, is `jax.lax.conv_general_dilated` itself. The platform is the
    one the computation is compiled for, not the default of the process, so a step
    pinned to the CPU of a GPU machine is fast too.

    Pass it to Flax: `nn.Conv(..., conv_general_dilated=conv_general_dilated)`.

    Args:
      lhs: images, shape `[b, h, w, c]` for the fast path.
      rhs: kernel, shape `[kernel_h, kernel_w, c, features]` for the fast path.
      window_strides: one stride per spatial axis.
      padding: "SAME", "VALID", or `(low, high)` per spatial axis.
      lhs_dilation: input dilation per spatial axis.
      rhs_dilation: kernel dilation per spatial axis.
      dimension_numbers: the layout, as for `jax.lax.conv_general_dilated`.
      feature_group_count: number of feature groups.
      batch_group_count: number of batch groups.
      precision: precision of the products.
      preferred_element_type: dtype of the result, by default that of the images.

    Returns:
      The convolved images, shape `[b, out_h, out_w, features]`. Half precision is
      accumulated in float32 and rounded once, forwards and backwards.

    Examples:
      >>> image = jnp.arange(4.0).reshape(1, 2, 2, 1)
      >>> box = jnp.ones((3, 3, 1, 1))
      >>> layout = ("NHWC", "HWIO", "NHWC")
      >>> y = conv_general_dilated(image, box, (1, 1), "SAME", dimension_numbers=layout)
      >>> y.ravel().tolist()
      [6.0, 6.0, 6.0, 6.0]
    """

    def xla(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    groups = (feature_group_count, batch_group_count)
    dilations = (*(lhs_dilation or ()), *(rhs_dilation or ()))
    if (
        any(n != 1 for n in (*groups, *dilations))
        or not _is_nhwc(lhs, rhs, dimension_numbers)
        or not _is_real(lhs, rhs)
    ):
        return xla(lhs, rhs)

    # Also the shape and dtype checks: the products below may assume them.
    out = jax.eval_shape(xla, lhs, rhs)
    pixels = math.prod(out.shape[1:3])
    taps = math.prod(rhs.shape[:2])
    if not 0 < pixels <= _MAX_PIXELS or taps <= min(pixels, math.prod(lhs.shape[1:3])):
        return xla(lhs, rhs)

    if isinstance(padding, str):
        padding = lax.padtype_to_pads(
            lhs.shape[1:3], rhs.shape[:2], window_strides, padding
        )
    windows = [
        [_window(i * stride - low, k, n) for i in range(size)]
        for size, stride, (low, _), k, n in zip(
            out.shape[1:3],
            window_strides,
            padding,
            rhs.shape[:2],
            lhs.shape[1:3],
            strict=True,
        )
    ]

    def products(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return _products(lhs, rhs, *windows, precision).astype(out.dtype)

    # Only the chosen branch is compiled, with or without derivatives, scan and vmap.
    return lax.platform_dependent(lhs, rhs, cpu=products, default=xla)
