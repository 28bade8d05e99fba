"""Reads and writes files of ResNet weights, and converts them.

Files end in ``.safetensors``, ``.npz``, or ``.pth`` (``.pt``) and contain tensors under
names of torchvision, timm, transformers or kuangliu (`kddm_jax.networks.names`).
``.pth`` needs PyTorch, and code in such a file is not run; ``.safetensors`` needs the
extra ``experiments``. Checkpoints of runs are read and written, too.

    kddm convert resnet18.pth resnet18.safetensors
    kddm convert runs/digits-laptop/w2/seed0 student.safetensors
"""

import argparse
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from kddm_jax import checkpoint
from kddm_jax.extras import extra
from kddm_jax.networks.torchvision import (
    NAMED,
    Architecture,
    Tensors,
    Variables,
    WeightsError,
    architecture,
    from_torchvision,
    network_of,
    to_torchvision,
)

NOTHING: Mapping[str, str] = MappingProxyType({})


def _torch(suffix: str):
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError(
            f"{suffix} files need PyTorch, which is not installed; pip install torch, "
            "or take .safetensors"
        ) from error
    return torch


def read_safetensors(path: Path) -> Tensors:
    """Reads the tensors of a ``.safetensors`` file by name.

    Raises:
      WeightsError: the file is damaged.
    """
    with extra(".safetensors"):
        from safetensors.numpy import load_file

    try:
        return load_file(path)
    except Exception as error:  # safetensors' error, or NumPy's for an unknown dtype
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
    except Exception as error:  # various errors of NumPy and zipfile
        raise WeightsError("damaged, or no .npz; get it again") from error
    for name, tensor in tensors.items():
        if tensor.dtype == "V2":  # NumPy saves bfloat16 under this name
            tensors[name] = tensor.view(jnp.bfloat16)
    return tensors


# Names under which training scripts save the weights, with epochs and optimizers.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")


def _unwrapped(loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Finds the state_dict in a training script's checkpoint."""
    for key in _WRAPPERS:
        if isinstance(loaded.get(key), Mapping):
            return _unwrapped(loaded[key])
    return loaded


def _read_torch(path: Path) -> Tensors:
    torch = _torch(path.suffix)

    def as_array(tensor):
        halved = tensor.dtype == torch.bfloat16  # not a NumPy dtype
        return (tensor.detach().float() if halved else tensor.detach()).numpy()

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        tensors = _unwrapped(loaded).items()
        return {name: as_array(tensor) for name, tensor in tensors}
    except Exception as error:  # of torch, pickle or zipfile, or there are no tensors
        raise WeightsError(
            "damaged, or more than tensors; in PyTorch save model.state_dict() alone"
        ) from error


def safetensors_bytes(tensors: Tensors, about: Mapping[str, str] = NOTHING) -> bytes:
    """Returns the content of a ``.safetensors`` file with the metadata ``about``."""
    with extra(".safetensors"):
        from safetensors.numpy import save

    return save(dict(tensors), metadata={"format": "pt", **about})


def _npz_bytes(tensors: Tensors, _: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **cast("dict[str, Any]", tensors))  # no name is also an option
    return buffer.getvalue()


def _torch_bytes(tensors: Tensors, _: Mapping[str, str]) -> bytes:
    torch, buffer = _torch(".pth"), io.BytesIO()
    torch.save({name: torch.from_numpy(a) for name, a in tensors.items()}, buffer)
    return buffer.getvalue()


class _Format(NamedTuple):
    read: Callable[[Path], Tensors]
    encode: Callable[[Tensors, Mapping[str, str]], bytes]


_FORMATS: Mapping[str, _Format] = {
    ".safetensors": _Format(read_safetensors, safetensors_bytes),
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
    """Reads variables from a file with torchvision's names, or from a checkpoint.

    Args:
      path: a ``.safetensors``, ``.npz``, ``.pth`` or ``.pt`` file, a checkpoint, or the
        folder of a run.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` without projectors, on the host.

    Raises:
      WeightsError: the file is missing, unreadable, damaged, or of another network.
      CheckpointError: a checkpoint is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return network_of(_restore(path)[0])
    read = _format(path).read
    try:
        with path.open("rb"):  # because the readers raise different errors
            pass
        return from_torchvision(read(path))
    except OSError as error:
        raise WeightsError(
            f"cannot read {path}: {error.strerror}; pass a file of weights"
        ) from error
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _restore(path: Path) -> tuple[checkpoint.Arrays, dict[str, object]]:
    """Reads the arrays and the record of a checkpoint of a known network."""
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


def save(
    path: Path,
    variables: Variables,
    *,
    overwrite: bool = False,
    about: Mapping[str, str] = NOTHING,
) -> None:
    """Writes variables under torchvision's names, atomically.

    Args:
      path: file that ends in ``.safetensors``, ``.npz``, ``.pth`` or ``.pt``.
      variables: variables of a `kddm_jax.resnet.ResNet`; projectors are left out.
      overwrite: whether an existing file may be replaced.
      about: metadata of a ``.safetensors`` file; other formats have none.

    Raises:
      WeightsError: the suffix is unknown, the file exists, the variables belong to
        another network, or the file cannot be written.
    """
    path = Path(path)
    encode = _format(path).encode
    _refuse(path, overwrite)
    write(path, encode(to_torchvision(variables), about))


def write(path: Path, content: bytes) -> None:
    """Writes or replaces a file, atomically.

    Raises:
      WeightsError: the file cannot be written.
    """
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
    """Saves a checkpoint in its own folder, never among the checkpoints of a run."""
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
    """Makes the record of a checkpoint for weights of unknown training."""
    if found.blocks not in NAMED:
        raise WeightsError(
            f"{source}: checkpoints are of {', '.join(NAMED.values())}, this is "
            f"{found.name}; choose a file to write to"
        )
    run = {
        "dataset": None,
        "teacher_model": found.name,
        "width": found.width,
        "stem": found.stem,
    }
    return {"run": run, "num_classes": found.num_classes, "channels": found.channels}


def _normalization(known: Mapping[str, object]) -> dict[str, object]:
    """Returns mean and standard deviation of the data set of a checkpoint's run.

    Checkpoints of version 0.2.0 do not contain them.
    """
    return {key: known[key] for key in ("mean", "std") if key in known}


def convert(source: Path, target: Path, *, overwrite: bool = False) -> Architecture:
    """Converts a file or checkpoint of weights to a file or checkpoint.

    Args:
      source: a path that `load` takes.
      target: a file that `save` takes; without a suffix, the folder of a checkpoint.
        The checkpoint's record copies the source's record of its training.  If the
        source is a file, the data set in the record is None.  A ``.safetensors`` file
        has the mean and standard deviation of the source's data set as metadata.
      overwrite: whether an existing target may be replaced.

    Returns:
      The description of the network.

    Raises:
      WeightsError: as in `load` and `save`.
      CheckpointError: a checkpoint is damaged, or cannot be written.
    """
    _refuse(target, overwrite)
    known: Mapping[str, object] = {}
    if source.is_dir():
        arrays, known = _restore(source)
        variables = network_of(arrays)
    else:
        variables = load(source)
    found = architecture(variables)
    about = _normalization(known)
    if target.suffix:
        texts = {key: json.dumps(value) for key, value in about.items()}
        save(target, variables, overwrite=overwrite, about=texts)
        return found
    meta = {**_record(source, found), **about, "converted_from": source.name}
    meta["run"] = known.get("run", meta["run"])
    _save_checkpoint(target, variables, meta, overwrite)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="kddm convert",
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
        help="file; or a folder, without suffix, for a checkpoint that --teacher takes "
        "(it normalizes images by the data set's mean and standard deviation)",
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
