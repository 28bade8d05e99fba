"""Networks by name, or anybody's as ``module:function``."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn
from settings import UserError

from kddm_jax.mlp import StudentMLP, TeacherMLP
from kddm_jax.mobilenet import MobileNetV2
from kddm_jax.resnet import ResNet9, ResNet18, ResNet34
from kddm_jax.vit import ViT

# The names that `settings.MODELS` lists.
NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "ResNet9": ResNet9,
    "ResNet18": ResNet18,
    "ResNet34": ResNet34,
    "MobileNetV2": MobileNetV2,
    "ViT": ViT,
    "TeacherMLP": TeacherMLP,
    "StudentMLP": StudentMLP,
}


def _find(name: str):
    """The function that makes a network."""
    if name in NETWORKS:
        return NETWORKS[name]
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # as `python -m` has it
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"model {name!r}: {error}; the module is looked for in the working folder "
            "and among the installed packages"
        ) from error


def build(name: str, **options: object) -> nn.Module:
    """Makes a network.

    Args:
      name: a known name, or ``module:function``.  The function is called with those
        of the options that it has: ``num_classes``, which it must have, ``stem``,
        ``width``, ``dtype``, ``axis_name``.
      **options: their values.

    Returns:
      A Linen module whose ``__call__(images, train=...)`` gives something with
      ``logits``, ``features`` and ``maps``.

    Raises:
      UserError: there is no such function, it does not take ``num_classes``, refuses
        an option, or gives something else.
    """
    make = _find(name)
    known = inspect.signature(make).parameters
    if "num_classes" not in known:
        raise UserError(f"model {name!r} does not take num_classes; add the argument")
    try:
        model = make(**{k: v for k, v in options.items() if k in known})
    except (TypeError, ValueError) as error:
        raise UserError(f"model {name!r}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model {name!r} gives {type(model).__name__}, not a flax.linen.Module; "
            "wrap yours in one"
        )
    return model


def shapes(name: str, model: nn.Module, image: tuple[int, ...], batch: int):
    """Shapes of what a network makes of a batch, without computing anything.

    Args:
      name: as the command has it, for errors.
      model: the network.
      image: ``(h, w, c)``.
      batch: number of images.

    Returns:
      Its outputs, of `jax.ShapeDtypeStruct`.

    Raises:
      UserError: it does not take such images or gives no logits, features and maps.
    """
    images = jax.ShapeDtypeStruct((batch, *image), jnp.float32)
    names = []  # in their order: what comes out of a trace is sorted

    def trace(key, images):
        outputs, _ = model.init_with_output(key, images)
        names.extend(outputs.maps)
        return outputs.features, outputs.logits, dict(outputs.maps)

    try:
        features, logits, maps = jax.eval_shape(trace, jax.random.key(0), images)
        maps = {name: maps[name] for name in names}
        return {"features": features, "logits": logits, "maps": maps}
    except (TypeError, ValueError, AttributeError) as error:
        text = str(error).splitlines()[0]
        raise UserError(
            f"model {name!r} on images {list(image)}: {text}; it must take (images, "
            "train=...) and give logits, features and maps"
        ) from error
