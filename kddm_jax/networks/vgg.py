"""Defines VGG networks with BatchNorm for images of 32 pixels, without dense layers.

Simonyan & Zisserman, arXiv:1409.1556, as in RepDistiller (HobbitLong/RepDistiller) and
mdistiller: five blocks of 3x3 convolutions, each followed by BatchNorm and ReLU, a 2x2
max pooling after each of the first three blocks, global average pooling, and a linear
classifier. Convolutions have biases, which BatchNorm cancels, so that the number of
parameters is the published one.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from kddm_jax.adapters import (
    Outputs,
    check_images,
    check_positive,
    classify,
    make_layers,
)
from kddm_jax.numerics.maxima import max_pool, relu


class VGG(nn.Module):
    """Classifies images by blocks of convolutions without shortcuts.

    `model.apply(variables, images)` returns `Outputs`; for training,
    `model.apply(variables, images, train=True, mutable=["batch_stats"])` returns
    `(Outputs, {"batch_stats": ...})`. Maps are "block1" to "block5", each after its
    last ReLU and before the pooling; features are the average of "block5".

    Attributes:
      num_classes: number of logits.
      width: number of channels of the first block, 64 in the published networks; the
        others have 2, 4, 8 and 8 times as many, and the features 8 times.
      dtype: dtype of the computation. Parameters, BatchNorm statistics, features and
        logits are float32 at least.
      axis_name: mapped axis over which BatchNorm averages its statistics in training.
        The model may be initialized outside of it.
      convolutions: number of convolutions of each block.
    """

    num_classes: int = 10
    width: int = 64
    dtype: jax.typing.DTypeLike = jnp.float32
    axis_name: str | None = None
    convolutions: int = 1

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        check_positive(self, "num_classes", "width", "convolutions")

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
          images: normalized images, shape `[b, h, w, c]`, floating point, with sides of
            8 pixels at least.
          train: whether BatchNorm uses the statistics of the batch and averages them
            into `batch_stats`.

        Returns:
          Logits, features and maps.

        Raises:
          ValueError: the images are not a batch of floating point images, or are
            smaller than 8 pixels.
        """
        check_images(images)
        if min(images.shape[1:3]) < 8:
            raise ValueError(
                "images must have sides of 8 pixels at least, which are halved three "
                f"times, got {images.shape[1]} x {images.shape[2]}; resize them"
            )
        conv, norm = make_layers(
            train=train, dtype=self.dtype, axis_name=self.axis_name
        )
        x, maps = images, {}
        for block, multiple in enumerate((1, 2, 4, 8, 8), start=1):
            if 1 < block < 5:
                x = max_pool(x, (2, 2), strides=(2, 2), padding="VALID")
            for i in range(1, self.convolutions + 1):
                name = f"conv{block}_{i}"
                x = conv(multiple * self.width, 3, 1, use_bias=True, name=name)(x)
                x = relu(norm(name=f"bn{block}_{i}")(x))
            maps[f"block{block}"] = x

        logits, features = classify(
            x,
            self.num_classes,
            self.dtype,
            kernel_init=nn.initializers.normal(0.01),
        )
        return Outputs(logits, features, maps)


class VGG8(VGG):
    """Has a convolution in each block and 3,965,028 parameters for 100 classes."""

    convolutions: int = 1


class VGG13(VGG):
    """Has two convolutions in each block and 9,462,180 parameters for 100 classes."""

    convolutions: int = 2
