"""Builds networks by name, or by a user's ``module:function``."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from kddm_jax import adapters, resnet
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.networks import cifar, mlp, mobilenet, vgg, vit

# The names that `settings.MODELS` lists.
NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    network.__name__: network
    for network in (
        *(resnet.ResNet9, resnet.ResNet18, resnet.ResNet34),
        *(mobilenet.MobileNetV2, vit.ViT, mlp.TeacherMLP, mlp.StudentMLP),
        *(cifar.ResNet20, cifar.ResNet32, cifar.ResNet56, cifar.ResNet110),
        *(cifar.ResNet8x4, cifar.ResNet32x4),
        *(cifar.WRN16x2, cifar.WRN40x1, cifar.WRN40x2, vgg.VGG8, vgg.VGG13),
    )
}


def load_module(name: str) -> ModuleType:
    """Imports a module from the installed packages or, last, the working folder."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)


def _find(name: str) -> Callable[..., Any]:
    """Finds the function that builds a network."""
    if name in NETWORKS:
        return NETWORKS[name]
    module, _, function = name.partition(":")
    try:
        return getattr(load_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"model {name!r}: {error}; the module is looked for in the working folder "
            "and among the installed packages"
        ) from error


def source_digest(name: str) -> str | None:
    """Hashes the file behind ``module:NAME``; returns None for a known name."""
    module, colon, _ = name.partition(":")
    if not colon:
        return None
    file = getattr(load_module(module), "__file__", None)
    if file is None:
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class NNXNetwork:
    """Makes an NNX module, with the method `init` of a Linen module.

    Attributes:
      make: function that takes the options and `rngs`, and returns an `nnx.Module`.
      options: names and values of the options, as pairs.
    """

    make: Callable[..., nnx.Module]
    options: tuple[tuple[str, object], ...]

    def module(self, key: jax.Array) -> nnx.Module:
        """Makes the module with random parameters."""
        return self.make(**dict(self.options), rngs=nnx.Rngs(key))

    def init(self, key: jax.Array, images: jax.Array) -> dict[str, Any]:
        """Draws parameters and state."""
        del images
        return adapters.nnx_apply(self.module(key))[1]

    def init_with_output(self, key: jax.Array, images: jax.Array) -> tuple:
        """Draws parameters and state, and computes outputs in evaluation mode."""
        apply, variables = adapters.nnx_apply(self.module(key))
        return apply(variables, images, train=False)[0], variables


Network = nn.Module | NNXNetwork


def name_of(model: Network) -> str:
    """Returns the name of a network's class, or of the function that makes it."""
    made = model.make if isinstance(model, NNXNetwork) else type(model)
    return getattr(made, "__name__", type(made).__name__)


def network_apply(model: Network) -> Callable[..., tuple[Any, Mapping[str, Any]]]:
    """Turns a network into the apply function that the train step takes."""
    if not isinstance(model, NNXNetwork):
        return adapters.linen_apply(model)
    shapes = nnx.eval_shape(lambda: model.module(jax.random.key(0)))
    return adapters.nnx_apply(shapes)[0]


def build(name: str, **options: object) -> Network:
    """Builds a network.

    Args:
      name: a known name, or ``module:function``.  The function must take
        ``num_classes``, and ``rngs`` if it makes an NNX module.  It is called with
        those of the options ``stem``, ``width``, ``dtype`` and ``axis_name`` that it
        takes.
      **options: values of the options.

    Returns:
      A Linen module with ``__call__(images, train=...)``, or an `NNXNetwork` with
      ``__call__(images)``, whose result has ``logits``, ``features`` and ``maps``.

    Raises:
      UserError: the function does not exist, does not take ``num_classes``, raises an
        error for an option, or does not return a network.
    """
    make = _find(name)
    is_nnx = isinstance(make, type) and issubclass(make, nnx.Module)
    # The signature of the class itself is that of its metaclass.
    known = inspect.signature(make.__init__ if is_nnx else make).parameters
    if "num_classes" not in known:
        raise UserError(f"model {name!r} does not take num_classes; add the argument")
    given = {k: v for k, v in options.items() if k in known}
    network: Any
    try:
        if "rngs" in known:
            network = NNXNetwork(make, tuple(given.items()))
            made: Any = nnx.eval_shape(lambda: network.module(jax.random.key(0)))
        else:
            network = made = make(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"model {name!r}: {error}") from error
    if isinstance(made, nnx.Module) and "rngs" not in known:
        raise UserError(
            f"model {name!r} gives an nnx.Module, but does not take rngs; add the "
            "argument, by which each seed starts from parameters of its own"
        )
    if not isinstance(made, nn.Module | nnx.Module):
        raise UserError(
            f"model {name!r} gives {type(made).__name__}, not a flax.linen.Module or a "
            "flax.nnx.Module; wrap yours in one"
        )
    return network


def shapes(name: str, model: Network, image: tuple[int, ...], batch: int):
    """Returns the shapes of a network's outputs for a batch, without computing them.

    Args:
      name: name of the network, for error messages.
      model: the network.
      image: shape of an image, ``(h, w, c)``.
      batch: number of images.

    Returns:
      The shapes of ``features``, ``logits`` and ``maps`` (`jax.ShapeDtypeStruct`), and
      the names of the top ``modules``.

    Raises:
      UserError: the network does not take such images, or its outputs have no logits,
        features and maps.
    """
    images = jax.ShapeDtypeStruct((batch, *image), jnp.float32)
    names, modules = [], []  # in the network's order: tracing returns them sorted

    def trace(key, images):
        outputs, variables = model.init_with_output(key, images)
        names.extend(outputs.maps)
        modules.extend(variables["params"])
        return outputs.features, outputs.logits, dict(outputs.maps)

    try:
        features, logits, maps = jax.eval_shape(trace, jax.random.key(0), images)
        maps = {name: maps[name] for name in names}
        if "logits" in maps:
            raise ValueError('a map is named "logits", the name of the predictions')
        return {
            "features": features,
            "logits": logits,
            "maps": maps,
            "modules": tuple(modules),
        }
    except (TypeError, ValueError, AttributeError) as error:
        text = str(error).splitlines()[0]
        raise UserError(
            f"model {name!r} on images {list(image)}: {text}; it must take "
            f"{'(images)' if isinstance(model, NNXNetwork) else '(images, train=...)'} "
            "and return logits, features and maps"
        ) from error
