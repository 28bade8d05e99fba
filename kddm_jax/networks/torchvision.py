"""torchvision's ResNet weights as our variables, and back.

The parameter names of `kddm_jax.resnet` are torchvision's: ``layer1.0.conv2.weight``
is ``params/layer1_0/conv2/kernel``.  Convolutions are ``[out, in, h, w]`` there and
``[h, w, in, out]`` here, the classifier ``[out, in]`` and ``[in, out]``.  What network
it is, is found from the tensors.  Files are ``.safetensors``, ``.npz``, or ``.pth``
(``.pt``), which needs PyTorch and is read without running any code that it holds.

    python -m kddm_jax.convert resnet18.pth resnet18.safetensors
    python -m kddm_jax.convert runs/digits-laptop/w2/seed0 student.safetensors
"""

import argparse
import io
import os
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax import checkpoint, resnet

Tensors = Mapping[str, np.ndarray]
# {"params": ..., "batch_stats": ...}, nested dictionaries of arrays.
Variables = Mapping[str, Mapping[str, Any]]

# Trained beside a student, in its tree, and of no use without its teacher.
PROJECTORS = "projectors"

_NAMED = {
    model.blocks: model.__name__
    for model in (resnet.ResNet9, resnet.ResNet18, resnet.ResNet34)
}
_COUNTER = "num_batches_tracked"
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class WeightsError(ValueError):
    """Weights are unreadable, or of another network; one line says which and why."""


class Architecture(NamedTuple):
    """The network that weights belong to.

    Attributes:
      blocks: number of blocks in each of the four stages.
      stem: "imagenet" for a 7x7 first convolution, "cifar" for 3x3: weights do not
        say whether a max pooling follows, and it is taken to be left out after 3x3.
      width: channels of the first stage.
      num_classes: number of logits.
      channels: of the images.
    """

    blocks: tuple[int, ...] = resnet.ResNet18.blocks
    stem: str = "imagenet"
    width: int = 64
    num_classes: int = 1000
    channels: int = 3

    @property
    def name(self) -> str:
        """ResNet18 and the like, or ResNet with its blocks."""
        return _NAMED.get(self.blocks, f"ResNet {self.blocks}")

    def __str__(self) -> str:
        """In words."""
        return (
            f"{self.name}, width {self.width}, {self.stem} stem, "
            f"{self.channels} channels, {self.num_classes} classes"
        )

    def model(self) -> resnet.ResNet:
        """The network, in float32."""
        return resnet.ResNet(
            num_classes=self.num_classes,
            stem=self.stem,
            width=self.width,
            blocks=self.blocks,
        )

    def shapes(self) -> Variables:
        """The variables' shapes, as `jax.ShapeDtypeStruct`."""
        images = jax.ShapeDtypeStruct((1, 32, 32, self.channels), jnp.float32)
        return jax.eval_shape(self.model().init, jax.random.key(0), images)


# ----------------------------------------------------------------------- tensors


def _torch_layout(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes of ours in torch's order: all 4-d arrays are kernels, 2-d ones dense."""
    return {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), tuple(range(len(shape))))


def _our_layout(shape: Sequence[int]) -> tuple[int, ...]:
    return {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(shape), tuple(range(len(shape))))


def _torch_name(path: Sequence[str]) -> str:
    """``(params, layer1_0, conv2, kernel)`` -> ``layer1.0.conv2.weight``."""
    _, *modules, leaf = path
    return ".".join([*modules, ""]).replace("_", ".") + _LEAVES.get(leaf, leaf)


def _torch_names(variables: Variables) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Path and leaf by torchvision's name."""
    flat = flax.traverse_util.flatten_dict(dict(variables))
    return {_torch_name(path): (path, leaf) for path, leaf in flat.items()}


@lru_cache(maxsize=32)
def _expected(found: Architecture) -> dict[str, tuple[tuple[str, ...], tuple]]:
    """Our path and torch's shape of every tensor, by torchvision's name."""
    expected = {}
    for name, (path, leaf) in _torch_names(found.shapes()).items():
        axes = _torch_layout(leaf.shape)
        expected[name] = path, tuple(leaf.shape[axis] for axis in axes)
    return expected


def _find(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """The network of these tensors: from their names, the stem's and the head's."""
    for name, rank in (("conv1.weight", 4), ("fc.weight", 2)):
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
    sizes = ((name, stem.kernel) for name, stem in resnet.STEMS.items())
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
        num_classes=shapes["fc.weight"][0],
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
    """Without BatchNorm's counters, and without a prefix that all names have."""
    kept = {k: v for k, v in tensors.items() if not k.endswith(_COUNTER)}
    first = min((k for k in kept if k.endswith("conv1.weight")), key=len, default="")
    prefix = first.removesuffix("conv1.weight")  # DataParallel's "module."
    if not all(name.startswith(prefix) for name in kept):
        return kept
    return {name.removeprefix(prefix): value for name, value in kept.items()}


def _float32(name: str, tensor: np.ndarray) -> np.ndarray:
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

    BatchNorm's ``num_batches_tracked`` is left out, and a prefix that all names have,
    such as ``module.``, too.

    Args:
      tensors: by torchvision's name, of any floating dtype; a ``state_dict()`` on the
        CPU will do.

    Returns:
      ``{"params": ..., "batch_stats": ...}``, nested dictionaries of float32 NumPy
      arrays; `architecture` says of which network.

    Raises:
      WeightsError: a tensor is missing, not expected, misshaped, not floating point
        or not finite.

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
        tensor = _float32(name, tensors[name])
        flat[path] = np.ascontiguousarray(tensor.transpose(_our_layout(tensor.shape)))
    return flax.traverse_util.unflatten_dict(flat)


def _network(variables: Variables) -> dict[str, dict[str, Any]]:
    """The network alone, without projectors."""
    return {
        part: {k: v for k, v in variables.get(part, {}).items() if k != PROJECTORS}
        for part in ("params", "batch_stats")
    }


def to_torchvision(variables: Variables) -> dict[str, np.ndarray]:
    """Turns variables into tensors that torchvision's ResNets load.

    Projectors are left out.  BatchNorm's ``num_batches_tracked`` is zero: only an
    average without momentum would read it.

    Args:
      variables: ``{"params": ..., "batch_stats": ...}`` of a `kddm_jax.resnet.ResNet`.

    Returns:
      Float32 tensors by torchvision's name, each with memory of its own.

    Raises:
      WeightsError: the variables are of another network.

    Examples:
      >>> shapes = Architecture(width=4, num_classes=5).shapes()
      >>> tensors = to_torchvision(jax.tree.map(jnp.ones_like, shapes))
      >>> tensors["layer2.0.downsample.0.weight"].shape
      (8, 4, 1, 1)
    """
    tensors = {}
    for name, (_, leaf) in _torch_names(_network(variables)).items():
        array = np.asarray(leaf)
        transposed = array.transpose(_torch_layout(array.shape))
        tensors[name] = np.array(_float32(name, transposed), order="C")
    _check({name: tensor.shape for name, tensor in tensors.items()})
    norms = [name for name in tensors if name.endswith("running_var")]
    counters = [name.replace("running_var", _COUNTER) for name in norms]
    return {**tensors, **{name: np.zeros((), np.int64) for name in counters}}


def architecture(variables: Variables) -> Architecture:
    """Finds the network that variables belong to.

    Args:
      variables: ``{"params": ..., "batch_stats": ...}``; arrays, or anything else that
        has a shape.

    Returns:
      What to build it by.

    Raises:
      WeightsError: they are of no `kddm_jax.resnet.ResNet`.

    Examples:
      >>> model = resnet.ResNet34(num_classes=10, stem="cifar", width=4)
      >>> images = jnp.zeros((1, 8, 8, 1))
      >>> print(architecture(jax.eval_shape(model.init, jax.random.key(0), images)))
      ResNet34, width 4, cifar stem, 1 channels, 10 classes
    """
    shapes = {}
    for name, (_, leaf) in _torch_names(_network(variables)).items():
        shape = np.shape(leaf)
        shapes[name] = tuple(shape[axis] for axis in _torch_layout(shape))
    return _check(shapes)


# ---------------------------------------------------------------------- surgery


def _identity_block(key: jax.Array, features: int) -> tuple[dict, dict]:
    """Parameters and statistics of a block that starts as the identity.

    Its second BatchNorm scales by zero, and maps are non-negative after a ReLU:
    ``relu(x + 0) = x``.
    """
    shape = (3, 3, features, features)
    conv = lambda key: {"kernel": np.asarray(resnet.conv_init(key, shape, jnp.float32))}
    full = lambda value: np.full(features, value, np.float32)
    norm = lambda scale: {"scale": full(scale), "bias": full(0)}
    first, second = jax.random.split(key)
    params = {
        "conv1": conv(first),
        "bn1": norm(1),
        "conv2": conv(second),
        "bn2": norm(0),
    }
    stats = {name: {"mean": full(0), "var": full(1)} for name in ("bn1", "bn2")}
    return params, stats


def grow(
    key: jax.Array, variables: Variables, blocks: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Makes a deeper network that computes the same function.

    The blocks at hand are copied; those added at the end of each stage start as the
    identity, their convolutions drawn anew, and learn from there.

    Args:
      key: of the added convolutions.
      variables: of a network.
      blocks: wanted in each of the four stages, such as ``ResNet34.blocks``.

    Returns:
      Variables of the deeper network.

    Raises:
      WeightsError: a stage has more blocks already.

    References:
      Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour",
      arXiv:1706.02677, section 5.1: the zero scale.

    Examples:
      >>> variables = jax.tree.map(jnp.ones_like, Architecture(width=4).shapes())
      >>> grown = grow(jax.random.key(0), variables, resnet.ResNet34.blocks)
      >>> architecture(grown).name
      'ResNet34'
    """
    found, blocks = architecture(variables), tuple(blocks)
    fewer = [new < old for old, new in zip(found.blocks, blocks, strict=False)]
    if len(blocks) != 4 or any(fewer):
        raise WeightsError(
            f"blocks {blocks} cannot be grown from {found.blocks}; pass at least as "
            "many for each of the four stages"
        )
    params, stats = map(dict, _network(variables).values())
    for stage, (old, new) in enumerate(zip(found.blocks, blocks, strict=True)):
        for index in range(old, new):
            # Of its place alone: a deeper network has the same blocks, and more.
            drawn = jax.random.fold_in(jax.random.fold_in(key, stage), index)
            name = f"layer{stage + 1}_{index}"
            params[name], stats[name] = _identity_block(drawn, found.width * 2**stage)
    return {"params": params, "batch_stats": stats}


def replace_head(
    key: jax.Array, variables: Variables, num_classes: int
) -> dict[str, dict[str, Any]]:
    """Puts an untrained classifier in the place of the given one.

    Args:
      key: of its weights, uniform in ``+- 1 / sqrt(d)``; its bias is zero.
      variables: of a network.
      num_classes: number of logits.

    Returns:
      Variables that differ in ``params/fc`` alone.

    Raises:
      WeightsError: ``num_classes < 1``, or the variables are of no network.

    Examples:
      >>> variables = jax.tree.map(jnp.ones_like, Architecture(width=4).shapes())
      >>> variables = replace_head(jax.random.key(0), variables, 10)
      >>> variables["params"]["fc"]["kernel"].shape
      (32, 10)
    """
    if num_classes < 1:
        raise WeightsError(f"num_classes must be a positive int, got {num_classes}")
    shape = (8 * architecture(variables).width, num_classes)
    head = {
        "kernel": np.asarray(resnet.dense_init(key, shape, jnp.float32)),
        "bias": np.zeros(num_classes, np.float32),
    }
    network = _network(variables)
    return {**network, "params": {**network["params"], "fc": head}}


def sum_channels(variables: Variables) -> dict[str, dict[str, Any]]:
    """Makes a network of grey images from one of colour images.

    The first convolution is summed over its input channels: on a grey image it gives
    what the given one gives where that image stands in every channel.

    Args:
      variables: of a network.

    Returns:
      Variables that differ in ``params/conv1`` alone.

    Raises:
      WeightsError: the variables are of no network.

    Examples:
      >>> variables = jax.tree.map(jnp.ones_like, Architecture(width=4).shapes())
      >>> kernel = sum_channels(variables)["params"]["conv1"]["kernel"]
      >>> kernel.shape, float(kernel[0, 0, 0, 0])
      ((7, 7, 1, 4), 3.0)
    """
    architecture(variables)
    network = _network(variables)
    kernel = np.asarray(network["params"]["conv1"]["kernel"])
    first = {"kernel": kernel.sum(2, keepdims=True)}
    return {**network, "params": {**network["params"], "conv1": first}}


# ------------------------------------------------------------------------- files


def _torch(suffix: str):
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError(
            f"{suffix} files need PyTorch, which is not installed; pip install torch, "
            "or take .safetensors"
        ) from error
    return torch


def _read_safetensors(path: Path) -> Tensors:
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except Exception as error:  # its own, or NumPy's of a dtype unknown to it
        raise WeightsError(f"damaged: {error}; get it again") from error


# A ResNet34 of ImageNet takes 87 MB; a small .npz may inflate to terabytes.
_MOST_BYTES = 2**32


def _check_inflated(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > _MOST_BYTES:
        raise WeightsError(
            f"inflates to {size / 1e9:.1f} GB, and no network here has more than "
            f"{_MOST_BYTES / 1e9:.1f}; take .safetensors"
        )


def _read_npz(path: Path) -> Tensors:
    try:
        _check_inflated(path)
        with path.open("rb") as file, np.load(file) as arrays:
            tensors = {name: arrays[name] for name in arrays.files}
    except WeightsError:
        raise
    except Exception as error:  # NumPy's and zipfile's, by what is wrong with it
        raise WeightsError("damaged, or no .npz; get it again") from error
    for name, tensor in tensors.items():
        if tensor.dtype == "V2":  # NumPy forgets the name of bfloat16
            tensors[name] = tensor.view(jnp.bfloat16)
    return tensors


def _read_torch(path: Path) -> Tensors:
    torch = _torch(path.suffix)

    def as_array(tensor):
        halved = tensor.dtype == torch.bfloat16  # unknown to NumPy
        return (tensor.detach().float() if halved else tensor.detach()).numpy()

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):  # as training scripts save it
            loaded = loaded.get(key, loaded)
        return {name: as_array(tensor) for name, tensor in loaded.items()}
    except Exception as error:  # torch's, pickle's, zipfile's; of no tensors, too
        raise WeightsError(
            "damaged, or more than tensors; in PyTorch save model.state_dict() alone"
        ) from error


def _safetensors_bytes(tensors: Tensors) -> bytes:
    from safetensors.numpy import save

    return save(dict(tensors), metadata={"format": "pt"})


def _npz_bytes(tensors: Tensors) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **cast("dict[str, Any]", tensors))  # no name is an option's
    return buffer.getvalue()


def _torch_bytes(tensors: Tensors) -> bytes:
    torch, buffer = _torch(".pth"), io.BytesIO()
    torch.save({name: torch.from_numpy(a) for name, a in tensors.items()}, buffer)
    return buffer.getvalue()


class _Format(NamedTuple):
    read: Callable[[Path], Tensors]
    encode: Callable[[Tensors], bytes]


_FORMATS: Mapping[str, _Format] = {
    ".safetensors": _Format(_read_safetensors, _safetensors_bytes),
    ".npz": _Format(_read_npz, _npz_bytes),
    ".pth": _Format(_read_torch, _torch_bytes),
    ".pt": _Format(_read_torch, _torch_bytes),
}


def _format(path: Path) -> _Format:
    if path.suffix not in _FORMATS:
        raise WeightsError(
            f"{path}: files of weights end in {', '.join(_FORMATS)}; rename or "
            "convert it"
        )
    return _FORMATS[path.suffix]


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Reads variables from a file with torchvision's names, or from a run of ours.

    Args:
      path: a ``.safetensors``, ``.npz``, ``.pth`` or ``.pt`` file; or a checkpoint, or
        the folder of a run.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` without projectors, on the host.

    Raises:
      WeightsError: absent, unreadable, damaged, or of another network.
      CheckpointError: a checkpoint is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _network(_restore(path)[0])
    read = _format(path).read
    try:
        with path.open("rb"):  # here, since readers differ in what they raise
            pass
        return from_torchvision(read(path))
    except OSError as error:
        raise WeightsError(
            f"cannot read {path}: {error.strerror}; pass a file of weights"
        ) from error
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _restore(path: Path) -> tuple[checkpoint.Arrays, dict[str, object]]:
    """All arrays and the record of a checkpoint of one of our networks."""
    found = checkpoint.find(path)
    if found is None:
        raise WeightsError(f"no checkpoint in {path}; pass a run's folder")
    arrays, meta = checkpoint.restore_arrays(found)
    try:
        architecture(arrays)
    except WeightsError as error:
        raise WeightsError(f"{found}: {error}") from error
    return arrays, meta


def _refuse(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise WeightsError(
            f"{path} exists; choose another name, or replace it by overwrite=True "
            "(--force)"
        )


def save(path: Path, variables: Variables, *, overwrite: bool = False) -> None:
    """Writes variables under torchvision's names, a whole file or none.

    Args:
      path: ends in ``.safetensors``, ``.npz``, ``.pth`` or ``.pt``.
      variables: of a `kddm_jax.resnet.ResNet`; projectors are left out.
      overwrite: whether an existing file may be replaced.

    Raises:
      WeightsError: another suffix, an existing file, variables of another network, or
        the disk refused.
    """
    path = Path(path)
    encode = _format(path).encode
    _refuse(path, overwrite)
    content = encode(to_torchvision(variables))
    partial = path.with_name(f"{path.name}.partial")
    try:
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(
            f"cannot write {path}: {error.strerror}; choose another place"
        ) from error


# ----------------------------------------------------------------------- command


def _save_checkpoint(
    folder: Path, variables: Variables, meta: Mapping[str, object], overwrite: bool
) -> None:
    """A checkpoint in a folder of its own: never among those of a run."""
    _refuse(folder, overwrite)
    if folder.exists() and not (
        folder.is_dir()
        and {path.name for path in folder.iterdir()} <= {"step-00000000"}
    ):
        raise WeightsError(
            f"{folder} holds more than a converted checkpoint; choose another name"
        )
    checkpoint.save(folder, 0, variables, meta)


def _record(source: Path, found: Architecture) -> dict[str, object]:
    """What a checkpoint says of weights whose training is not known."""
    if found.blocks not in _NAMED:
        raise WeightsError(
            f"{source}: checkpoints are of {', '.join(_NAMED.values())}, this is "
            f"{found.name}; choose a file to write to"
        )
    run = {
        "dataset": None,
        "teacher_model": found.name,
        "width": found.width,
        "stem": found.stem,
    }
    return {"run": run, "num_classes": found.num_classes, "channels": found.channels}


def convert(source: Path, target: Path, *, overwrite: bool = False) -> Architecture:
    """Converts weights: a file or checkpoint to a file or checkpoint.

    Args:
      source: as `load` takes it.
      target: a file as `save` takes it; without a suffix, the folder of a checkpoint.
        Its record keeps what the source's says of its training; for a file the data
        set is None.
      overwrite: whether an existing target may be replaced.

    Returns:
      The network.

    Raises:
      WeightsError: as `load` and `save`.
      CheckpointError: a checkpoint is damaged, or cannot be written.
    """
    _refuse(target, overwrite)
    known: Mapping[str, object] = {}
    if source.is_dir():
        arrays, known = _restore(source)
        variables = _network(arrays)
    else:
        variables = load(source)
    found = architecture(variables)
    if target.suffix:
        save(target, variables, overwrite=overwrite)
        return found
    meta = {**_record(source, found), "converted_from": source.name}
    meta["run"] = known.get("run", meta["run"])
    _save_checkpoint(target, variables, meta, overwrite)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kddm_jax.convert",
        description="Converts ResNet weights between torchvision's names and ours.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="IN",
        help=f"file ({', '.join(_FORMATS)}), checkpoint, or a run's folder",
    )
    parser.add_argument(
        "target",
        type=Path,
        metavar="OUT",
        help="file; or a folder, without suffix, for a checkpoint that --teacher takes",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT")
    given = parser.parse_args(arguments)
    try:
        found = convert(given.source, given.target, overwrite=given.force)
    except (WeightsError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.source} -> {given.target}: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
