"""Compares MobileNetV2 with the paper's table, torchvision's names, and NumPy."""

import math
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from kddm_jax.adapters import Outputs, linen_apply, make_layers
from kddm_jax.networks.mobilenet import InvertedResidual, MobileNetV2, Stage

slow = pytest.mark.slow
BLOCKS = [f"block{i}" for i in range(1, 18)]
# Table 2 of the paper, block by block.
CHANNELS = [16, *[24] * 2, *[32] * 3, *[64] * 4, *[96] * 3, *[160] * 3, 320]


@cache
def traced(model, shape):
    """Returns the shapes of outputs and variables; tracing takes most of a second."""
    fn = partial(model.init_with_output, jax.random.key(0))
    return jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, jnp.float32))


def shapes(model, images):
    return traced(model, images.shape)[1]


def outputs_of(model, images):
    return traced(model, images.shape)[0]


def random_like(tree, seed=1):
    """Makes variables of the size of initial ones, but without zeros and ones."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        if len(shape) == 1:
            return rng.uniform(0.5, 1.0, shape)
        return rng.normal(size=shape) / math.sqrt(math.prod(shape[:-1]))

    return jax.tree.map(lambda a: leaf(a.shape).astype(a.dtype), tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "count"),
    [
        # torchvision's mobilenet_v2(), also with width_mult 0.5 and 0.75.
        ({"num_classes": 1000, "stem": "imagenet"}, 3_504_872),
        ({"num_classes": 1000, "stem": "imagenet", "width": 32}, 1_968_680),
        ({"num_classes": 1000, "stem": "imagenet", "width": 48}, 2_636_424),
        # The stems differ only in strides; there are 990 classes of 1281 parameters
        # fewer.
        ({"num_classes": 10, "stem": "cifar"}, 3_504_872 - 990 * 1281),
    ],
)
def test_parameter_counts(options, count):
    params = shapes(MobileNetV2(**options), jnp.zeros((1, 32, 32, 3)))["params"]
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(params)) == count


def test_parameter_names_are_those_of_torchvision():
    params = shapes(MobileNetV2(width=4), jnp.zeros((1, 8, 8, 3)))["params"]
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(params)
    ]
    # Modules of torchvision's mobilenet_v2(), as listed by named_modules().
    modules = {"features.0.0", "features.0.1", "features.18.0", "features.18.1"}
    modules |= {f"features.1.conv.{name}" for name in ("0.0", "0.1", "1", "2")}
    parts = ("0.0", "0.1", "1.0", "1.1", "2", "3")
    modules |= {f"features.{i}.conv.{name}" for i in range(2, 18) for name in parts}
    modules |= {"classifier.1"}
    parents = {path.rsplit("/", 1)[0] for path in paths}
    assert {name.replace("_", ".").replace("/", ".") for name in parents} == modules


@pytest.mark.parametrize(
    ("stem", "size", "sides"),
    [
        # Side of the stem's map, and after the stages of 1, 2, 3, 4, 3, 3 and 1 blocks.
        ("imagenet", 224, [112, 112, 56, 28, 14, 14, 7, 7]),
        pytest.param("imagenet", 32, [16, 16, 8, 4, 2, 2, 1, 1], marks=slow),
        pytest.param("cifar", 32, [32, 32, 32, 16, 8, 8, 4, 4], marks=slow),
        pytest.param("cifar", 8, [8, 8, 8, 4, 2, 2, 1, 1], marks=slow),
    ],
)
def test_shapes_of_maps(stem, size, sides):
    model = MobileNetV2(num_classes=7, stem=stem)
    outputs = outputs_of(model, jnp.zeros((2, size, size, 3)))
    assert isinstance(outputs, Outputs)
    assert outputs.logits.shape == (2, 7)
    assert outputs.features.shape == (2, 1280)
    first, *stages = sides
    of_block = np.repeat(stages, [1, 2, 3, 4, 3, 3, 1])
    wanted = {"stem": (2, first, first, 32), "last": (2, sides[-1], sides[-1], 1280)}
    for name, side, channels in zip(BLOCKS, of_block, CHANNELS, strict=True):
        wanted[name] = (2, side, side, channels)
    assert {name: a.shape for name, a in outputs.maps.items()} == wanted


@pytest.mark.slow
def test_width_scales_all_channels_but_the_last():
    outputs = outputs_of(MobileNetV2(width=32), jnp.zeros((1, 8, 8, 1)))
    found = [outputs.maps[name].shape[-1] for name in ("stem", *BLOCKS, "last")]
    # Half as many; 12 is rounded up to a multiple of 8.
    wanted = [8, 16, 16, *[16] * 3, *[32] * 4, *[48] * 3, *[80] * 3, 160]
    assert found == [16, *wanted, 1280]
    wide = outputs_of(MobileNetV2(width=128), jnp.zeros((1, 8, 8, 1)))
    assert wide.features.shape == (1, 2560)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("expansion", "features", "stride"), [(1, 3, 1), (6, 5, 1), (6, 3, 1), (6, 3, 2)]
)
def test_block_equals_numpy(strict, train, expansion, features, stride):
    layers = make_layers(train=train, dtype=jnp.float32, axis_name=None)
    block = InvertedResidual(features, stride, expansion, layers)
    x = 9 * np.random.default_rng(0).normal(size=(4, 5, 6, 3)).astype(np.float32)
    variables = random_like(shapes(block, x))

    @jax.jit
    def run(variables, x):
        return block.apply(variables, x, mutable=["batch_stats"])[0]

    params, stats = (
        jax.tree.map(np.float64, variables[name]) for name in ("params", "batch_stats")
    )
    wanted = reference.inverted_residual(
        np.float64(x), params, stats, stride=stride, train=train
    )
    # float32 through three normalized layers, with values up to about 50.
    np.testing.assert_allclose(run(variables, x), wanted, rtol=1e-4, atol=5e-4)


def cross_entropy(logits, labels):
    of_label = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -jnp.mean(of_label)


def train(model, images, labels, steps, rate=2e-3):  # suits 1280 features
    """Returns first and last variables, losses, and the last outputs and gradients."""

    @jax.jit
    def step(variables):
        def loss(params):
            given = {**variables, "params": params}
            outputs, stats = linen_apply(model)(given, images, train=True)
            return cross_entropy(outputs.logits, labels), (outputs, stats)

        (value, (outputs, stats)), grads = jax.value_and_grad(loss, has_aux=True)(
            variables["params"]
        )
        params = jax.tree.map(lambda p, g: p - rate * g, variables["params"], grads)
        return {"params": params, "batch_stats": stats}, value, outputs, grads

    first = variables = random_like(shapes(model, images))
    losses = []
    for _ in range(steps):
        variables, value, outputs, grads = step(variables)
        losses.append(float(value))
    return first, variables, losses, outputs, grads


SMALL = (Stage(1, 16, 1, 1), Stage(6, 24, 2, 2))


def random_batch(size=6):
    images, labels = (
        np.random.default_rng(0).normal(size=(8, size, size, 1)),
        [0, 1] * 4,
    )
    images[1::2] += 1  # distinguishes the classes
    return images.astype(np.float32), jnp.array(labels)


@pytest.mark.slow
def test_training_step():
    model = MobileNetV2(num_classes=2, width=4, stages=SMALL)
    first, last, losses, outputs, _ = train(model, *random_batch(), steps=8)
    assert losses[-1] < 0.5 * losses[0]
    old, new = first["batch_stats"], last["batch_stats"]
    chex.assert_trees_all_equal_shapes_and_dtypes(old, new)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert not np.array_equal(a, b)
    assert set(outputs.maps) == {"stem", "block1", "block2", "block3", "last"}
    np.testing.assert_allclose(
        outputs.features, np.mean(outputs.maps["last"], (1, 2)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_training_step_of_all_blocks():
    model = MobileNetV2(num_classes=2, width=4)
    _, _, losses, _, grads = train(model, *random_batch(16), steps=4)
    assert losses[-1] < 0.8 * losses[0]
    chex.assert_tree_all_finite(grads)


def test_which_maps_are_rectified():
    model = MobileNetV2(num_classes=2, width=4, stages=SMALL)
    images, _ = random_batch()
    outputs = jax.jit(model.apply)(random_like(shapes(model, images)), 30 * images)
    for name, values in outputs.maps.items():
        if name in ("stem", "last"):  # images with a deviation of 30 reach both ends
            assert (values.min(), values.max()) == (0, 6)
        else:  # bottlenecks are linear
            assert values.min() < 0
            assert values.max() > 6


@pytest.mark.slow
def test_depthwise_convolutions_are_not_convolved_on_the_cpu():
    images = jnp.zeros((2, 16, 16, 3))
    model = MobileNetV2(width=4)
    text = jax.jit(model.apply).lower(shapes(model, images), images).as_text()
    # The stem, the 1x1 convolutions (two in each block, one in the first), and the
    # last.
    assert text.count("stablehlo.convolution") == 1 + 1 + 2 * 16 + 1
    assert text.count("stablehlo.convolution") == text.count("feature_group_count = 1 ")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype):
    model = MobileNetV2(width=4, stages=SMALL, dtype=jnp.dtype(dtype))
    images = jnp.zeros((2, 8, 8, 1))
    run = partial(linen_apply(model), train=True)
    outputs, stats = jax.eval_shape(run, shapes(model, images), images)
    around = jax.tree.leaves((shapes(model, images), stats))
    assert {a.dtype for a in around} == {jnp.dtype("float32")}
    assert outputs.logits.dtype == outputs.features.dtype == jnp.float32
    assert {a.dtype for a in outputs.maps.values()} == {jnp.dtype(dtype)}


def test_batch_norm_is_over_the_named_axis():
    images = jnp.zeros((2, 8, 8, 1))
    alone = MobileNetV2(width=4, stages=SMALL)
    synced = alone.clone(axis_name="batch")
    variables = shapes(alone, images)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, shapes(synced, images))
    jax.eval_shape(partial(linen_apply(synced), train=False), variables, images)
    run = partial(linen_apply(synced), train=True)
    with pytest.raises(NameError, match="batch"):
        jax.eval_shape(run, variables, images)
    mapped = jax.vmap(run, in_axes=(None, 0), axis_name="batch", out_axes=(0, None))
    outputs, stats = jax.eval_shape(mapped, variables, images[:, None])
    assert outputs.logits.shape == (2, 1, 10)
    chex.assert_trees_all_equal_shapes(stats, variables["batch_stats"])


@pytest.mark.slow
def test_initial_values():
    model = MobileNetV2(num_classes=100)

    @jax.jit
    def init(key):  # XLA does not compute unused values
        params = model.init(key, jnp.zeros((1, 8, 8, 1)))["params"]
        return params["features_18_0"]["kernel"], params["classifier_1"]

    kernel, dense = init(jax.random.key(0))
    # About 100,000 normal values each, whose deviation is known to 0.3 %.
    assert np.std(kernel) == pytest.approx(math.sqrt(2 / 1280), rel=0.01)
    assert np.std(dense["kernel"]) == pytest.approx(0.01, rel=0.01)
    np.testing.assert_array_equal(dense["bias"], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "cfar"}, r"^stem must be one of 'cifar', 'imagenet', got 'cfar'"),
        ({"width": 0}, r"^width must be a positive int, got 0"),
        ({"num_classes": -1}, r"^num_classes must be a positive int, got -1"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=message) as error:
        MobileNetV2(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"^images must have .*, got \[8, 8, 3\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"^images must be floating .*, got uint8"),
    ],
)
def test_wrong_images_raise(images, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(MobileNetV2(width=4).init, jax.random.key(0), images)
