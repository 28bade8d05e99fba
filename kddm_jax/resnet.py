"""Defines residual networks of 9, 18 and 34 layers with features and maps as outputs.

He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385. A network
has a stem, four stages of basic blocks `relu(x + bn(conv(relu(bn(conv(x))))))` with
widths w, 2w, 4w and 8w, global average pooling, and a linear classifier. Padding,
initialization and parameter names are torchvision's (`layer1_0/conv2/kernel` is
`layer1.0.conv2.weight`), with two differences: the classifier's bias starts at zero,
and Flax averages the biased variance. Images are NHWC and already normalized.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from kddm_jax.adapters import (
    STEMS,
    ModuleDef,
    Outputs,
    check_images,
    check_positive,
    check_stem,
    classify,
    make_layers,
)
from kddm_jax.numerics.maxima import max_pool, relu


class BasicBlock(nn.Module):
    """Adds two 3x3 convolutions to a shortcut, which projects if the shape changes."""

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, h, w, c]` to `[b, h / stride, w / stride, features]`."""
        y = self.conv(self.features, 3, self.stride, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = self.norm(name="bn2")(self.conv(self.features, 3, 1, name="conv2")(y))
        if x.shape != y.shape:
            x = self.conv(self.features, 1, self.stride, name="downsample_0")(x)
            x = self.norm(name="downsample_1")(x)
        return relu(x + y)


class ResNet(nn.Module):
    """Classifies images with a residual network of basic blocks.

    `ResNet9`, `ResNet18` and `ResNet34` set the number of blocks in each stage.

    `model.apply(variables, images)` returns `Outputs`. For training,
    `model.apply(variables, images, train=True, mutable=["batch_stats"])` returns
    `(Outputs, {"batch_stats": ...})`.

    Attributes:
      num_classes: number of logits.
      stem: "cifar" (3x3, keeps the size) or "imagenet" (7x7/2 and 3x3/2 max pooling).
      width: number of channels of the first stage; features have width `8 * width`.
      dtype: dtype of the computation. Parameters, BatchNorm statistics, features and
        logits are float32 at least.
      axis_name: mapped axis over which BatchNorm averages its statistics in training,
        or None. The model can be initialized outside this axis.
      blocks: number of blocks in each stage.
    """

    num_classes: int = 10
    stem: str = "cifar"
    width: int = 64
    dtype: jax.typing.DTypeLike = jnp.float32
    axis_name: str | None = None
    blocks: tuple[int, ...] = (2, 2, 2, 2)

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
          train: True if BatchNorm uses the statistics of the batch and averages them
            into `batch_stats`.

        Returns:
          Logits, features and maps.

        Raises:
          ValueError: if the images are not a batch of floating point images.
        """
        check_images(images)
        conv, norm = make_layers(
            train=train, dtype=self.dtype, axis_name=self.axis_name
        )

        stem = STEMS[self.stem]
        x = conv(self.width, stem.kernel, stem.stride, name="conv1")(images)
        x = relu(norm(name="bn1")(x))
        if stem.pool:
            x = max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        maps = {"stem": x}
        for stage, count in enumerate(self.blocks, start=1):
            for block in range(count):
                x = BasicBlock(
                    features=self.width * 2 ** (stage - 1),
                    stride=2 if stage > 1 and block == 0 else 1,
                    conv=conv,
                    norm=norm,
                    name=f"layer{stage}_{block}",
                )(x)
                maps[f"stage{stage}_block{block + 1}"] = x

        logits, features = classify(x, self.num_classes, self.dtype)
        return Outputs(logits, features, maps)


class ResNet9(ResNet):
    """Has one block in each stage and, at width 64, 4.9 million parameters."""

    blocks: tuple[int, ...] = (1, 1, 1, 1)


class ResNet18(ResNet):
    """Has two blocks in each stage and, at width 64, 11.2 million parameters.

    Examples:
      >>> model = ResNet18(num_classes=10, stem="cifar", width=4)
      >>> images = jnp.zeros((2, 8, 8, 3))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> outputs = jax.eval_shape(model.apply, variables, images)  # shapes only
      >>> outputs.logits.shape, outputs.features.shape
      ((2, 10), (2, 32))
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)


class ResNet34(ResNet):
    """Has 3, 4, 6 and 3 blocks in its stages; at width 64, 21.3 million parameters."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
