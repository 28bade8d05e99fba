"""Computes convolutions faster than XLA in the cases where XLA is slow on a CPU.

Small images: XLA swaps the image and the kernel of a convolution if the kernel has more
taps than the image has pixels. On the CPU the swapped form has no fast implementation:
3x3 kernels on 2x2 pixels, as at the end of a ResNet, take 50 to 100 times as long as
necessary. In the backward pass the cotangent takes the place of the image, so a
convolution is slow if its kernel has more taps than its *output* (or its input) has
pixels. Here, each output pixel is then one matrix product: the patch of the image under
the kernel, times the taps over that patch. If every output pixel sees the whole image,
one product gives all of them. Taps that only meet zero padding are left out (five of
nine on 2x2 pixels). Automatic differentiation gives the backward pass.

Depthwise kernels, which convolve each channel separately: the result is a sum over
taps, of the shifted image times the tap. It is fast for images of any size. With 64
images and 3x3 kernels on two shared cores, the forward and backward pass take 48
instead of 568 ms at 32x32 pixels and 96 channels, 11 instead of 215 ms at 8x8 and 384,
and 3 instead of 115 ms at 2x2 and 960. A training step of MobileNetV2 takes a quarter
of the time.

Kernels of at least 7x7 taps with stride 2, few channels and few features, as in the
first layer of a narrow network: blocks of 2x2 pixels of the image and of the kernel
become channels, and the stride becomes 1. A vector of three channels leaves a CPU's
registers nearly empty; a vector of twelve fills more of them. The forward pass of 128
images of 32x32 pixels with 16 features takes 2.8 instead of 5.1 ms. In the backward
pass XLA's own form is faster and is used.

All other convolutions: on x86-64, XLA:CPU leaves them to YNNPACK, which takes up to
three times as long as Eigen. `prefer_eigen` selects Eigen for the whole process.
"""

import math
import os
from collections.abc import Sequence
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import jaxlib.version
from jax import lax

# Each output pixel takes one product. With more pixels than this, the many small
# products cost as much as XLA's slow form (measured: 7x7 kernel, 6x6 pixels).
_MAX_PIXELS = 16
# Each tap of a depthwise kernel takes one shifted image. Kernels of 7x7 taps would be
# fast, too, but they take seconds to compile.
_MAX_TAPS = 25
# Limits of the form with blocks. With 32 features, or with 5x5 taps, it is slower than
# XLA's own form in some versions of jaxlib.
_MIN_BLOCK_SIDE = 7
_MAX_BLOCK_CHANNELS = 4
_MAX_BLOCK_FEATURES = 16


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


def _sizes(lhs, rhs, strides, padding):
    """Returns the numbers of rows and columns of the convolved image."""
    return [
        (size + low + high - taps) // stride + 1
        for size, taps, stride, (low, high) in zip(
            lhs.shape[1:3], rhs.shape[:2], strides, padding, strict=True
        )
    ]


def _is_small(lhs: jax.Array, rhs: jax.Array, out: jax.ShapeDtypeStruct) -> bool:
    pixels, taps = math.prod(out.shape[1:3]), math.prod(rhs.shape[:2])
    fewest = min(pixels, math.prod(lhs.shape[1:3]))
    return 0 < pixels <= _MAX_PIXELS and taps > fewest


def _window(start: int, taps: int, size: int) -> tuple[slice, slice]:
    """Returns the pixels under a window that begins at `start`, and their taps."""
    first, last = (min(max(i, 0), size) for i in (start, start + taps))
    return slice(first, last), slice(first - start, last - start)


def _products(lhs, rhs, strides, padding, *, precision):
    """Computes a product for each output pixel, or one if all see the whole image."""
    sizes = _sizes(lhs, rhs, strides, padding)
    rows, columns = (
        [
            _window(i * strides[k] - padding[k][0], rhs.shape[k], lhs.shape[k + 1])
            for i in range(sizes[k])
        ]
        for k in (0, 1)
    )
    windows = [(row, column) for row in rows for column in columns]
    patches = [lhs[:, row, column] for (row, _), (column, _) in windows]
    taps = [
        lax.collapse(rhs[row, column], 0, 3)  # [taps * c, features]
        for (_, row), (_, column) in windows
    ]
    product = partial(jnp.dot, precision=precision)
    if all(patch.shape == lhs.shape for patch in patches):
        y = product(lax.collapse(lhs, 1), jnp.concatenate(taps, axis=1))
    else:
        pixels = [
            product(lax.collapse(patch, 1), tap)
            for patch, tap in zip(patches, taps, strict=True)
        ]
        y = jnp.stack(pixels, axis=1)
    return y.reshape(lhs.shape[0], *sizes, rhs.shape[-1])


def _is_depthwise(lhs: jax.Array, rhs: jax.Array, groups: int) -> bool:
    own_kernels = 1 < groups == lhs.shape[3] == rhs.shape[3]
    return own_kernels and math.prod(rhs.shape[:2]) <= _MAX_TAPS


def _shifted(lhs, rhs, strides, padding):
    """Sums over taps: the image, shifted to the tap, times the tap."""
    rows, columns = _sizes(lhs, rhs, strides, padding)
    config = [(low, high, 0) for low, high in ((0, 0), *padding, (0, 0))]
    lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), config)
    down, right = strides
    total = jnp.zeros((), jnp.result_type(lhs, rhs))
    for i in range(rhs.shape[0]):
        for j in range(rhs.shape[1]):
            shifted = lhs[
                :,
                i : i + down * (rows - 1) + 1 : down,
                j : j + right * (columns - 1) + 1 : right,
            ]
            total = total + shifted * rhs[i : i + 1, j : j + 1]
    return total


# The function is linear in each argument, so its derivative is the function itself. But
# the gradient with respect to the kernel sums over images and pixels, and XLA:CPU then
# strides through the whole memory for each tap and channel. A single image stays in the
# cache, so one image at a time is 4 to 10 times as fast, which saves a quarter of the
# step. `jax.checkpoint` shifts the image again in the backward pass; without it, nine
# shifted copies would be kept.
@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _depthwise(lhs, rhs, strides, padding):
    return _shifted(lhs, rhs, strides, padding)


@_depthwise.defjvp
def _depthwise_jvp(strides, padding, primals, tangents):
    (lhs, rhs), (dlhs, drhs) = primals, tangents
    shifted = partial(_shifted, strides=strides, padding=padding)
    one = jax.checkpoint(lambda image: shifted(image[None], drhs)[0])
    tangent = shifted(dlhs, rhs) + lax.map(one, lhs)
    return _depthwise(lhs, rhs, strides, padding), tangent


def _is_narrow_stem(
    lhs: jax.Array, rhs: jax.Array, out: jax.ShapeDtypeStruct, strides: tuple[int, ...]
) -> bool:
    return (
        out.size > 0
        and strides == (2, 2)
        and min(rhs.shape[:2]) >= _MIN_BLOCK_SIDE
        and lhs.shape[3] <= _MAX_BLOCK_CHANNELS
        and rhs.shape[3] <= _MAX_BLOCK_FEATURES
    )


def _as_channels(x: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    """Turns blocks into channels: `[n, h, w, c]` to `[n, h / s, w / s, s * s * c]`."""
    n, h, w, c = x.shape
    down, right = strides
    x = x.reshape(n, h // down, down, w // right, right, c)
    return lax.collapse(x.transpose(0, 1, 3, 2, 4, 5), 3)


def _plain(lhs, rhs, strides, padding, precision):
    return lax.conv_general_dilated(
        lhs,
        rhs,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _blocks(lhs, rhs, strides, padding, precision):
    """Convolves blocks of pixels; a block has the size of the stride."""
    sizes = _sizes(lhs, rhs, strides, padding)
    kernel = [-(-k // s) for k, s in zip(rhs.shape[:2], strides, strict=True)]  # blocks
    zero = jnp.zeros((), lhs.dtype)
    around = [
        (low, stride * (size + side - 1) - low - pixels, 0)
        for (low, _), stride, size, side, pixels in zip(
            padding, strides, sizes, kernel, lhs.shape[1:3], strict=True
        )
    ]
    behind = [
        (0, stride * side - taps, 0)
        for stride, side, taps in zip(strides, kernel, rhs.shape[:2], strict=True)
    ]
    lhs = lax.pad(lhs, zero, [(0, 0, 0), *around, (0, 0, 0)])
    rhs = lax.pad(rhs, zero, [*behind, (0, 0, 0), (0, 0, 0)])
    rhs = _as_channels(rhs.transpose(3, 0, 1, 2), strides).transpose(1, 2, 3, 0)
    return _plain(_as_channels(lhs, strides), rhs, (1, 1), "VALID", precision)


# The function is bilinear, and its plain form has the faster backward pass.
@_blocks.defjvp
def _blocks_jvp(strides, padding, precision, primals, tangents):
    (lhs, rhs), (dlhs, drhs) = primals, tangents
    plain = partial(_plain, strides=strides, padding=padding, precision=precision)
    tangent = plain(dlhs, rhs) + plain(lhs, drhs)
    return _blocks(lhs, rhs, strides, padding, precision), tangent


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
    """Computes `jax.lax.conv_general_dilated`, without its slow cases on a CPU.

    The arguments are the same. For finite arrays, the result is the same up to
    rounding. In Flax: `nn.Conv(..., conv_general_dilated=conv_general_dilated)`.

    Three kinds of two-dimensional NHWC convolutions without dilation are computed in
    another way when they are compiled for a CPU:

    - no groups, more kernel taps than input or output pixels, and at most 16 output
      pixels: by matrix products;
    - one group and one feature per channel (depthwise), and at most 25 taps: by a sum
      over taps;
    - no groups, stride 2, at least 7x7 taps, at most 4 channels and at most 16
      features: by blocks of 2x2 pixels that become channels.

    In all other cases, and on all other platforms, this function calls
    `jax.lax.conv_general_dilated`. What counts is the platform that the computation is
    compiled for, not the default of the process. Hence a step that is pinned to the CPU
    of a machine with a GPU is fast, too.

    Args:
      lhs: images, shape `[b, h, w, c]` for the fast forms.
      rhs: kernel, shape `[kernel_h, kernel_w, c / groups, features]` for the fast
        forms.
      window_strides: one stride per spatial axis.
      padding: "SAME", "VALID", or `(low, high)` per spatial axis.
      lhs_dilation: input dilation per spatial axis.
      rhs_dilation: kernel dilation per spatial axis.
      dimension_numbers: layout, as in `jax.lax.conv_general_dilated`.
      feature_group_count: number of feature groups; c for a depthwise kernel.
      batch_group_count: number of batch groups.
      precision: precision of the products.
      preferred_element_type: dtype of the result; None uses that of the images.

    Returns:
      The convolved images, shape `[b, out_h, out_w, features]`. The fast forms
      accumulate half precision in float32 and round once, in both passes.

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

    dilations = (*(lhs_dilation or ()), *(rhs_dilation or ()))
    if (
        batch_group_count != 1
        or any(n != 1 for n in dilations)
        or not _is_nhwc(lhs, rhs, dimension_numbers)
        or not _is_real(lhs, rhs)
    ):
        return xla(lhs, rhs)

    # This also checks shapes and dtypes, so the fast forms need not.
    out = jax.eval_shape(xla, lhs, rhs)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(
            lhs.shape[1:3], rhs.shape[:2], window_strides, padding
        )
    strides, pads = tuple(window_strides), tuple(map(tuple, padding))
    if feature_group_count == 1 and _is_small(lhs, rhs, out):
        form = partial(_products, precision=precision)
    elif _is_depthwise(lhs, rhs, feature_group_count):
        form = _depthwise
    elif feature_group_count == 1 and _is_narrow_stem(lhs, rhs, out, strides):
        form = partial(_blocks, precision=precision)
    else:
        return xla(lhs, rhs)

    def fast(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        # Cast first, because the kernel's gradient is a sum over the output pixels.
        dtype = lhs.dtype if jnp.finfo(lhs.dtype).bits >= 32 else jnp.float32
        y = form(lhs.astype(dtype), rhs.astype(dtype), strides, pads)
        return y.astype(out.dtype)

    # Only one branch is compiled, also under derivatives, scan and vmap.
    return lax.platform_dependent(lhs, rhs, cpu=fast, default=xla)


_CHOICE = "--xla_cpu_experimental_ynn_fusion_type"
# XLA ends the process if it does not know an option, and this one is experimental.
_KNOWN_SINCE, _UNKNOWN_FROM = (0, 10, 2), (0, 13)


def prefer_eigen() -> None:
    """Makes XLA:CPU compute convolutions with Eigen instead of YNNPACK.

    On two x86-64 cores, with 3x3 kernels, images of 8 to 32 pixels a side and JAX
    0.10.2, Eigen computes the gradient with respect to the kernel in a third of
    YNNPACK's time, and everything else in half of it to all of it. With JAX 0.12 only
    that gradient is faster. Results change by rounding errors.

    This sets an option of XLA, which is read once and holds for the whole process: call
    this function before JAX first looks for its devices. The option is added to the
    environment variable `XLA_FLAGS`. Child processes inherit it, and the keys of the
    compilation cache contain it, even if it comes too late for this process.

    Nothing is added if you have set the option or a file of flags yourself, if this
    version of jaxlib is not known to have the option, or if libtpu or a plug-in other
    than CUDA's is installed, because these may not know the option.

    Examples:
      >>> prefer_eigen()
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    is_file = bool(flags) and not flags.startswith("-")
    known = _KNOWN_SINCE <= jaxlib.version.__version_info__ < _UNKNOWN_FROM
    plug_ins = [p.name for p in entry_points(group="jax_plugins")]
    others = find_spec("libtpu") is not None or any("cuda" not in p for p in plug_ins)
    if known and not (is_file or others or _CHOICE in flags):
        os.environ["XLA_FLAGS"] = f"{flags} {_CHOICE}=-individual_convolution".strip()
