import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from jax import lax

from kddm_jax.adapters import Outputs, linen_apply
from kddm_jax.resnet import ResNet9, ResNet18, ResNet34

COUNTS = [
    (ResNet9, "cifar", 10, 4_903_242),
    (ResNet18, "cifar", 10, 11_173_962),
    (ResNet34, "cifar", 10, 21_282_122),
    # torchvision's own networks, resnet18() and resnet34().
    (ResNet18, "imagenet", 1000, 11_689_512),
    (ResNet34, "imagenet", 1000, 21_797_672),
]


def shapes(model, images):
    return jax.eval_shape(model.init, jax.random.key(0), images)


def random_images(batch, size, channels):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(batch, size, size, channels)), jnp.float32)


def random_variables(model, images):
    """Makes variables of the size of initial ones, but without zeros and ones.

    They are from NumPy, because XLA compiles `model.init` for seconds.
    """
    rng = np.random.default_rng(1)

    def leaf(shape):
        if len(shape) == 1:
            return rng.uniform(0.5, 1.0, shape)
        return rng.normal(size=shape) / math.sqrt(math.prod(shape[:-1]))

    return jax.tree.map(
        lambda a: jnp.asarray(leaf(a.shape), a.dtype), shapes(model, images)
    )


@partial(jax.jit, static_argnums=0, static_argnames="train")
def run(model, variables, images, *, train=False):
    """Returns outputs and batch statistics."""
    return linen_apply(model)(variables, images, train=train)


@pytest.mark.parametrize(("network", "stem", "num_classes", "count"), COUNTS)
def test_parameter_counts(network, stem, num_classes, count):
    model = network(num_classes=num_classes, stem=stem)
    params = shapes(model, jnp.zeros((1, 32, 32, 3)))["params"]
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(params)) == count


def test_parameter_names_are_those_of_torchvision():
    variables = shapes(ResNet18(stem="imagenet"), jnp.zeros((1, 32, 32, 3)))
    paths = jax.tree.leaves_with_path(variables["params"])
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths
    }
    # Modules of torchvision's resnet18(), as listed by named_modules().
    block = ["conv1", "bn1", "conv2", "bn2"]
    modules = {"conv1", "bn1", "fc"}
    for stage in (1, 2, 3, 4):
        modules |= {f"layer{stage}.{i}.{name}" for i in (0, 1) for name in block}
    for stage in (2, 3, 4):
        modules |= {f"layer{stage}.0.downsample.{i}" for i in (0, 1)}
    parents = {name.rsplit("/", 1)[0] for name in names}
    assert {name.replace("_", ".").replace("/", ".") for name in parents} == modules


BLOCKS = ["stage1_block1", "stage2_block1", "stage3_block1", "stage4_block1"]


@pytest.mark.parametrize(
    ("stem", "size", "channels", "sides"),
    [
        ("cifar", 32, 3, [32, 32, 16, 8, 4]),
        ("cifar", 8, 1, [8, 8, 4, 2, 1]),
        ("imagenet", 32, 3, [8, 8, 4, 2, 1]),
        ("imagenet", 224, 3, [56, 56, 28, 14, 7]),
        ("imagenet", 8, 1, [2, 2, 1, 1, 1]),
    ],
)
def test_shapes_of_maps(stem, size, channels, sides):
    model = ResNet9(num_classes=7, stem=stem, width=4)
    images = jnp.zeros((2, size, size, channels))
    outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert isinstance(outputs, Outputs)
    assert outputs.logits.shape == (2, 7)
    assert outputs.features.shape == (2, 32)
    assert {name: a.shape for name, a in outputs.maps.items()} == {
        name: (2, side, side, channels)
        for name, side, channels in zip(
            ["stem", *BLOCKS], sides, [4, 4, 8, 16, 32], strict=True
        )
    }


@pytest.mark.parametrize(
    ("network", "counts"), [(ResNet18, [2, 2, 2, 2]), (ResNet34, [3, 4, 6, 3])]
)
def test_names_of_maps(network, counts):
    outputs, _ = jax.eval_shape(
        network(width=4).init_with_output, jax.random.key(0), jnp.zeros((1, 8, 8, 1))
    )
    assert set(outputs.maps) == {"stem"} | {
        f"stage{stage}_block{block}"
        for stage, count in enumerate(counts, 1)
        for block in range(1, count + 1)
    }


# An independent forward pass in float64 by NumPy; a convolution is a sum over taps.


def numpy_norm(x, params, stats, train):
    mean = x.mean((0, 1, 2)) if train else stats["mean"]
    var = x.var((0, 1, 2)) if train else stats["var"]
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def numpy_pool(x):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    h, w = ((n - 1) // 2 + 1 for n in x.shape[1:3])
    rows = [
        [padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(w)]
        for i in range(h)
    ]
    return np.moveaxis(np.array(rows), 2, 0)


def numpy_block(x, params, stats, stride, train):
    norm = lambda x, name: numpy_norm(x, params[name], stats[name], train)
    y = norm(reference.convolve(x, params["conv1"]["kernel"], stride), "bn1")
    y = norm(reference.convolve(np.maximum(y, 0), params["conv2"]["kernel"], 1), "bn2")
    if "downsample_0" in params:
        kernel = params["downsample_0"]["kernel"]
        x = norm(reference.convolve(x, kernel, stride), "downsample_1")
    return np.maximum(x + y, 0)


def numpy_resnet9(variables, images, stem, train):
    variables = jax.tree.map(np.float64, variables)
    params, stats = variables["params"], variables["batch_stats"]
    x = np.float64(images)
    x = reference.convolve(x, params["conv1"]["kernel"], 2 if stem == "imagenet" else 1)
    x = np.maximum(numpy_norm(x, params["bn1"], stats["bn1"], train), 0)
    if stem == "imagenet":
        x = numpy_pool(x)
    maps = {"stem": x}
    for stage in (1, 2, 3, 4):
        name = f"layer{stage}_0"
        stride = 1 if stage == 1 else 2
        x = numpy_block(x, params[name], stats[name], stride, train)
        maps[f"stage{stage}_block1"] = x
    features = x.mean((1, 2))
    return Outputs(
        features @ params["fc"]["kernel"] + params["fc"]["bias"], features, maps
    )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("stem", "size"), [("cifar", 8), ("imagenet", 17)])
def test_equals_numpy(strict, stem, size, train):
    model = ResNet9(num_classes=3, stem=stem, width=4)
    images = random_images(6, size, 2)
    variables = random_variables(model, images)
    outputs, _ = run(model, variables, images, train=train)
    wanted = numpy_resnet9(variables, images, stem, train)
    # float32 through ten normalized layers. The last maps have 6 values per channel to
    # normalize with, whose variance may be small.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4),
        outputs,
        wanted,
    )


@pytest.mark.slow
def test_initial_values():
    model = ResNet9(width=32)

    @jax.jit
    def init(key):  # XLA does not compute unused values
        params = model.init(key, jnp.zeros((1, 8, 8, 1)))["params"]
        return params["layer4_0"]["conv2"]["kernel"], params["fc"], params["bn1"]

    kernel, dense, norm = init(jax.random.key(0))
    # The deviation of 590,000 normal values [3, 3, 256, 256] is known to 0.1 %.
    assert np.std(kernel) == pytest.approx(math.sqrt(2 / (9 * 256)), rel=5e-3)
    assert np.abs(kernel).max() > 4 * np.std(kernel)  # not a truncated normal
    assert 0.9 / 16 < np.abs(dense["kernel"]).max() <= 1 / 16  # [256, 10]
    np.testing.assert_array_equal(dense["bias"], 0)
    np.testing.assert_array_equal(norm["scale"], 1)
    chex.assert_trees_all_equal(init(jax.random.key(0)), (kernel, dense, norm))
    assert not np.array_equal(init(jax.random.key(1))[0], kernel)


@pytest.mark.slow
def test_bfloat16_keeps_float32_around_it():
    images = random_images(4, 8, 1)
    model = ResNet9(width=4, dtype=jnp.bfloat16)
    variables = random_variables(model, images)
    outputs, stats = run(model, variables, images, train=True)
    chex.assert_tree_all_finite(outputs)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    assert outputs.logits.dtype == outputs.features.dtype == jnp.float32
    assert {a.dtype for a in outputs.maps.values()} == {jnp.dtype("bfloat16")}
    # 8 bits through ten layers give errors of a few percent of the largest feature.
    full, _ = run(ResNet9(width=4), variables, images)
    half, _ = run(model, variables, images)
    scale = float(jnp.abs(full.features).max())
    np.testing.assert_allclose(half.features, full.features, atol=0.05 * scale)
    assert not np.array_equal(half.features, full.features)


def test_float64(x64):
    images = jnp.ones((2, 8, 8, 1))
    model = ResNet9(width=4, dtype=jnp.float64)
    outputs, variables = jax.eval_shape(
        model.init_with_output, jax.random.key(0), images
    )
    assert outputs.logits.dtype == outputs.features.dtype == jnp.float64
    chex.assert_trees_all_equal_dtypes(
        variables, jax.tree.map(lambda a: a.update(dtype=jnp.float32), variables)
    )


def test_training_updates_batch_stats():
    images = 3 + 2 * random_images(16, 8, 1)
    model = ResNet9(width=4)
    variables = random_variables(model, images)
    _, stats = run(model, variables, images, train=True)
    chex.assert_trees_all_equal_shapes(stats, variables["batch_stats"])
    for new, old in zip(
        jax.tree.leaves(stats), jax.tree.leaves(variables["batch_stats"]), strict=True
    ):
        assert not np.array_equal(new, old)
    # The new statistics have a weight of one tenth.
    x = reference.convolve(
        np.float64(images), np.float64(variables["params"]["conv1"]["kernel"]), 1
    )
    old = variables["batch_stats"]["bn1"]
    for name, batch in {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}.items():
        np.testing.assert_allclose(
            stats["bn1"][name], 0.9 * old[name] + 0.1 * batch, rtol=1e-5
        )


@pytest.mark.slow
def test_batch_norm_over_two_devices_is_that_of_the_whole_batch():
    images = random_images(8, 8, 1)
    # The halves have different statistics, and would disagree without synchronization.
    images = images.at[4:].multiply(3.0)
    alone, synced = ResNet9(width=4), ResNet9(width=4, axis_name="batch")
    variables = random_variables(alone, images)

    def step(model, variables, images):
        def loss(params):
            outputs, stats = linen_apply(model)(
                {**variables, "params": params}, images, train=True
            )
            return jnp.mean(jnp.sin(outputs.logits)), (outputs.logits, stats)

        return jax.grad(loss, has_aux=True)(variables["params"])

    def synced_step(variables, images):
        grads, (logits, stats) = step(synced, variables, images)
        return lax.pmean(grads, "batch"), (logits, stats)

    grads, (logits, stats) = jax.pmap(
        synced_step,
        axis_name="batch",
        in_axes=(None, 0),
        out_axes=(None, (0, None)),
    )(variables, images.reshape(2, 4, *images.shape[1:]))
    wanted_grads, (wanted, wanted_stats) = jax.jit(partial(step, alone))(
        variables, images
    )
    # float32 sums in another order, through ten layers. Gradients are compared relative
    # to the largest entry of their tensor, because entries cancel.
    np.testing.assert_allclose(
        logits.reshape(wanted.shape), wanted, rtol=1e-3, atol=1e-4
    )
    chex.assert_trees_all_close(stats, wanted_stats, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * float(jnp.abs(b).max()))
    for a in jax.tree.leaves(stats):
        shards = [np.asarray(shard.data) for shard in a.addressable_shards]
        assert len(shards) == 2
        np.testing.assert_array_equal(*shards)
    half, _ = run(alone, variables, images[:4], train=True)
    assert jnp.abs(half.logits - wanted[:4]).max() > 0.01


def test_synchronised_network_initialises_and_evaluates_outside_of_pmap():
    images = random_images(2, 8, 1)
    alone, synced = ResNet9(width=4), ResNet9(width=4, axis_name="batch")
    init = partial(synced.init, train=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(init, jax.random.key(0), images), shapes(alone, images)
    )
    variables = random_variables(alone, images)
    chex.assert_trees_all_equal(
        run(synced, variables, images), run(alone, variables, images)
    )


def test_same_inputs_same_outputs():
    images = random_images(2, 8, 1)
    model = ResNet9(width=4)
    variables = random_variables(model, images)
    first, second = (run(model, variables, images, train=True) for _ in range(2))
    chex.assert_trees_all_equal(first, second)
    # Models with equal options are equal, so as static arguments they are traced once.
    assert ResNet9(width=4) == model
    assert hash(ResNet9(width=4)) == hash(model)


def test_evaluation_treats_images_one_by_one():
    images = random_images(4, 8, 1)
    model = ResNet9(width=4)
    variables = random_variables(model, images)
    whole, _ = run(model, variables, images)
    one, _ = run(model, variables, images[2:3])
    # float32, perhaps with other blocks of products
    np.testing.assert_allclose(whole.logits[2:3], one.logits, rtol=1e-4, atol=1e-5)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        features = nn.BatchNorm(momentum=0.9, use_running_average=not train)(images)
        return Outputs(features, features, {})


def test_linen_apply_gives_back_statistics():
    images = jnp.full((4, 2, 2, 1), 5.0)
    variables = Normalised().init(jax.random.key(0), images)
    apply = linen_apply(Normalised())

    outputs, stats = apply(variables, images, train=False)
    assert stats is variables["batch_stats"]
    # The running mean is still 0, and the variance 1 plus 1e-5.
    np.testing.assert_allclose(outputs.features, 5.0, rtol=1e-5)

    outputs, stats = apply(variables, images, train=True)
    np.testing.assert_allclose(outputs.features, 0.0, atol=1e-5)
    np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(variables["batch_stats"]["BatchNorm_0"]["mean"], 0)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        features = images.mean((1, 2)) * (2 if train else 1)
        return Outputs(nn.Dense(3)(features), features, {})


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("given", [{}, {"batch_stats": {}}])
def test_linen_apply_without_statistics(train, given):
    images = jnp.ones((2, 4, 4, 1))
    variables = Linear().init(jax.random.key(0), images) | given
    outputs, stats = linen_apply(Linear())(variables, images, train=train)
    assert stats == {}
    np.testing.assert_array_equal(outputs.features, 2.0 if train else 1.0)


ERRORS = [
    ({"stem": "cfar"}, r"^stem must be one of 'cifar', 'imagenet', got 'cfar'"),
    ({"width": 0}, r"^width must be a positive int, got 0"),
    ({"num_classes": -1}, r"^num_classes must be a positive int, got -1"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ResNet18(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"^images must have .*, got \[8, 8, 3\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"^images must be floating .*, got uint8"),
    ],
)
def test_wrong_images_raise(images, message):
    with pytest.raises(ValueError, match=message) as error:
        ResNet9(width=4).init(jax.random.key(0), images)
    assert "\n" not in str(error.value)


def test_small_maps_are_not_convolved_on_the_cpu():
    images = jnp.zeros((2, 8, 8, 1))
    model = ResNet9(width=4)
    variables = shapes(model, images)
    text = jax.jit(model.apply).lower(variables, images).as_text()
    # Sides are 8, 8, 4, 2 and 1. The convolutions are the stem, two in stage 1, two in
    # stage 2, and the projections; the 3x3 kernels of stages 3 and 4 are products.
    assert text.count("stablehlo.convolution") == 1 + 2 + 2 + 3
