"""Adapts networks to the train step, and contains the layers that our networks share.

The train step calls a function ``apply(variables, images, *, train, rngs) -> (outputs,
state)``. `linen_apply` makes one from a Linen module, `nnx_apply` from an NNX module.
Our networks return `Outputs`. `make_layers` returns the convolution and the BatchNorm
of torchvision's networks, in a form that is fast on a CPU. All networks share the
checks of arguments.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze

from kddm_jax.numerics.convolution import conv_general_dilated
from kddm_jax.numerics.promotion import implicit_promotion

ModuleDef = Any
NO_KEYS: Mapping[str, jax.Array] = MappingProxyType({})


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
      A function `apply(variables, images, *, train, rngs={}) -> (outputs,
      batch_stats)`, where variables are `{"params": ..., "batch_stats": ...}` and
      `rngs` holds the key of `"dropout"`, from which modules that draw from a
      collection of another name get keys, too.  In evaluation nothing is random, and
      the statistics come back as given; a module without any gives `{}`.

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
        variables: Mapping[str, Any],
        images: jax.Array,
        *,
        train: bool,
        rngs: Mapping[str, jax.Array] = NO_KEYS,
    ) -> tuple[Any, Mapping[str, Any]]:
        if not train:
            outputs = model.apply(variables, images, train=False)
            return outputs, variables.get("batch_stats", {})
        keys = dict(rngs)
        if "dropout" in keys:  # Linen draws from "params" for names without a key
            keys.setdefault("params", jax.random.fold_in(keys["dropout"], 0))
        outputs, updated = model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs=keys
        )
        statistics = updated.get("batch_stats") or {}
        if isinstance(variables.get("batch_stats"), FrozenDict):
            statistics = freeze(statistics)  # the state keeps its structure
        return outputs, statistics

    return apply


# Written during a call, and read by who makes the call: no part of a network's state.
_TRANSIENT = nnx.Any(nnx.Intermediate, nnx.Perturbation)


def _split(model: nnx.Module) -> tuple[Any, Any, Any, Any]:
    """Splits a module into its graph, parameters, random keys, and other state."""
    graph, params, streams, _, state = nnx.split(
        model, nnx.Param, nnx.RngState, _TRANSIENT, ...
    )
    return graph, *map(nnx.to_pure_dict, (params, streams, state))


def _reseeded(streams: Any, key: jax.Array) -> Any:
    """Gives every stream of random numbers a key of its own; counters begin anew."""
    leaves, structure = jax.tree.flatten(streams)
    for i, leaf in enumerate(leaves):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaves[i] = jnp.zeros(leaf.shape, leaf.dtype)
            continue
        own = jax.random.fold_in(key, i)
        leaves[i] = jax.random.split(own, leaf.shape) if leaf.shape else own
    return jax.tree.unflatten(structure, leaves)


def nnx_apply(
    model: nnx.Module,
) -> tuple[Callable[..., tuple[Any, Mapping[str, Any]]], dict[str, Any]]:
    """Turns an NNX module into the apply function and the variables of the train step.

    The step trains copies of the module's arrays.  To use them in the module again:
    `nnx.update(model, state.params)`, then `nnx.update(model, state.batch_stats)`.

    Args:
      model: a module of images, called as `model(images)`, after `model.train()` or
        `model.eval()`; `train` is passed if its `__call__` takes it.  Layers that draw
        random numbers hold their own `nnx.Rngs`, as `nnx.Dropout(0.1, rngs=rngs)`.

    Returns:
      The function `apply(variables, images, *, train, rngs={}) -> (outputs, state)`,
      and its variables `{"params": ..., "batch_stats": ...}`, nested dictionaries of
      the arrays of `nnx.Param`, and of all that is neither parameter, random key nor
      intermediate.  In training, `rngs` holds the key of `"dropout"`, which replaces
      those of the module; in evaluation the state comes back as given.

    Raises:
      ValueError: in training, a module with random keys without `rngs`.

    Examples:
      >>> apply, variables = nnx_apply(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> outputs, state = apply(variables, jnp.ones((2, 3)), train=True)
      >>> sorted(variables["params"]), sorted(state)
      (['bias', 'scale'], ['mean', 'var'])
    """
    graph, params, own_streams, state = _split(model)
    takes_train = "train" in inspect.signature(type(model).__call__).parameters

    def apply(
        variables: Mapping[str, Any],
        images: jax.Array,
        *,
        train: bool,
        rngs: Mapping[str, jax.Array] = NO_KEYS,
    ) -> tuple[Any, Mapping[str, Any]]:
        streams, given = own_streams, variables.get("batch_stats", {})
        if train and streams:
            if "dropout" not in rngs:
                raise ValueError(
                    f"{type(model).__name__} draws random numbers in training, but "
                    'rngs has no "dropout"; pass rngs={"dropout": key}'
                )
            streams = _reseeded(streams, rngs["dropout"])
        module = nnx.merge(graph, variables["params"], streams, given)
        (module.train if train else module.eval)()
        outputs = module(images, train=train) if takes_train else module(images)
        return outputs, _split(module)[3] if train else given

    return apply, {"params": params, "batch_stats": state}
