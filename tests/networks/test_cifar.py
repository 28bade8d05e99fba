"""Compares the networks of CIFAR's tables with published counts, and with NumPy."""

import math
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from kddm_jax.adapters import linen_apply
from kddm_jax.networks import cifar, vgg

slow = pytest.mark.slow
# Numbers of parameters of RepDistiller's networks in PyTorch, for 100 classes.
COUNTS = {
    cifar.ResNet20: 278_324,
    cifar.ResNet32: 472_756,
    cifar.ResNet56: 861_620,
    cifar.ResNet110: 1_736_564,
    cifar.ResNet8x4: 1_233_540,
    cifar.ResNet32x4: 7_433_860,
    cifar.WRN16x2: 703_284,
    cifar.WRN40x1: 569_780,
    cifar.WRN40x2: 2_255_156,
    vgg.VGG8: 3_965_028,
    vgg.VGG13: 9_462_180,
}
QUICK = (cifar.ResNet20, cifar.ResNet8x4, cifar.WRN16x2, vgg.VGG8, vgg.VGG13)
TINY = {
    "residual": cifar.CifarResNet(width=4, blocks=1, channels=(16, 32, 64, 64)),
    "preactivation": cifar.CifarResNet(
        width=4, blocks=2, channels=(16, 16, 16, 32), preactivation=True
    ),
    "vgg": vgg.VGG(width=2, convolutions=2),
}


@cache
def traced(model, shape=(2, 32, 32, 3)):
    """Returns the shapes of outputs and variables."""
    fn = partial(model.init_with_output, jax.random.key(0))
    return jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, jnp.float32))


def random_variables(model, shape):
    """Makes variables of the size of initial ones, but without zeros and ones."""
    rng = np.random.default_rng(1)

    def leaf(a):
        if len(a.shape) == 1:
            return rng.uniform(0.5, 1.0, a.shape).astype("f4")
        size = math.sqrt(math.prod(a.shape[:-1]))
        return (rng.normal(size=a.shape) / size).astype("f4")

    return jax.tree.map(leaf, traced(model, shape)[1])


@pytest.mark.parametrize(
    "network",
    [pytest.param(n, marks=() if n in QUICK else slow) for n in COUNTS],
)
def test_parameter_counts(network):
    params = traced(network(num_classes=100))[1]["params"]
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(params))
    assert count == COUNTS[network]


def stages(blocks, channels, sides=(32, 16, 8)):
    return {
        f"stage{stage}_block{block}": (2, side, side, width)
        for stage, (side, width) in enumerate(zip(sides, channels, strict=True), 1)
        for block in range(1, blocks + 1)
    }


VGG_BLOCKS = zip((32, 16, 8, 4, 4), (64, 128, 256, 512, 512), strict=True)
MAPS = {
    cifar.ResNet20: {"stem": (2, 32, 32, 16), **stages(3, (16, 32, 64))},
    cifar.ResNet8x4: {"stem": (2, 32, 32, 32), **stages(1, (64, 128, 256))},
    cifar.WRN16x2: {
        **{"stem": (2, 32, 32, 16), "last": (2, 8, 8, 128)},
        **stages(2, (32, 64, 128)),
    },
    vgg.VGG13: {f"block{i}": (2, s, s, c) for i, (s, c) in enumerate(VGG_BLOCKS, 1)},
}


@pytest.mark.parametrize("network", MAPS)
def test_shapes_of_maps(network):
    outputs = traced(network(num_classes=100))[0]
    assert outputs.logits.shape == (2, 100)
    assert {name: a.shape for name, a in outputs.maps.items()} == MAPS[network]
    assert outputs.features.shape == (2, max(c for *_, c in MAPS[network].values()))


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (cifar.ResNet20, {"stem": 4, "stage1_block1": 4, "stage3_block3": 16}),
        (cifar.ResNet8x4, {"stem": 8, "stage1_block1": 16, "stage3_block1": 64}),
        (cifar.WRN16x2, {"stem": 4, "stage1_block1": 8, "stage3_block2": 32}),
        (vgg.VGG8, {"block1": 16, "block2": 32, "block4": 128, "block5": 128}),
    ],
)
def test_width_16_has_a_quarter_of_the_channels(network, found):
    maps = traced(network(width=16), (2, 8, 8, 1))[0].maps
    assert {name: maps[name].shape[-1] for name in found} == found


class Reference:
    """Computes the networks in float64, after RepDistiller's resnet.py, wrn.py, vgg.py.

    Attributes:
      params: parameters of the network or of a block.
      stats: running statistics of the same module.
      train: whether BatchNorm uses the statistics of the batch.
    """

    def __init__(self, params, stats, train):
        self.params, self.stats, self.train = params, stats, train

    def block(self, name):
        return Reference(self.params[name], self.stats[name], self.train)

    def conv(self, x, name, stride=1):
        layer = self.params[name]
        return reference.convolve(x, layer["kernel"], stride) + layer.get("bias", 0)

    def norm(self, x, name):
        at = self.params[name], self.stats[name]
        return reference.batch_norm(x, *at, self.train)

    def rectified(self, x, name):
        return np.maximum(self.norm(x, name), 0)

    def basic(self, x, stride):
        y = self.rectified(self.conv(x, "conv1", stride), "bn1")
        y = self.norm(self.conv(y, "conv2"), "bn2")
        if "downsample_0" in self.params:
            x = self.norm(self.conv(x, "downsample_0", stride), "downsample_1")
        return np.maximum(x + y, 0)

    def preactivated(self, x, stride):
        y = self.rectified(x, "bn1")
        if "downsample_0" in self.params:
            x = self.conv(y, "downsample_0", stride)
        y = self.rectified(self.conv(y, "conv1", stride), "bn2")
        return x + self.conv(y, "conv2")

    def classify(self, x):
        features = x.mean((1, 2))
        layer = self.params["fc"]
        return features, features @ layer["kernel"] + layer["bias"]

    def residual(self, x):
        x = self.rectified(self.conv(x, "conv1"), "bn1")
        for stage in (1, 2, 3):
            x = self.block(f"layer{stage}_0").basic(x, 1 if stage == 1 else 2)
        return self.classify(x)

    def preactivation(self, x):
        x = self.conv(x, "conv1")
        for stage in (1, 2, 3):
            x = self.block(f"layer{stage}_0").preactivated(x, 1 if stage == 1 else 2)
            x = self.block(f"layer{stage}_1").preactivated(x, 1)
        return self.classify(self.rectified(x, "bn1"))

    def vgg(self, x):
        for block in range(1, 6):
            if block in (2, 3, 4):
                b, h, w, c = x.shape
                x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
            for i in (1, 2):
                x = self.conv(x, f"conv{block}_{i}")
                x = self.rectified(x, f"bn{block}_{i}")
        return self.classify(x)


@pytest.mark.parametrize("train", [pytest.param(False, marks=slow), True])
@pytest.mark.parametrize("name", TINY)
def test_outputs_equal_numpy(strict, name, train):
    model, shape = TINY[name], (4, 16, 16, 3)
    variables = random_variables(model, shape)
    images = np.random.default_rng(0).normal(size=shape).astype("f4")
    outputs, _ = jax.jit(partial(linen_apply(model), train=train))(variables, images)
    params, stats = (
        jax.tree.map(np.float64, variables[kind]) for kind in ("params", "batch_stats")
    )
    features, logits = getattr(Reference(params, stats, train), name)(
        np.float64(images)
    )
    # float32 through at most fourteen convolutions.
    np.testing.assert_allclose(outputs.features, features, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", TINY)
def test_dtypes(name, dtype):
    model, shape = TINY[name].clone(dtype=jnp.dtype(dtype)), (2, 8, 8, 1)
    variables = traced(model, shape)[1]
    run = partial(linen_apply(model), train=True)
    outputs, stats = jax.eval_shape(run, variables, jnp.zeros(shape))
    around = jax.tree.leaves((variables, stats))
    assert {a.dtype for a in around} == {jnp.dtype("float32")}
    assert outputs.logits.dtype == outputs.features.dtype == jnp.float32
    assert {a.dtype for a in outputs.maps.values()} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", TINY)
def test_batch_norm_is_over_the_named_axis(name):
    model, images = TINY[name].clone(axis_name="batch"), jnp.zeros((2, 8, 8, 1))
    variables = traced(model, images.shape)[1]
    run = partial(linen_apply(model), train=True)
    with pytest.raises(NameError, match="batch"):
        jax.eval_shape(run, variables, images)
    mapped = jax.vmap(run, in_axes=(None, 0), axis_name="batch", out_axes=(0, None))
    _, stats = jax.eval_shape(mapped, variables, images[:, None])
    chex.assert_trees_all_equal_shapes(stats, variables["batch_stats"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: cifar.ResNet20(width=6),
            "^width must be a multiple of 4, got 6: .* 8$",
        ),
        (lambda: cifar.WRN16x2(width=0), "^width must be a positive int, got 0"),
        (lambda: vgg.VGG8(num_classes=0), "^num_classes must be a positive int, got 0"),
        (lambda: traced(vgg.VGG8(), (1, 7, 9, 3)), "^images must .* got 7 x 9; resize"),
        (lambda: traced(vgg.VGG8(), (7, 9, 3)), r"^images must .*, got \[7, 9, 3\]"),
        (lambda: traced(cifar.ResNet20(), (7, 9, 3)), r"^images must .* \[7, 9, 3\]"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
