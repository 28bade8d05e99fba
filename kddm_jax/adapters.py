"""Adapts networks to the train step, and contains the layers that our networks share.

The train step calls a function ``apply(variables, images, *, train) -> (outputs,
new_batch_stats)``; `linen_apply` makes one from a Linen module. Our networks return
`Outputs`. `make_layers` returns the convolution and the BatchNorm of torchvision's
networks, in a form that is fast on a CPU. All networks share the checks of arguments.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict, freeze

from kddm_jax.numerics.convolution import conv_general_dilated
from kddm_jax.numerics.promotion import implicit_promotion

ModuleDef = Any


class Outputs(NamedTuple):
    """Holds what a network returns for a batch of images.

    Attributes:
      logits: scores, shape `[b, num_classes]`, float32 at least.
      features: input of the classifier, shape `[b, d]`, float32 at least; for a ResNet
        the last map averaged over its pixels, and `d = 8 * width`.
      maps: shape `[b, h, w, c]` in the compute dtype, by name: "stem", and the output
        of every block, "stage1_block1", "stage1_block2", ...
    """

    logits: jax.Array
    features: jax.Array
    maps: dict[str, jax.Array]


class Stem(NamedTuple):
    """Describes a first convolution; `pool` adds a 3x3/2 max pooling after it."""

    kernel: int
    stride: int
    pool: bool


STEMS: Mapping[str, Stem] = {
    "cifar": Stem(kernel=3, stride=1, pool=False),
    "imagenet": Stem(kernel=7, stride=2, pool=True),
}


# torchvision's choices: normal with variance 2 / (k * k * features) for convolutions,
# uniform in +- 1 / sqrt(d) for the classifier.
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Layers(NamedTuple):
    """Holds the layers of torchvision's networks with their options.

    Attributes:
      conv: `conv(features, kernel, stride, name=...)`, without bias, padded as in
        torch; further options are those of `flax.linen.Conv`.
      norm: `norm(name=...)`, a `flax.linen.BatchNorm`.
    """

    conv: ModuleDef
    norm: ModuleDef


def _conv(features: int, kernel: int, stride: int, **options: Any) -> nn.Conv:
    # Explicit padding: with stride 2, "SAME" differs from torch's by one pixel.
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


class _BatchNorm(nn.BatchNorm):
    """Flax's, which in half precision needs implicit promotion of dtypes."""

    def __call__(self, *arrays, **options):
        """Normalises as Flax's does."""
        with implicit_promotion():
            return super().__call__(*arrays, **options)


def make_layers(
    *, train: bool, dtype: jax.typing.DTypeLike, axis_name: str | None
) -> Layers:
    """Makes the convolution and the normalisation of one forward pass.

    Args:
      train: whether BatchNorm uses and averages the statistics of the batch.
      dtype: dtype of the computation.
      axis_name: mapped axis over which BatchNorm averages, or None.

    Returns:
      Both layers, which take a number of features and a name.
    """
    norm = partial(
        _BatchNorm,
        use_running_average=not train,
        momentum=0.9,  # weight of the running value; torch's momentum is 0.1
        epsilon=1e-5,
        dtype=dtype,
        axis_name=axis_name,
    )
    return Layers(partial(_conv, dtype=dtype), norm)


def check_images(images: jax.Array) -> None:
    """Checks the rank and dtype of a network's images.

    Args:
      images: images, shape `[b, h, w, c]`, floating point.

    Raises:
      ValueError: if the rank or the dtype is wrong.
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
      stem: name of the stem.

    Raises:
      ValueError: if the stem is neither "cifar" nor "imagenet".
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
      *names: names of its attributes that must be positive.

    Raises:
      ValueError: if an attribute is not positive; the message names it.
    """
    for name in names:
        if getattr(model, name) <= 0:
            raise ValueError(
                f"{name} must be a positive int, got {getattr(model, name)}; "
                "leave it out for the default"
            )


def linen_apply(
    model: nn.Module,
) -> Callable[..., tuple[Any, Mapping[str, Any]]]:
    """Makes the apply function of the train step from a Linen module.

    Args:
      model: a Linen module whose `__call__` takes images and `train`.

    Returns:
      A function `apply(variables, images, *, train) -> (outputs, new_batch_stats)`,
      where variables are `{"params": ..., "batch_stats": ...}`. In evaluation the
      statistics are returned unchanged. A module without statistics returns `{}`.

    Examples:
      >>> from kddm_jax.resnet import ResNet9
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
        statistics = updated.get("batch_stats") or {}
        if isinstance(variables.get("batch_stats"), FrozenDict):
            statistics = freeze(statistics)  # the state keeps its structure
        return outputs, statistics

    return apply
