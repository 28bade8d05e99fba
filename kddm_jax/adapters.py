"""Adapts networks to the train step, and contains what the networks here share.

The train step calls a function ``apply(variables, images, *, train, rngs) -> (outputs,
state)``. `linen_apply` makes this function from a Linen module, `nnx_apply` from an NNX
module. The networks of this package return `Outputs`, and share the checks of arguments
and the layers of `make_layers`: the convolution and the BatchNorm of torchvision's
networks, in a form that is fast on a CPU.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
      logits: scores of the classes, shape `[b, num_classes]`, float32 at least.
      features: input of the classifier, shape `[b, d]`, float32 at least. In a ResNet
        this is the last map, averaged over its pixels, with `d = 8 * width`.
      maps: feature maps by name, shape `[b, h, w, c]`, in the dtype of the computation:
        "stem", and the output of every block, "stage1_block1", "stage1_block2", ...
    """

    logits: jax.Array
    features: jax.Array
    maps: dict[str, jax.Array]


class Stem(NamedTuple):
    """Describes the first convolution; `pool` adds a 3x3/2 max pooling after it."""

    kernel: int
    stride: int
    pool: bool


STEMS: Mapping[str, Stem] = {
    "cifar": Stem(kernel=3, stride=1, pool=False),
    "imagenet": Stem(kernel=7, stride=2, pool=True),
}


# As in torchvision: normal with variance 2 / (k * k * features) for convolutions,
# uniform in +- 1 / sqrt(d) for the classifier.
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Layers(NamedTuple):
    """Holds the layers of torchvision's networks with their options.

    Attributes:
      conv: makes a convolution, padded as in torch and without bias by default, by
        `conv(features, kernel, stride, name=...)`; further options are those of
        `flax.linen.Conv`.
      norm: makes a `flax.linen.BatchNorm` by `norm(name=...)`.
    """

    conv: ModuleDef
    norm: ModuleDef


def _conv(
    features: int, kernel: int, stride: int, *, use_bias: bool = False, **options: Any
) -> nn.Conv:
    # Padding is explicit, because with stride 2 "SAME" differs from torch by one pixel.
    pad = (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=use_bias,
        kernel_init=conv_init,
        conv_general_dilated=conv_general_dilated,
        **options,
    )


class _BatchNorm(nn.BatchNorm):
    """Allows implicit promotion of dtypes, which Flax needs in half precision."""

    def __call__(self, *arrays, **options):
        """Normalizes as Flax's BatchNorm does."""
        with implicit_promotion():
            return super().__call__(*arrays, **options)


def make_layers(
    *, train: bool, dtype: jax.typing.DTypeLike, axis_name: str | None
) -> Layers:
    """Makes the convolution and the normalization for one forward pass.

    Args:
      train: True if BatchNorm uses the statistics of the batch and updates the running
        ones.
      dtype: dtype of the computation.
      axis_name: mapped axis over which BatchNorm averages its statistics, or None.

    Returns:
      The functions that make both layers.
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


def classify(
    x: jax.Array,
    num_classes: int,
    dtype: jax.typing.DTypeLike,
    *,
    kernel_init: nn.initializers.Initializer = dense_init,
    name: str = "fc",
) -> tuple[jax.Array, jax.Array]:
    """Averages the last map over positions and classifies the average.

    Both are cheap, so they use float32 at least. Call this in a compact method.

    Args:
      x: the last map, shape `[b, h, w, d]`.
      num_classes: number of logits k.
      dtype: dtype of the network's computation.
      kernel_init: initializer of the classifier's kernel.
      name: name of the classifier.

    Returns:
      Logits `[b, k]` and features `[b, d]`.
    """
    dtype = np.promote_types(dtype, jnp.float32)
    features = jnp.mean(x.astype(dtype), axis=(1, 2))
    dense = nn.Dense(num_classes, dtype=dtype, kernel_init=kernel_init, name=name)
    return dense(features), features


def check_images(images: jax.Array) -> None:
    """Checks the rank and the dtype of a network's images.

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
    """Checks that sizes of a network are positive.

    Args:
      model: the network.
      *names: names of the network's attributes that must be positive.

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
      batch_stats)`. The variables are `{"params": ..., "batch_stats": ...}`. `rngs`
      contains the key `"dropout"`; collections of random numbers with another name get
      keys that are derived from it. In evaluation nothing is random, and the statistics
      are returned unchanged. If a module has no statistics, they are `{}`.

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
        if "dropout" in keys:  # Linen uses "params" for names without a key
            keys.setdefault("params", jax.random.fold_in(keys["dropout"], 0))
        outputs, updated = model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs=keys
        )
        statistics = updated.get("batch_stats") or {}
        if isinstance(variables.get("batch_stats"), FrozenDict):
            statistics = freeze(statistics)  # keeps the structure of the state
        return outputs, statistics

    return apply


# Values that a call writes for its caller; they are not part of a network's state.
_TRANSIENT = nnx.Any(nnx.Intermediate, nnx.Perturbation)


def _split(model: nnx.Module) -> tuple[Any, Any, Any, Any]:
    """Splits a module into its graph, parameters, random keys and remaining state."""
    graph, params, streams, _, state = nnx.split(
        model, nnx.Param, nnx.RngState, _TRANSIENT, ...
    )
    return graph, *map(nnx.to_pure_dict, (params, streams, state))


def _copy(array):
    """Copies an array, which a step that donates its state would delete."""
    return jnp.copy(array) if isinstance(array, jax.Array) else array


def _reseeded(streams: Any, key: jax.Array) -> Any:
    """Gives every stream of random numbers its own key, and a counter of zero."""
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
    """Makes the apply function and the variables of the train step from an NNX module.

    The step trains copies of the module's arrays. To write them into the module, call
    `nnx.update(model, state.params)` and `nnx.update(model, state.batch_stats)`.

    Args:
      model: an NNX module that is called as `model(images)`, after `model.train()` or
        `model.eval()`; `train` is passed, too, if its `__call__` takes it. Layers that
        draw random numbers have their own `nnx.Rngs`, such as
        `nnx.Dropout(0.1, rngs=rngs)`.

    Returns:
      The function `apply(variables, images, *, train, rngs={}) -> (outputs, state)`,
      and its variables `{"params": ..., "batch_stats": ...}`. Both are nested
      dictionaries of arrays: "params" has the arrays of `nnx.Param`, "batch_stats" all
      others, except random keys and intermediates. In training, `rngs` contains the key
      `"dropout"`, which replaces the module's keys. In evaluation the state is returned
      unchanged.

    Raises:
      ValueError: in training, if a module has random keys and `rngs` has no key.

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

    return apply, jax.tree.map(_copy, {"params": params, "batch_stats": state})
