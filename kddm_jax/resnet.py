"""Residual networks of 9, 18 and 34 layers that also return their features and maps.

He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385: a stem,
four stages of basic blocks `relu(x + bn(conv(relu(bn(conv(x))))))` with widths w, 2w,
4w, 8w, global average pooling, a linear classifier. Padding and initialisation are
torchvision's (but the classifier's bias starts at zero, and Flax averages the biased
variance), and so are the parameter names: `layer1_0/conv2/kernel` is torchvision's
`layer1.0.conv2.weight`. Images are NHWC and already normalised.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from kddm_jax.convolution import conv_general_dilated, max_pool, relu

ModuleDef = Any


class Outputs(NamedTuple):
    """What a network returns for a batch of images.

    Attributes:
      logits: scores, shape `[b, num_classes]`, float32 at least.
      features: what the classifier sees, the last map averaged over its pixels, shape
        `[b, 8 * width]`, float32 at least.
      maps: shape `[b, h, w, c]` in the compute dtype, by name: "stem", and the output
        of every block, "stage1_block1", "stage1_block2", ...
    """

    logits: jax.Array
    features: jax.Array
    maps: dict[str, jax.Array]


class Stem(NamedTuple):
    """A first convolution, and whether a 3x3/2 max pooling follows it."""

    kernel: int
    stride: int
    pool: bool


STEMS: Mapping[str, Stem] = {
    "cifar": Stem(kernel=3, stride=1, pool=False),
    "imagenet": Stem(kernel=7, stride=2, pool=True),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: a projection where the shape changes."""

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


# torchvision's choices: normal with variance 2 / (k * k * features) for convolutions,
# uniform in +- 1 / sqrt(d) for the classifier.
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Layers(NamedTuple):
    """The layers that torchvision's networks are made of, options filled in.

    Attributes:
      conv: `conv(features, kernel, stride, name=...)`, without bias, padded as in
        torch; further options are those of `flax.linen.Conv`.
      norm: `norm(name=...)`, a `flax.linen.BatchNorm`.
    """

    conv: ModuleDef
    norm: ModuleDef


def _conv(features: int, kernel: int, stride: int, **options: Any) -> nn.Conv:
    # Explicit padding: "SAME" is off by one pixel from torch's where the stride is 2.
    pad = (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        kernel_init=conv_init,
        conv_general_dilated=conv_general_dilated,
        **options,
    )


def make_layers(
    *, train: bool, dtype: jax.typing.DTypeLike, axis_name: str | None
) -> Layers:
    """Makes the convolution and the normalisation of one forward pass.

    Args:
      train: whether BatchNorm uses, and averages, the statistics of the batch.
      dtype: of the computation.
      axis_name: mapped axis over which BatchNorm averages, if any.

    Returns:
      `Layers`.
    """
    norm = partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,  # of the running value: torch's momentum of 0.1
        epsilon=1e-5,
        dtype=dtype,
        axis_name=axis_name,
    )
    return Layers(partial(_conv, dtype=dtype), norm)


def check_images(images: jax.Array) -> None:
    """Checks what every network asks of its images.

    Args:
      images: shape `[b, h, w, c]`, floating point.

    Raises:
      ValueError: another rank or dtype.
    """
    if images.ndim != 4:
        raise ValueError(
            f"images must have shape [b, h, w, c], got {list(images.shape)}; "
            "add the batch or channel axis with images[None] or images[..., None]"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating point and normalised, got {images.dtype}; "
            "pass (images / 255 - mean) / std"
        )


def check_stem(stem: str) -> None:
    """Checks the name of a stem.

    Args:
      stem: "cifar" or "imagenet".

    Raises:
      ValueError: it is neither.
    """
    if stem not in STEMS:
        raise ValueError(
            f"stem must be one of {', '.join(map(repr, STEMS))}, "
            f"got {stem!r}; 'cifar' suits images of 32 pixels and fewer"
        )


def check_positive(model: nn.Module, *names: str) -> None:
    """Checks a network's sizes.

    Args:
      model: the network.
      *names: its attributes that must be positive.

    Raises:
      ValueError: one is not; the message has its name.
    """
    for name in names:
        if getattr(model, name) <= 0:
            raise ValueError(
                f"{name} must be a positive int, got {getattr(model, name)}; "
                "leave it out for the default"
            )


class ResNet(nn.Module):
    """A residual network of basic blocks; see `ResNet9`, `ResNet18` and `ResNet34`.

    `model.apply(variables, images)` returns `Outputs`; for training,
    `model.apply(variables, images, train=True, mutable=["batch_stats"])` returns
    `(Outputs, {"batch_stats": ...})`.

    Attributes:
      num_classes: number of logits.
      stem: "cifar" (3x3, keeps the size) or "imagenet" (7x7/2 and 3x3/2 max pooling).
      width: channels of the first stage; features have `8 * width`.
      dtype: dtype of the computation. Parameters, BatchNorm statistics, features and
        logits are float32 at least.
      axis_name: mapped axis over which BatchNorm averages its statistics in training.
        The model may be initialised outside of it.
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
          images: normalised images, shape `[b, h, w, c]`, floating point.
          train: whether BatchNorm uses, and averages into `batch_stats`, the
            statistics of the batch.

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

        # The average and the classifier are too cheap to lose digits in.
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        features = jnp.mean(x.astype(dtype), axis=(1, 2))  # [b, d]
        logits = nn.Dense(
            self.num_classes, dtype=dtype, kernel_init=dense_init, name="fc"
        )(features)
        return Outputs(logits, features, maps)


class ResNet9(ResNet):
    """One block in each stage: 4.9 million parameters at width 64."""

    blocks: tuple[int, ...] = (1, 1, 1, 1)


class ResNet18(ResNet):
    """Two blocks in each stage: 11.2 million parameters at width 64.

    Examples:
      >>> model = ResNet18(num_classes=10, stem="cifar", width=4)
      >>> images = jnp.zeros((2, 8, 8, 3))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> outputs = jax.eval_shape(model.apply, variables, images)  # the shapes alone
      >>> outputs.logits.shape, outputs.features.shape
      ((2, 10), (2, 32))
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)


class ResNet34(ResNet):
    """Three, four, six and three blocks: 21.3 million parameters at width 64."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)


def linen_apply(
    model: nn.Module,
) -> Callable[..., tuple[Any, Mapping[str, Any]]]:
    """Turns a Linen module into the apply function that the train step asks of a model.

    Args:
      model: a Linen module whose `__call__` takes images and `train`.

    Returns:
      A function `apply(variables, images, *, train) -> (outputs, new_batch_stats)`,
      where variables are `{"params": ..., "batch_stats": ...}`. In evaluation the
      statistics come back as given; a module without any gives `{}`.

    Examples:
      >>> model = ResNet9(width=4)
      >>> images = jnp.zeros((2, 8, 8, 1))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> train = partial(linen_apply(model), train=True)
      >>> outputs, batch_stats = jax.eval_shape(train, variables, images)
      >>> outputs.logits.shape, sorted(batch_stats)[:2]
      ((2, 10), ['bn1', 'layer1_0'])
    """

    def apply(
        variables: Mapping[str, Any], images: jax.Array, *, train: bool
    ) -> tuple[Any, Mapping[str, Any]]:
        if not train:
            outputs = model.apply(variables, images, train=False)
            return outputs, variables.get("batch_stats", {})
        outputs, updated = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        return outputs, updated.get("batch_stats") or {}

    return apply
