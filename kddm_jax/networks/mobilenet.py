"""Defines MobileNetV2 with its features and the maps of every block as outputs.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
arXiv:1801.04381. An inverted residual widens the image t times by a 1x1 convolution,
convolves each channel separately (3x3, depthwise), and narrows the image again by a 1x1
convolution without ReLU. If input and output have the same shape, the input is added.
Padding, initialization and parameter names are torchvision's: for example,
`features_2/conv_1_0/kernel` is torchvision's `features.2.conv.1.0.weight`. There is no
dropout, and Flax averages the biased variance. Images are NHWC and normalized.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from kddm_jax.adapters import (
    Layers,
    Outputs,
    check_images,
    check_positive,
    check_stem,
    classify,
    make_layers,
)


class Stage(NamedTuple):
    """Describes the blocks of one width, a line of the paper's table 2."""

    expansion: int  # t
    features: int  # c
    blocks: int  # n
    stride: int  # s, of the first block


STAGES: tuple[Stage, ...] = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)

# Number of the first strides of 2 that a stem replaces by 1.  With "cifar", images of
# 32 pixels are halved only three times and end with 4x4 pixels, as in a ResNet.
STRIDES_LEFT_OUT: Mapping[str, int] = {"imagenet": 0, "cifar": 2}


def _strides(stem: str, stages: tuple[Stage, ...]) -> list[int]:
    """Returns the stride of the first convolution and of each stage."""
    strides = [2, *(stage.stride for stage in stages)]
    halvings = [i for i, stride in enumerate(strides) if stride > 1]
    for i in halvings[: STRIDES_LEFT_OUT[stem]]:
        strides[i] = 1
    return strides


def scaled(channels: int, multiplier: float) -> int:
    """Scales a number of channels to a multiple of 8 that is at most 10 % too small.

    Args:
      channels: number of channels in the paper's table.
      multiplier: the paper's width multiplier.

    Returns:
      The number of channels, rounded as torchvision does.

    Examples:
      >>> scaled(32, 0.75), scaled(24, 0.75), scaled(24, 0.1)
      (24, 24, 8)
    """
    wanted = channels * multiplier
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class InvertedResidual(nn.Module):
    """Widens, convolves depthwise and narrows, with a shortcut for equal shapes."""

    features: int
    stride: int
    expansion: int
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, h, w, c]` to `[b, h / stride, w / stride, features]`."""
        conv, norm = self.layers
        hidden, y, first = x.shape[-1] * self.expansion, x, 0
        if self.expansion != 1:
            y = conv(hidden, 1, 1, name="conv_0_0")(y)
            y, first = nn.relu6(norm(name="conv_0_1")(y)), 1
        y = conv(
            hidden, 3, self.stride, feature_group_count=hidden, name=f"conv_{first}_0"
        )(y)
        y = nn.relu6(norm(name=f"conv_{first}_1")(y))
        y = conv(self.features, 1, 1, name=f"conv_{first + 1}")(y)
        y = norm(name=f"conv_{first + 2}")(y)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """Classifies images by MobileNetV2.

    It has 2.2 million parameters and 1280 features at width 64.

    `model.apply(variables, images)` returns `Outputs`; for training,
    `model.apply(variables, images, train=True, mutable=["batch_stats"])` returns
    `(Outputs, {"batch_stats": ...})`. Maps are "stem", "block1" to "block17" (each the
    sum, without a ReLU) and "last"; features are the average of "last".

    Attributes:
      num_classes: number of logits.
      stem: "imagenet" (halves the image five times) or "cifar" (three times: the stem
        and the second stage keep the size).
      width: 64 is the published network, as for a ResNet; another one multiplies all
        numbers of channels by width / 64, except that "last" has 1280 at least, as in
        the paper. Multiples of 8, at least 8.
      dtype: dtype of the computation. Parameters, BatchNorm statistics, features and
        logits are float32 at least.
      axis_name: mapped axis over which BatchNorm averages its statistics in training.
        The model may be initialized outside of it.
      stages: stages of the paper's table 2, between the first and last convolution.

    Examples:
      >>> model = MobileNetV2(num_classes=10, stem="cifar")
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> outputs = jax.eval_shape(model.apply, variables, images)  # the shapes alone
      >>> outputs.features.shape, outputs.maps["block17"].shape
      ((2, 1280), (2, 4, 4, 320))
    """

    num_classes: int = 10
    stem: str = "cifar"
    width: int = 64
    dtype: jax.typing.DTypeLike = jnp.float32
    axis_name: str | None = None
    stages: tuple[Stage, ...] = STAGES

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        check_stem(self.stem)
        check_positive(self, "num_classes", "width")

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
          images: normalized images, shape `[b, h, w, c]`, floating point.
          train: whether BatchNorm uses the statistics of the batch and averages them
            into `batch_stats`.

        Returns:
          Logits, features and maps.

        Raises:
          ValueError: the images are not a batch of floating point images.
        """
        check_images(images)
        layers = make_layers(train=train, dtype=self.dtype, axis_name=self.axis_name)
        multiplier = self.width / 64
        first, *strides = _strides(self.stem, self.stages)

        x = layers.conv(scaled(32, multiplier), 3, first, name="features_0_0")(images)
        x = nn.relu6(layers.norm(name="features_0_1")(x))
        maps = {"stem": x}
        for stage, stride in zip(self.stages, strides, strict=True):
            for block in range(stage.blocks):
                number = len(maps)
                x = InvertedResidual(
                    features=scaled(stage.features, multiplier),
                    stride=stride if block == 0 else 1,
                    expansion=stage.expansion,
                    layers=layers,
                    name=f"features_{number}",
                )(x)
                maps[f"block{number}"] = x
        last = scaled(1280, max(1.0, multiplier))
        x = layers.conv(last, 1, 1, name=f"features_{len(maps)}_0")(x)
        x = nn.relu6(layers.norm(name=f"features_{len(maps)}_1")(x))
        maps["last"] = x

        logits, features = classify(
            x,
            self.num_classes,
            self.dtype,
            kernel_init=nn.initializers.normal(0.01),
            name="classifier_1",
        )
        return Outputs(logits, features, maps)
