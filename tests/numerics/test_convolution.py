import os
import re
import subprocess
import sys
import types
from functools import partial
from platform import machine

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.test_util import check_grads

from kddm_jax.numerics import convolution
from kddm_jax.numerics.convolution import conv_general_dilated, prefer_eigen
from kddm_jax.numerics.maxima import max_pool, relu

NHWC = ("NHWC", "HWIO", "NHWC")

# Spatial input, kernel, strides, padding: convolutions that become products on the CPU.
SMALL = [
    ((1, 1), (3, 3), (1, 1), "SAME"),
    ((1, 1), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((2, 2), (3, 3), (1, 1), "SAME"),
    ((2, 2), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((4, 4), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((4, 4), (3, 3), (2, 2), "SAME"),  # pads (0, 1), unlike torch
    ((3, 4), (3, 3), (1, 2), ((0, 1), (1, 0))),
    ((4, 3), (3, 2), (1, 1), "VALID"),
    ((8, 8), (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((1, 5), (1, 7), (1, 1), "SAME"),
    ((1, 1), (2, 2), (1, 1), ((3, 0), (0, 3))),  # windows of padding only
    ((5, 5), (3, 3), (1, 1), ((-1, 0), (0, -2))),  # padding that crops
]
# These stay convolutions: they have as many taps as pixels, or too many products.
LARGE = [
    ((3, 3), (3, 3), (1, 1), "SAME"),
    ((4, 4), (3, 3), (1, 1), "SAME"),
    ((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((8, 8), (3, 3), (1, 1), "SAME"),
    ((2, 2), (1, 1), (2, 2), "VALID"),
    ((4, 4), (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((16, 16), (5, 5), (2, 2), ((2, 2), (2, 2))),
]
# In these, blocks of pixels become channels: many taps, stride 2, few channels and
# features.
NARROW = [
    ((12, 12), (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((13, 10), (7, 7), (2, 2), "SAME"),
    ((15, 16), (7, 8), (2, 2), "VALID"),
    ((14, 14), (7, 7), (2, 2), ((-1, 3), (4, -2))),  # padding that crops
]

# Depthwise kernels, with images of any size.
DEPTHWISE = [
    ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((9, 7), (3, 3), (2, 1), "SAME"),
    ((2, 2), (3, 3), (1, 1), "SAME"),
    ((1, 1), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((7, 6), (5, 5), (1, 2), ((2, 2), (2, 2))),
    ((6, 5), (2, 3), (3, 1), "VALID"),
    ((1, 1), (2, 2), (1, 1), ((3, 0), (0, 3))),  # windows of padding only
    ((5, 5), (3, 3), (1, 1), ((-1, 0), (0, -2))),  # padding that crops
]


def normal(*shapes, dtype=jnp.float32):
    """Makes standard normal arrays by NumPy, because XLA compiles for each shape."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def arrays(size, kernel, dtype=jnp.float32, *, batch=3, channels=4, features=5):
    shapes = (batch, *size, channels), (*kernel, channels, features)
    return normal(*shapes, dtype=dtype)


def value_and_gradients(conv, lhs, rhs, strides, padding):
    """Returns the convolution and its pullback of a fixed cotangent."""
    options = {"dimension_numbers": NHWC}
    if lhs.shape[-1] != rhs.shape[-2]:
        options["feature_group_count"] = lhs.shape[-1] // rhs.shape[-2]
    y, pullback = jax.vjp(
        lambda lhs, rhs: conv(lhs, rhs, strides, padding, **options), lhs, rhs
    )
    # bfloat16 represents these numbers exactly, so all dtypes have the same cotangent.
    cotangent = (jnp.arange(y.size).reshape(y.shape) * 37 % 101 - 50) / 32
    return y, *pullback(cotangent.astype(y.dtype))


def depthwise(size, kernel, dtype=jnp.float32, *, batch=3, channels=4):
    shapes = (batch, *size, channels), (*kernel, 1, channels)
    return normal(*shapes, dtype=dtype)


jitted = jax.jit(value_and_gradients, static_argnums=(0, 3, 4))


def lowered(fn, *args, platform="cpu"):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def assert_close(actual, wanted, rtol):
    """Compares relative to the largest entry; those near zero are cancelled sums."""
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == b.dtype
        a, b = np.float64(a), np.float64(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "padding"), SMALL + LARGE + NARROW
)
def test_equals_lax(size, kernel, strides, padding):
    lhs, rhs = arrays(size, kernel)
    ours = jitted(conv_general_dilated, lhs, rhs, strides, padding)
    wanted = jitted(lax.conv_general_dilated, lhs, rhs, strides, padding)
    # Sums of at most 196 products of normal numbers, in another order.
    assert_close(ours, wanted, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), DEPTHWISE)
def test_depthwise_equals_lax(strict, size, kernel, strides, padding):
    lhs, rhs = depthwise(size, kernel)
    ours = jitted(conv_general_dilated, lhs, rhs, strides, padding)
    wanted = jitted(lax.conv_general_dilated, lhs, rhs, strides, padding)
    assert_close(ours, wanted, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), DEPTHWISE[:4])
def test_depthwise_is_a_sum_of_products_on_the_cpu(size, kernel, strides, padding):
    fn = lambda lhs, rhs: value_and_gradients(
        conv_general_dilated, lhs, rhs, strides, padding
    )
    arguments = depthwise(size, kernel)
    text = lowered(fn, *arguments)
    assert "stablehlo.convolution" not in text
    assert "stablehlo.dot_general" not in text
    for platform in ("cuda", "tpu"):
        text = lowered(fn, *arguments, platform=platform)
        assert text.count("stablehlo.convolution") == 3


def test_depthwise_bfloat16_accumulates_in_float32():
    case = (1, 1), ((1, 1), (1, 1))
    lhs, rhs = depthwise((6, 6), (3, 3), jnp.bfloat16, batch=32)
    ours = jitted(conv_general_dilated, lhs, rhs, *case)
    lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    wanted = jitted(lax.conv_general_dilated, lhs, rhs, *case)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(a), b, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("batch", "size"), [(2, (2, 2)), (2, (1, 3)), (0, (3, 3))])
def test_depthwise_without_pixels_or_images(batch, size):
    lhs, rhs = depthwise(size, (3, 3), batch=batch)
    ours = jitted(conv_general_dilated, lhs, rhs, (2, 2), "VALID")
    wanted = jitted(lax.conv_general_dilated, lhs, rhs, (2, 2), "VALID")
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def depthwise_same(lhs, rhs):
    groups = lhs.shape[-1]
    return conv_general_dilated(
        lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups
    )


@pytest.mark.slow
def test_depthwise_derivatives_are_those_of_finite_differences(x64):
    lhs, rhs = depthwise((3, 3), (3, 3), jnp.float64, batch=2, channels=2)
    check = partial(check_grads, order=2, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)
    check(jax.jit(depthwise_same), (lhs, rhs))  # bilinear, so exact up to rounding


@pytest.mark.slow
def test_depthwise_works_under_vmap_scan_and_pmap():
    lhs, rhs = depthwise((4, 4), (3, 3), batch=4)
    images, kernels = jnp.stack([lhs, 2 * lhs]), jnp.stack([rhs, 3 * rhs])
    loss = lambda rhs, lhs: jnp.sum(jnp.sin(depthwise_same(lhs, rhs)))
    grad = jax.jit(jax.grad(loss))
    wanted = grad(rhs, lhs)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # float32, other order of products

    pairs = [grad(k, x) for k, x in zip(kernels, images, strict=True)]
    batched = jax.jit(jax.vmap(jax.grad(loss)))(kernels, images)
    np.testing.assert_allclose(batched, jnp.stack(pairs), **tolerance)
    scanned = jax.jit(lambda xs: lax.map(lambda x: jax.grad(loss)(rhs, x), xs))(images)
    np.testing.assert_allclose(scanned[0], wanted, **tolerance)
    sharded = jax.pmap(
        lambda rhs, lhs: lax.psum(jax.grad(loss)(rhs, lhs), "batch"),
        axis_name="batch",
        in_axes=(None, 0),
        out_axes=None,
    )(rhs, lhs.reshape(2, 2, *lhs.shape[1:]))
    np.testing.assert_allclose(sharded, wanted, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "kernel", "strides", "padding", "batch", "channels"),
    [(*case, 32, 64) for case in SMALL[:5]] + [(*case, 3, 4) for case in NARROW[:2]],
)
def test_bfloat16_accumulates_in_float32(
    strict, size, kernel, strides, padding, batch, channels
):
    options = {"batch": batch, "channels": channels}
    lhs, rhs = arrays(size, kernel, jnp.bfloat16, **options)
    ours = jitted(conv_general_dilated, lhs, rhs, strides, padding)
    lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    wanted = jitted(lax.conv_general_dilated, lhs, rhs, strides, padding)
    # The result is rounded once to 8 bits, and may be rounded to either neighbour.
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(a), b, rtol=2**-8, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), SMALL)
def test_small_outputs_are_products_on_the_cpu(size, kernel, strides, padding):
    fn = lambda lhs, rhs: value_and_gradients(
        conv_general_dilated, lhs, rhs, strides, padding
    )
    text = lowered(fn, *arrays(size, kernel))
    assert "stablehlo.convolution" not in text
    assert "stablehlo.dot_general" in text


@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), LARGE)
def test_large_outputs_stay_convolutions(size, kernel, strides, padding):
    fn = lambda lhs, rhs: value_and_gradients(
        conv_general_dilated, lhs, rhs, strides, padding
    )
    text = lowered(fn, *arrays(size, kernel))
    assert text.count("stablehlo.convolution") == 3
    assert "stablehlo.dot_general" not in text


def strided(lhs, rhs):
    return conv_general_dilated(
        lhs, rhs, (2, 2), ((3, 3), (3, 3)), dimension_numbers=NHWC
    )


@pytest.mark.parametrize(
    ("channels", "features", "kernel", "narrow"),
    [(4, 16, 7, True), (5, 16, 7, False), (4, 17, 7, False), (4, 16, 5, False)],
)
def test_a_narrow_first_layer_takes_blocks_as_channels(
    channels, features, kernel, narrow
):
    shapes = arrays((16, 16), (kernel, kernel), channels=channels, features=features)
    text = lowered(strided, *shapes)
    side = (kernel + 1) // 2
    blocks = f"tensor<{side}x{side}x{4 * channels}x{features}xf32>"
    assert text.count("stablehlo.convolution") == 1
    assert (blocks in text) == narrow


@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), NARROW)
def test_narrow_first_layers_are_one_convolution(size, kernel, strides, padding):
    fn = lambda lhs, rhs: conv_general_dilated(
        lhs, rhs, strides, padding, dimension_numbers=NHWC
    )
    text = lowered(fn, *arrays(size, kernel))
    assert text.count("stablehlo.convolution") == 1
    assert "tensor<4x4x16x5xf32>" in text  # the kernel as blocks
    assert "stablehlo.dot_general" not in text


@pytest.mark.slow
def test_backwards_a_narrow_layer_is_the_plain_form():
    lhs, rhs = arrays((16, 16), (7, 7))
    gradient = jax.grad(lambda rhs: jnp.sum(jnp.sin(strided(lhs, rhs))))
    text = jax.jit(gradient).lower(rhs).compile().as_text()
    assert text.count("window={size=4x4}") == 1  # with blocks
    assert text.count("rhs_dilate=2x2") == 1
    assert len(re.findall(r" convolution\(|custom-call\(", text)) == 2


@pytest.mark.slow
def test_a_narrow_layers_derivatives_are_those_of_finite_differences(x64):
    arguments = arrays((11, 9), (7, 7), jnp.float64, batch=1, channels=2, features=2)
    check = partial(check_grads, order=2, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)
    check(jax.jit(strided), arguments)


@pytest.mark.slow
def test_a_narrow_layer_works_under_vmap_and_checkpoint():
    lhs, rhs = arrays((12, 12), (7, 7))
    loss = lambda rhs, lhs: jnp.sum(jnp.sin(strided(lhs, rhs)))
    gradient = jax.jit(jax.grad(loss))
    wanted = gradient(rhs, lhs)
    kernels = jnp.stack([rhs, 2 * rhs])
    mapped = jax.vmap(jax.grad(jax.checkpoint(loss)), in_axes=(0, None))
    batched = jax.jit(mapped)(kernels, lhs)
    np.testing.assert_allclose(batched[0], wanted, rtol=1e-4, atol=1e-4)
    second = gradient(2 * rhs, lhs)
    np.testing.assert_allclose(batched[1], second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_accelerators_keep_their_convolution(platform):
    fn = lambda lhs, rhs: value_and_gradients(
        conv_general_dilated, lhs, rhs, (1, 1), "SAME"
    )
    text = lowered(fn, *arrays((2, 2), (3, 3)), platform=platform)
    assert text.count("stablehlo.convolution") == 3
    assert "stablehlo.dot_general" not in text
    text = lowered(strided, *arrays((16, 16), (7, 7)), platform=platform)
    assert text.count("stablehlo.convolution") == 1
    assert "stablehlo.transpose" not in text  # of blocks


def test_padding_is_never_multiplied():
    fn = lambda lhs, rhs: conv_general_dilated(
        lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC
    )
    flops = lambda size: (
        jax.jit(fn).lower(*arrays(size, (3, 3))).compile().cost_analysis()["flops"]
    )
    products = 2 * 3 * 4 * 5  # multiplication and addition, batch, channels, features
    # On 1x1 pixels one tap is used, on 2x2 pixels four taps for each. No other is
    # computed.
    assert flops((1, 1)) == pytest.approx(products, rel=0.1)
    assert flops((2, 2)) == pytest.approx(4 * 4 * products, rel=0.1)


def test_pixels_that_all_see_the_whole_image_are_one_product():
    text = lowered(same, *arrays((2, 2), (3, 3)))
    assert text.count("stablehlo.dot_general") == 1
    assert lowered(same, *arrays((2, 3), (3, 3))).count("stablehlo.dot_general") == 6


def test_the_choice_leaves_nothing_at_run_time():
    fn = lambda lhs, rhs: value_and_gradients(
        conv_general_dilated, lhs, rhs, (1, 1), "SAME"
    )
    text = jax.jit(fn).lower(*arrays((2, 2), (3, 3))).compile().as_text()
    assert "conditional" not in text
    assert "convolution(" not in text


OTHERS = {
    "feature groups": (
        (2, 2, 2, 4),
        (3, 3, 2, 6),
        {"feature_group_count": 2, "dimension_numbers": NHWC},
    ),
    "depthwise, two features a channel": (
        (2, 4, 4, 3),
        (3, 3, 1, 6),
        {"feature_group_count": 3, "dimension_numbers": NHWC},
    ),
    "depthwise, many taps": (
        (2, 8, 8, 3),
        (7, 7, 1, 3),
        {"feature_group_count": 3, "dimension_numbers": NHWC},
    ),
    "batch groups": (
        (2, 2, 2, 4),
        (3, 3, 4, 6),
        {"batch_group_count": 2, "dimension_numbers": NHWC},
    ),
    "kernel dilation": (
        (2, 3, 3, 4),
        (3, 3, 4, 6),
        {"rhs_dilation": (2, 2), "dimension_numbers": NHWC},
    ),
    "input dilation": (
        (2, 1, 1, 4),
        (3, 3, 4, 6),
        {
            "lhs_dilation": (2, 2),
            "padding": ((1, 1), (1, 1)),
            "dimension_numbers": NHWC,
        },
    ),
    "NCHW": ((2, 4, 2, 2), (6, 4, 3, 3), {}),
    "1d": (
        (2, 2, 4),
        (3, 4, 6),
        {"window_strides": (1,), "dimension_numbers": ("NHC", "HIO", "NHC")},
    ),
    "3d": (
        (2, 1, 1, 1, 4),
        (3, 3, 3, 4, 6),
        {
            "window_strides": (1, 1, 1),
            "dimension_numbers": ("NDHWC", "DHWIO", "NDHWC"),
        },
    ),
    "no images": ((0, 2, 2, 4), (3, 3, 4, 6), {"dimension_numbers": NHWC}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_pass_through(name):
    *shapes, options = OTHERS[name]
    lhs, rhs = normal(*shapes)
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    # It is the same operation, so the bits are the same.
    ours, wanted = (
        jax.jit(partial(conv, **options))(lhs, rhs)
        for conv in (conv_general_dilated, lax.conv_general_dilated)
    )
    np.testing.assert_array_equal(ours, wanted)


def test_integers_pass_through():
    lhs, rhs = arrays((2, 2), (3, 3), jnp.int32)
    args, options = (lhs, rhs, (1, 1), "SAME"), {"dimension_numbers": NHWC}
    np.testing.assert_array_equal(
        conv_general_dilated(*args, **options),
        lax.conv_general_dilated(*args, **options),
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_result_has_the_preferred_dtype(dtype, preferred):
    args = (*arrays((2, 2), (3, 3), dtype), (1, 1), "SAME")
    options = {"dimension_numbers": NHWC, "preferred_element_type": preferred}
    actual = conv_general_dilated(*args, **options)
    wanted = lax.conv_general_dilated(*args, **options)
    # XLA may round the images first; the coarsest dtype has 8 bits.
    assert_close([actual], [wanted], 2**-7)


def test_precision_reaches_the_products():
    fn = lambda lhs, rhs: conv_general_dilated(
        lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC, precision="highest"
    )
    text = lowered(fn, *arrays((2, 2), (3, 3)))
    assert "precision = [HIGHEST, HIGHEST]" in text


def test_wrong_shapes_raise_as_in_lax():
    lhs, rhs = jnp.ones((3, 2, 2, 4)), jnp.ones((3, 3, 5, 6))
    with pytest.raises((TypeError, ValueError), match="feature"):
        conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)


def same(lhs, rhs):
    return conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)


def test_derivatives_are_those_of_finite_differences(x64):
    lhs, rhs = arrays((2, 2), (3, 3), jnp.float64, batch=2, channels=2, features=2)
    # The function is bilinear, so central differences are exact up to rounding.
    check = partial(check_grads, order=2, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)
    check(jax.jit(same), (lhs, rhs))


def test_works_under_vmap_scan_pmap_and_remat():
    lhs, rhs = arrays((2, 2), (3, 3), batch=4)
    images = jnp.stack([lhs, 2 * lhs])
    kernels = jnp.stack([rhs, 3 * rhs])
    y = same(lhs, rhs)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # float32, other order of products

    batched = jax.jit(jax.vmap(same))(images, kernels)
    np.testing.assert_allclose(batched, jnp.stack([y, 6 * y]), **tolerance)
    batched = jax.jit(jax.vmap(same, in_axes=(None, 0)))(lhs, kernels)
    np.testing.assert_allclose(batched, jnp.stack([y, 3 * y]), **tolerance)

    _, scanned = lax.scan(lambda c, a: (c, same(a, rhs)), None, images)
    np.testing.assert_allclose(scanned, jnp.stack([y, 2 * y]), **tolerance)

    loss = lambda rhs, lhs: jnp.sum(jnp.sin(same(lhs, rhs)))
    wanted = jax.jit(jax.grad(loss))(rhs, lhs)
    actual = jax.jit(jax.grad(jax.checkpoint(loss)))(rhs, lhs)
    np.testing.assert_allclose(actual, wanted, **tolerance)
    sharded = jax.pmap(
        lambda rhs, lhs: lax.psum(jax.grad(loss)(rhs, lhs), "batch"),
        axis_name="batch",
        in_axes=(None, 0),
        out_axes=None,
    )(rhs, lhs.reshape(2, 2, *lhs.shape[1:]))
    np.testing.assert_allclose(sharded, wanted, **tolerance)


def test_flax_convolution(strict):
    images, _ = arrays((4, 4), (3, 3))
    options = {"strides": 2, "padding": 1}
    plain = nn.Conv(6, (3, 3), **options)
    ours = nn.Conv(6, (3, 3), conv_general_dilated=conv_general_dilated, **options)
    variables = plain.init(jax.random.key(0), images)
    assert "stablehlo.dot_general" in lowered(ours.apply, variables, images)
    np.testing.assert_allclose(
        ours.apply(variables, images),
        plain.apply(variables, images),
        rtol=1e-5,  # sums of 36 products, in another order
        atol=1e-6,
    )


# Spatial input, window, strides, padding.
POOLS = [
    ((16, 16), (3, 3), (2, 2), ((1, 1), (1, 1))),  # of the ImageNet stem
    ((7, 6), (3, 2), (2, 1), ((0, 1), (1, 0))),
    ((5, 5), (2, 2), (2, 2), ((0, 0), (0, 0))),
    ((4, 5), (1, 3), (3, 1), ((0, 0), (2, 2))),
    ((2, 2), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((1, 1), (3, 3), (1, 1), ((2, 2), (1, 1))),  # windows of padding only
    ((3, 8), (5, 4), (3, 2), ((4, 4), (2, 3))),  # one window reaches over both ends
]


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def pooled(pool, x, *window):
    """Returns the maxima, and the pullback of small integers, whose sums are exact."""
    y, pullback = jax.vjp(lambda x: pool(x, *window), x)
    cotangent = (jnp.arange(y.size) * 37 % 101).reshape(y.shape)
    return y, *pullback(cotangent.astype(y.dtype))


# Compiled as a whole; otherwise each operation would be a program.
ours_of, flax_of = (
    jax.jit(pool, static_argnums=(1, 2, 3)) for pool in (max_pool, nn.max_pool)
)


@pytest.mark.parametrize(("size", *"wsp"), POOLS)
@pytest.mark.parametrize("values", ["distinct", "ties"])
def test_max_pool_equals_flax(strict, values, size, w, s, p):
    (x,) = normal((3, *size, 5))
    if values == "ties":  # many zeros, as after a ReLU
        x = jnp.maximum(jnp.round(x), 0)
    ours, wanted = (pooled(pool, x, w, s, p) for pool in (max_pool, nn.max_pool))
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    # Without a derivative, the computation is a different one.
    np.testing.assert_array_equal(ours_of(x, w, s, p), wanted[0])


def test_max_pool_passes_on_what_is_not_finite():
    x = jnp.arange(2 * 36.0).reshape(2, 6, 6, 1)
    x = x.at[0, 0, 0].set(jnp.nan).at[0, 3, 4].set(jnp.nan).at[1].set(-jnp.inf)
    window = (3, 3), (2, 2), ((1, 1), (1, 1))
    wanted = flax_of(x, *window)
    np.testing.assert_array_equal(ours_of(x, *window), wanted)
    np.testing.assert_array_equal(pooled(max_pool, x, *window)[0], wanted)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_max_pool_keeps_the_dtype(x64, dtype):
    (x,) = normal((2, 4, 4, 3), dtype=dtype)
    window = (3, 3), (2, 2), ((1, 1), (1, 1))
    for y in (ours_of(x, *window), pooled(max_pool, x, *window)[0]):
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, flax_of(x, *window))


@pytest.mark.parametrize("padding", [((0, -2), (-1, 3)), ((-2, -1), (2, -4))])
def test_max_pool_of_padding_that_crops(padding):
    (x,) = normal((3, 8, 8, 5))
    wanted = flax_of(x, (3, 3), (2, 2), padding)  # without a gradient
    ours = ours_of(x, (3, 3), (2, 2), padding)
    np.testing.assert_array_equal(ours, wanted)
    derived = pooled(max_pool, x, (3, 3), (2, 2), padding)
    np.testing.assert_array_equal(derived[0], wanted)


def test_max_pool_of_no_rows():
    x, window = jnp.ones((2, 0, 4, 1)), ((3, 3), (1, 1), ((2, 2), (1, 1)))
    np.testing.assert_array_equal(ours_of(x, *window), flax_of(x, *window))


def test_large_windows_are_few_operations():
    fn = lambda x: max_pool(x, (15, 15), (1, 1), "SAME")
    text = lowered(fn, jnp.ones((1, 32, 32, 1)))
    assert text.count("stablehlo.maximum") == 2 * 14


def test_max_pool_keeps_the_accelerators_own():
    (x,) = normal((2, 4, 4, 3))
    fn = lambda x: pooled(max_pool, x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    assert "select_and_scatter" not in lowered(fn, x)
    for platform in ("cuda", "tpu"):
        assert "select_and_scatter" in lowered(fn, x, platform=platform)


@pytest.mark.slow
def test_max_pool_derivatives_and_vmap(x64):
    (x,) = normal((2, 3, 4, 4, 2), dtype=jnp.float64)
    pool = lambda x: max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    check_grads(jax.jit(pool), (x[0],), order=2, modes=("fwd", "rev"), eps=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(pool(x))))
    one_by_one = jax.jit(gradient)
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(gradient))(x), np.stack([one_by_one(one) for one in x])
    )


@pytest.mark.parametrize(
    "x", [np.ones((4, 4, 3), np.float32), np.ones((1, 4, 4, 3), np.int32)]
)
def test_max_pool_names_what_it_does_not_pool(x):
    with pytest.raises(ValueError, match=rf"{x.dtype}\[.*4, 4, 3\]; add the batch"):
        max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (((3, 3, 3), (2, 2), ((1, 1), (1, 1))), r"rows and columns, got \(3, 3, 3\)"),
        (((3, 3), (2, 2), ((1, 1),)), r"rows and columns, .* \(\(1, 1\),\)"),
        (((7, 3), (2, 2), ((1, 1), (0, 0))), r"\(7, 3\) do not fit .* \(6, 4\)"),
    ],
)
def test_max_pool_names_windows_that_it_does_not_know(window, message):
    with pytest.raises(ValueError, match=message):
        max_pool(jnp.ones((1, 4, 4, 2)), *window)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_max_pool_pads_by_name(padding):
    (x,) = normal((2, 5, 6, 3))
    window = (3, 2), (2, 2), padding
    np.testing.assert_array_equal(ours_of(x, *window), flax_of(x, *window))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_relu_equals_jax(strict, dtype):
    x = jnp.array([-jnp.inf, -1.5, -0.0, 0.0, 2.5, jnp.inf], dtype)
    for fn in (lambda fn: fn(x), lambda fn: jax.vmap(jax.grad(fn))(x)):
        ours, wanted = fn(relu), fn(jax.nn.relu)
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, wanted)
    assert jnp.isnan(relu(jnp.array(jnp.nan, dtype)))


KNOWN = (0, 10, 2) <= convolution.jaxlib.version.__version_info__ < (0, 13)
PROGRAM = """
import jax, jax.numpy as jnp
from kddm_jax.numerics.convolution import prefer_eigen
prefer_eigen()
layout = ("NHWC", "HWIO", "NHWC")
conv = lambda x, k: jax.lax.conv_general_dilated(
    x, k, (1, 1), "SAME", dimension_numbers=layout
)
arrays = jnp.ones((8, 8, 8, 32)), jnp.ones((3, 3, 32, 32))
print(jax.jit(conv).lower(*arrays).compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not KNOWN or machine() != "x86_64",
    reason="XLA chooses YNNPACK on x86-64; the option is known of jaxlib 0.10 to 0.12",
)
def test_prefer_eigen_reaches_the_compiler():
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env["JAX_PLATFORMS"] = "cpu"
    compiled = lambda program: (
        subprocess.run(
            [sys.executable, "-c", program],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert "ynn_fusion" in compiled(PROGRAM.replace("prefer_eigen()", ""))
    text = compiled(PROGRAM)
    assert "convolution(" in text
    assert "ynn_fusion" not in text


@pytest.fixture
def installed(monkeypatch):
    """Replaces the installed jaxlib and plug-ins."""

    def pretend(version=(0, 12, 0, 1), libtpu=None, plug_ins=()):
        monkeypatch.setattr(convolution.jaxlib.version, "__version_info__", version)
        monkeypatch.setattr(convolution, "find_spec", lambda name: libtpu)
        found = [types.SimpleNamespace(name=name) for name in plug_ins]
        monkeypatch.setattr(convolution, "entry_points", lambda group: found)

    return pretend


FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, f"{FLAG}=-individual_convolution"),
        ("--a=1 --b", f"--a=1 --b {FLAG}=-individual_convolution"),
        (f"{FLAG}= --b", f"{FLAG}= --b"),
        ("/etc/flags", "/etc/flags"),  # a file of flags
    ],
)
def test_prefer_eigen_adds_to_the_flags(monkeypatch, installed, before, after):
    installed(plug_ins=["xla_cuda12"])
    monkeypatch.setenv("XLA_FLAGS", before or "")
    if before is None:
        monkeypatch.delenv("XLA_FLAGS")
    for _ in range(2):
        prefer_eigen()
        assert os.environ["XLA_FLAGS"] == after


@pytest.mark.parametrize(
    "found",
    [
        {"version": (0, 10, 1)},
        {"version": (0, 13, 0)},
        {"libtpu": "somewhere"},
        {"plug_ins": ["xla_cuda12", "rocm"]},
    ],
)
def test_prefer_eigen_skips_platforms_without_the_option(monkeypatch, installed, found):
    installed(**found)
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    prefer_eigen()
    assert os.environ["XLA_FLAGS"] == "--a=1"
