"""Translates the weights of torchvision's ResNets to Flax variables, and back.

The parameter names of `kddm_jax.resnet` are torchvision's: ``layer1.0.conv2.weight``
is ``params/layer1_0/conv2/kernel``. Convolutions are ``[out, in, h, w]`` in torchvision
and ``[h, w, in, out]`` here; the classifier is ``[out, in]`` in torchvision and ``[in,
out]`` here. The network is recognized from the names and shapes of the tensors. Files
are read and written by `kddm_jax.networks.weights`.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax import adapters, resnet
from kddm_jax.networks.names import COUNTER, torchvision_names
from kddm_jax.networks.projectors import without_projectors

Tensors = Mapping[str, np.ndarray]
# Nested dictionaries of arrays: {"params": ..., "batch_stats": ...}.
Variables = Mapping[str, Mapping[str, Any]]

# Names of the networks of `kddm_jax.resnet` by their blocks.
NAMED = {
    model.blocks: model.__name__
    for model in (resnet.ResNet9, resnet.ResNet18, resnet.ResNet34)
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class WeightsError(ValueError):
    """Reports in one line weights that are unreadable or of another network."""


class Architecture(NamedTuple):
    """Describes the network that weights belong to.

    Attributes:
      blocks: number of blocks in each of the four stages.
      stem: "imagenet" for a 7x7 first convolution, "cifar" for 3x3.  Weights do not
        show whether max pooling follows; after 3x3 it is assumed to be left out.
      width: number of channels of the first stage.
      num_classes: number of logits; 0 for weights without a head.
      channels: number of channels of the images.
    """

    blocks: tuple[int, ...] = resnet.ResNet18.blocks
    stem: str = "imagenet"
    width: int = 64
    num_classes: int = 1000
    channels: int = 3

    @property
    def name(self) -> str:
        """Returns a name such as ResNet18, or ResNet with its blocks."""
        return NAMED.get(self.blocks, f"ResNet {self.blocks}")

    def __str__(self) -> str:
        """Describes the network in words."""
        head = f"{self.num_classes} classes" if self.num_classes else "no head"
        return (
            f"{self.name}, width {self.width}, {self.stem} stem, "
            f"{self.channels} channels, {head}"
        )

    def model(self) -> resnet.ResNet:
        """Makes the network, in float32; it needs a head."""
        if not self.num_classes:
            raise WeightsError(
                "these weights have no head; add one by "
                "kddm_jax.networks.surgery.replace_head"
            )
        return resnet.ResNet(
            num_classes=self.num_classes,
            stem=self.stem,
            width=self.width,
            blocks=self.blocks,
        )

    def shapes(self) -> Variables:
        """Returns the shapes of the variables as `jax.ShapeDtypeStruct`."""
        images = jax.ShapeDtypeStruct((1, 32, 32, self.channels), jnp.float32)
        model = self._replace(num_classes=self.num_classes or 1).model()
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        if not self.num_classes:
            del shapes["params"]["fc"]
        return shapes


def _torch_layout(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns torch's order of axes for a kernel (4-d) or a dense layer (2-d)."""
    return {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), tuple(range(len(shape))))


def _our_layout(shape: Sequence[int]) -> tuple[int, ...]:
    return {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(shape), tuple(range(len(shape))))


def _torch_name(path: Sequence[str]) -> str:
    """Turns ``(params, layer1_0, conv2, kernel)`` into ``layer1.0.conv2.weight``."""
    _, *modules, leaf = path
    return ".".join([*modules, ""]).replace("_", ".") + _LEAVES.get(leaf, leaf)


def _torch_names(variables: Variables) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Maps torchvision's names to path and leaf."""
    flat = flax.traverse_util.flatten_dict(dict(variables))
    return {_torch_name(path): (path, leaf) for path, leaf in flat.items()}


@lru_cache(maxsize=32)
def _expected(found: Architecture) -> dict[str, tuple[tuple[str, ...], tuple]]:
    """Maps torchvision's names to the path in the variables and torch's shape."""
    expected = {}
    for name, (path, leaf) in _torch_names(found.shapes()).items():
        axes = _torch_layout(leaf.shape)
        expected[name] = path, tuple(leaf.shape[axis] for axis in axes)
    return expected


def _find(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Recognizes the network by the names of tensors, the stem and the head."""
    has_head = "fc.weight" in shapes or "fc.bias" in shapes
    for name, rank in (("conv1.weight", 4), ("fc.weight", 2)):
        if name == "fc.weight" and not has_head:
            continue
        shape = shapes.get(name, ())
        if len(shape) != rank or 0 in shape:
            some = ", ".join(sorted(shapes)[:3]) or "nothing"
            found = (
                f"has shape {list(shape)}" if name in shapes else f"is not in {some}"
            )
            raise WeightsError(
                f"the {rank}-d tensor {name} {found}; pass weights named as those of "
                "torchvision's ResNet18 or ResNet34"
            )
    if any(re.search(r"layer\d\.\d+\.conv3\.", name) for name in shapes):
        raise WeightsError(
            "layer1.0.conv3: blocks of three convolutions (ResNet50 and deeper) are "
            "not known here; pass weights of a ResNet18 or ResNet34"
        )
    width, channels, *kernel = shapes["conv1.weight"]
    sizes = ((name, stem.kernel) for name, stem in adapters.STEMS.items())
    stems = {(size,) * 2: name for name, size in sizes}
    if tuple(kernel) not in stems:
        raise WeightsError(
            f"conv1.weight is a convolution of {kernel}; the stems known here have "
            + " or ".join(f"{size[0]}x{size[1]}" for size in stems)
        )
    blocks = [re.match(r"layer([1-4])\.(\d+)\.", name) for name in shapes]
    blocks = {(int(match[1]), match[2]) for match in blocks if match}
    counts = (sum(stage == s for stage, _ in blocks) for s in (1, 2, 3, 4))
    return Architecture(
        blocks=tuple(max(count, 1) for count in counts),
        stem=stems[tuple(kernel)],
        width=width,
        num_classes=shapes["fc.weight"][0] if has_head else 0,
        channels=channels,
    )


def _check(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Finds the network and compares every name and shape with it."""
    found = _find(shapes)
    expected = {name: shape for name, (_, shape) in _expected(found).items()}
    of = f"; it was taken for {found}"
    for what, names in (
        ("missing", expected.keys() - shapes.keys()),
        ("not expected", shapes.keys() - expected.keys()),
    ):
        if names:
            first, *more = sorted(names)
            others = f" (and {len(more)} more)" if more else ""
            raise WeightsError(f"tensor {first} is {what}{others}{of}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise WeightsError(
                f"tensor {name} has shape {list(shapes[name])}, expected "
                f"{list(shape)}{of}"
            )
    return found


def _plain_names(tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns the network's tensors under torchvision's names."""
    try:
        known = torchvision_names(tensors)
    except ValueError as error:
        raise WeightsError(str(error)) from error
    return {known[name]: tensors[name] for name in known}


def as_float32(name: str, tensor: np.ndarray) -> np.ndarray:
    """Converts a tensor of weights, or raises if it is quantized or not finite."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise WeightsError(
            f"tensor {name} is {tensor.dtype}, expected floating point; "
            "pass weights that are not quantized"
        )
    with np.errstate(over="ignore"):
        tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
        raise WeightsError(f"tensor {name} is not finite; the file is of no use")
    return tensor


def from_torchvision(tensors: Tensors) -> dict[str, dict[str, Any]]:
    """Turns the tensors of a torchvision ResNet into variables.

    Names of other libraries are translated, and tensors outside the network are left
    out; see `kddm_jax.networks.names`.

    Args:
      tensors: tensors by name, of any floating dtype, such as a ``state_dict()`` on the
        CPU.

    Returns:
      ``{"params": ..., "batch_stats": ...}``, nested dictionaries of float32 NumPy
      arrays, without ``params/fc`` if there is no head; `architecture` finds their
      network.

    Raises:
      WeightsError: there are several networks, or a tensor is missing, not expected,
        misshaped, not floating point or not finite.

    Examples:
      >>> shapes = Architecture(width=4, num_classes=5).shapes()
      >>> tensors = to_torchvision(jax.tree.map(jnp.ones_like, shapes))
      >>> tensors["fc.weight"].shape
      (5, 32)
      >>> variables = from_torchvision(tensors)
      >>> variables["params"]["layer1_0"]["conv2"]["kernel"].shape
      (3, 3, 4, 4)
    """
    tensors = {k: np.asarray(v) for k, v in _plain_names(tensors).items()}
    found = _check({name: tensor.shape for name, tensor in tensors.items()})
    flat = {}
    for name, (path, _) in _expected(found).items():
        tensor = as_float32(name, tensors[name])
        flat[path] = np.ascontiguousarray(tensor.transpose(_our_layout(tensor.shape)))
    return flax.traverse_util.unflatten_dict(flat)


def network_of(variables: Variables) -> dict[str, dict[str, Any]]:
    """Returns variables without projectors, which are useful only with a teacher."""
    parts = {part: variables.get(part, {}) for part in ("params", "batch_stats")}
    return without_projectors(parts)


def to_torchvision(variables: Variables) -> dict[str, np.ndarray]:
    """Turns variables into tensors that torchvision's ResNets load.

    Projectors are left out.  BatchNorm's ``num_batches_tracked`` is zero, because only
    an average without momentum would read it.

    Args:
      variables: ``{"params": ..., "batch_stats": ...}`` of a `kddm_jax.resnet.ResNet`.

    Returns:
      Float32 tensors by torchvision's name, each with its own memory.

    Raises:
      WeightsError: the variables belong to another network.

    Examples:
      >>> shapes = Architecture(width=4, num_classes=5).shapes()
      >>> tensors = to_torchvision(jax.tree.map(jnp.ones_like, shapes))
      >>> tensors["layer2.0.downsample.0.weight"].shape
      (8, 4, 1, 1)
    """
    tensors = {}
    for name, (_, leaf) in _torch_names(network_of(variables)).items():
        array = np.asarray(leaf)
        transposed = array.transpose(_torch_layout(array.shape))
        tensors[name] = np.array(as_float32(name, transposed), order="C")
    _check({name: tensor.shape for name, tensor in tensors.items()})
    norms = [name for name in tensors if name.endswith("running_var")]
    counters = [name.replace("running_var", COUNTER) for name in norms]
    return {**tensors, **{name: np.zeros((), np.int64) for name in counters}}


def architecture(variables: Variables) -> Architecture:
    """Finds the network that variables belong to.

    Args:
      variables: ``{"params": ..., "batch_stats": ...}`` of arrays, or of other objects
        that have a shape.

    Returns:
      The description of the network; its ``model()`` builds it.

    Raises:
      WeightsError: the variables do not belong to a `kddm_jax.resnet.ResNet`.

    Examples:
      >>> model = resnet.ResNet34(num_classes=10, stem="cifar", width=4)
      >>> images = jnp.zeros((1, 8, 8, 1))
      >>> print(architecture(jax.eval_shape(model.init, jax.random.key(0), images)))
      ResNet34, width 4, cifar stem, 1 channels, 10 classes
    """
    shapes = {}
    for name, (_, leaf) in _torch_names(network_of(variables)).items():
        shape = np.shape(leaf)
        shapes[name] = tuple(shape[axis] for axis in _torch_layout(shape))
    return _check(shapes)
