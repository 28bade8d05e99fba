"""Defines the residual networks for images of 32 pixels that papers compare on CIFAR.

He et al., arXiv:1512.03385, section 4.2, and the wide networks of Zagoruyko and
Komodakis, arXiv:1605.07146: a 3x3 convolution, three stages of blocks, of which the
second and the third halve the image, global average pooling, and a linear classifier.
The networks are those of RepDistiller (HobbitLong/RepDistiller) and mdistiller: their
shortcuts project by a 1x1 convolution, and the x4 networks have 32 channels in the stem
and 64, 128 and 256 in the stages. Initialization is as in `kddm_jax.resnet`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from kddm_jax.adapters import (
    ModuleDef,
    Outputs,
    check_images,
    check_positive,
    classify,
    make_layers,
)
from kddm_jax.numerics.maxima import relu
from kddm_jax.resnet import BasicBlock


class PreActivationBlock(nn.Module):
    """Adds two 3x3 convolutions to a shortcut, each after BatchNorm and ReLU."""

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, h, w, c]` to `[b, h / stride, w / stride, features]`."""
        y = relu(self.norm(name="bn1")(x))
        if x.shape[-1] != self.features or self.stride != 1:
            x = self.conv(self.features, 1, self.stride, name="downsample_0")(y)
        y = self.conv(self.features, 3, self.stride, name="conv1")(y)
        y = relu(self.norm(name="bn2")(y))
        return x + self.conv(self.features, 3, 1, name="conv2")(y)


class CifarResNet(nn.Module):
    """Classifies images by a residual network of three stages.

    `ResNet20` and the other classes below are the published networks.

    `model.apply(variables, images)` returns `Outputs`; for training,
    `model.apply(variables, images, train=True, mutable=["batch_stats"])` returns
    `(Outputs, {"batch_stats": ...})`. Maps are "stem" and "stage1_block1",
    "stage1_block2", ...; features are the average of the last map. With
    `preactivation`, the maps of the blocks have no ReLU, and the last map is "last",
    after BatchNorm and ReLU.

    Attributes:
      num_classes: number of logits.
      width: 64 is the published network; another one multiplies all numbers of channels
        by width / 64. A multiple of 4.
      dtype: dtype of the computation. Parameters, BatchNorm statistics, features and
        logits are float32 at least.
      axis_name: mapped axis over which BatchNorm averages its statistics in training.
        The model may be initialized outside of it.
      blocks: number of blocks in each stage.
      channels: published numbers of channels of the stem and of each stage.
      preactivation: True puts BatchNorm and ReLU before each convolution of a block, as
        in wide networks, instead of after it.
    """

    num_classes: int = 10
    width: int = 64
    dtype: jax.typing.DTypeLike = jnp.float32
    axis_name: str | None = None
    blocks: int = 3
    channels: tuple[int, ...] = (16, 16, 32, 64)
    preactivation: bool = False

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        check_positive(self, "num_classes", "width", "blocks")
        if self.width % 4:
            raise ValueError(
                f"width must be a multiple of 4, got {self.width}: the stem has a "
                f"quarter of it or more; pass {self.width // 4 * 4 + 4}"
            )

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
        conv, norm = make_layers(
            train=train, dtype=self.dtype, axis_name=self.axis_name
        )
        first, *stages = (count * self.width // 64 for count in self.channels)
        kind = PreActivationBlock if self.preactivation else BasicBlock

        x = conv(first, 3, 1, name="conv1")(images)
        if not self.preactivation:
            x = relu(norm(name="bn1")(x))
        maps = {"stem": x}
        for stage, features in enumerate(stages, start=1):
            for block in range(self.blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                name = f"layer{stage}_{block}"
                x = kind(features, stride, conv, norm, name=name)(x)
                maps[f"stage{stage}_block{block + 1}"] = x
        if self.preactivation:
            x = maps["last"] = relu(norm(name="bn1")(x))

        logits, features = classify(x, self.num_classes, self.dtype)
        return Outputs(logits, features, maps)


class ResNet20(CifarResNet):
    """Has 278,324 parameters for 100 classes, and 64 features.

    Examples:
      >>> model = ResNet20(num_classes=100)
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      278324
    """

    blocks: int = 3


class ResNet32(CifarResNet):
    """Has 472,756 parameters for 100 classes, and 64 features."""

    blocks: int = 5


class ResNet56(CifarResNet):
    """Has 861,620 parameters for 100 classes, and 64 features."""

    blocks: int = 9


class ResNet110(CifarResNet):
    """Has 1,736,564 parameters for 100 classes, and 64 features."""

    blocks: int = 18


class ResNet8x4(CifarResNet):
    """Has 1,233,540 parameters for 100 classes, and 256 features."""

    blocks: int = 1
    channels: tuple[int, ...] = (32, 64, 128, 256)


class ResNet32x4(CifarResNet):
    """Has 7,433,860 parameters for 100 classes, and 256 features."""

    blocks: int = 5
    channels: tuple[int, ...] = (32, 64, 128, 256)


class WRN16x2(CifarResNet):
    """Is WRN-16-2, with 703,284 parameters for 100 classes and 128 features."""

    blocks: int = 2
    channels: tuple[int, ...] = (16, 32, 64, 128)
    preactivation: bool = True


class WRN40x1(CifarResNet):
    """Is WRN-40-1, with 569,780 parameters for 100 classes and 64 features."""

    blocks: int = 6
    preactivation: bool = True


class WRN40x2(CifarResNet):
    """Is WRN-40-2, with 2,255,156 parameters for 100 classes and 128 features."""

    blocks: int = 6
    channels: tuple[int, ...] = (16, 32, 64, 128)
    preactivation: bool = True
