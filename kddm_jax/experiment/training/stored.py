"""Writes and reads a teacher's outputs on fixed views of the students' images.

From such a file, students learn without the teacher's network as they do with it. Its
arrays have a row for each view; view v of image i is row ``i V + v``:

  features   pooled features, [n V, d]
  maps/NAME  a map, [n V, h, w, c]
  logits     logits of all k classes, [n V, k]; or instead of them
  top        the K largest logits, [n V, K]
  classes    their classes, [n V, K]
  rest       log-sum-exp of the other logits, [n V]

The other logits are then read as equal, which leaves the probabilities of the K classes
as they were. ``indices`` are the places of the n images in the training set.

A single process maps the file into memory, so that maps that no method compares take
none; with several processes, each reads all of it.
"""

import hashlib
import json
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax import adapters
from kddm_jax.experiment.checks import layer_pairs
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import RELEASED, Augmentation, Settings
from kddm_jax.experiment.training import methods, statistics

OPTION = "--teacher-outputs"
MAP = "maps/"  # begins the names of maps in a file
# Keys of the description of the outputs and the teacher in a file.
ABOUT = ("dataset", "classes", "images", "source", "views", "augmentation", "drawn")
ABOUT += ("dtype", "half", "top", "stored", "layers", "held_out", "teacher", "model")
ABOUT += ("width", "accuracy", "top5", "eval_images")


@dataclass(frozen=True)
class StoredOutputs:
    """Contains the outputs of a teacher that were read from a file.

    Attributes:
      outputs: logits and pooled features, float32, on the host, without maps.
      maps: the stored maps by name, as in the file.
      about: description of the outputs and the teacher.
      digest: digest of the file.
    """

    outputs: adapters.Outputs
    maps: Mapping[str, np.ndarray]
    about: dict[str, Any]
    digest: str

    def words_for(self, settings: Settings, name: str) -> str:
        """Describes how the outputs that a method reads differ from the network's.

        Args:
          settings: the settings of the command.
          name: name of the method.

        Returns:
          The description; "" if the method reads what the network gives.
        """
        read = {kind for row in methods.entries(name) for kind in row.inputs}
        read |= {layer for _, layer, _ in layer_pairs(settings)}
        return words(
            self.about["half"], self.about["top"] if "logits" in read else None
        )

    def of(self, layers: tuple[str, ...]) -> adapters.Outputs:
        """Returns the outputs with these maps, float32."""
        maps = {name: _single(self.maps[name]) for name in layers}
        return self.outputs._replace(maps=maps)

    def size(self, layers: tuple[str, ...]) -> int:
        """Returns the bytes of the outputs with these maps, without reading them."""
        arrays = [*self.outputs[:2], *(self.maps[name] for name in layers)]
        return sum(4 * array.size for array in arrays)

    def shapes(self, count: int) -> methods.Shapes:
        """Returns the shapes of all of the network's outputs for a batch of images."""
        shape = lambda own: jax.ShapeDtypeStruct((count, *own), jnp.float32)
        return {
            "features": shape(self.outputs.features.shape[1:]),
            "logits": shape(self.outputs.logits.shape[1:]),
            "maps": {name: shape(own) for name, own in self.about["layers"].items()},
            "modules": (),
        }


def words(half: bool, top: int | None) -> str:
    """Describes how a file's outputs differ from those of the network."""
    found = [f"the {top} largest logits"] if top else []
    return " and ".join(found + ["float16 outputs"] * half)


# ---------------------------------------------------------------------------
# The arrays of a file.


def _largest(logits, top):
    order = np.argsort(-logits, axis=-1, kind="stable")
    best, others = order[..., :top], order[..., top:]
    return {
        "top": np.take_along_axis(logits, best, -1),
        "classes": best.astype(np.min_scalar_type(logits.shape[-1] - 1)),
        "rest": np.logaddexp.reduce(np.take_along_axis(logits, others, -1), axis=-1),
    }


def _halve(name, array):
    largest = np.abs(array).max(initial=0)
    if largest > np.finfo(np.float16).max:
        raise UserError(
            f"--half: the largest number of {name} is {largest:g}, more than float16 "
            "can hold; leave --half out"
        )
    return array.astype(np.float16)


def pack(
    outputs: adapters.Outputs, *, half: bool = False, top: int | None = None
) -> dict[str, np.ndarray]:
    """Makes the arrays of a file from a teacher's outputs.

    Args:
      outputs: logits ``[n, k]``, features ``[n, d]`` and maps.
      half: whether to store float16.
      top: number of the largest logits of each image that are stored, less than k; None
        stores all.

    Returns:
      The arrays, by their names in the file.

    Raises:
      UserError: a number is too large for float16.
    """
    logits, features = np.asarray(outputs.logits), np.asarray(outputs.features)
    maps = {MAP + name: np.asarray(array) for name, array in outputs.maps.items()}
    of_logits = {"logits": logits} if top is None else _largest(logits, top)
    found = {"features": features, **maps, **of_logits}
    if half:
        floating = lambda array: array.dtype.kind == "f"
        found = {k: _halve(k, a) if floating(a) else a for k, a in found.items()}
    return found


def _single(array):
    return np.asarray(array).astype(np.float32, copy=False)


def unpack(arrays: Mapping[str, np.ndarray], num_classes: int) -> adapters.Outputs:
    """Restores a teacher's outputs from the arrays of a file.

    Args:
      arrays: arrays that `pack` made, such as those of an open file of ``np.load``.
      num_classes: number of classes k.

    Returns:
      The outputs, float32. If the file has the K largest logits only, the others are
      equal, with the log-sum-exp that they had.
    """
    read = lambda name: _single(arrays[name])
    if "logits" in arrays:
        logits = read("logits")
    else:
        top, rest = read("top"), read("rest")
        rest = rest - np.log(np.float32(num_classes - top.shape[-1]))
        logits = np.repeat(rest[..., None], num_classes, axis=-1)
        np.put_along_axis(logits, np.asarray(arrays["classes"], np.int64), top, -1)
    maps = {n.removeprefix(MAP): read(n) for n in arrays if n.startswith(MAP)}
    outputs: Any = adapters.Outputs(logits, read("features"), maps)  # type: ignore
    return outputs


# ---------------------------------------------------------------------------
# Reading.


def _mapped(
    file: IO[bytes], archive: zipfile.ZipFile, entry: zipfile.ZipInfo
) -> np.ndarray:
    """Maps an array of a file of ``np.savez`` into memory; ``np.load`` would read it.

    Args:
      file: the open file.
      archive: the archive in it.
      entry: the entry of the array; it is read if it is compressed.

    Returns:
      The array.
    """
    with archive.open(entry) as member:
        if entry.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(member)
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{entry.filename} is of another version of the format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        header = member.tell()
    if header + math.prod(shape) * dtype.itemsize != entry.file_size or dtype.hasobject:
        raise ValueError(f"{entry.filename} holds something else than its numbers")
    file.seek(entry.header_offset + 26)  # of the lengths of name and extra field
    name, extra = struct.unpack("<HH", file.read(4))
    start = entry.header_offset + 30 + name + extra + header
    order = "F" if fortran else "C"
    return np.asarray(np.memmap(file, dtype, "r", start, shape, order))


def load(path: Path) -> dict[str, Any]:
    """Checks a whole file and maps its arrays into memory.

    Args:
      path: the file, which `statistics.write` wrote.

    Returns:
      Its ``arrays``, the JSON text ``about``, and its ``digest``.

    Raises:
      UserError: the file cannot be read, is damaged or something else.
    """
    with statistics.reading(OPTION, path, "kddm outputs"):
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            if name := archive.testzip():
                raise ValueError(f"{name} is damaged")
            arrays = {
                entry.filename.removesuffix(".npy"): _mapped(file, archive, entry)
                for entry in archive.infolist()
            }
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        about = str(arrays.pop("about"))
        return {"arrays": arrays, "about": about, "digest": digest}


def parse(path: Path, found: Mapping[str, Any]) -> StoredOutputs:
    """Restores the outputs of a file that `load` read; raises as it does."""
    with statistics.reading(OPTION, path, "kddm outputs"):
        about = json.loads(found["about"])
        if "kind" in about:
            raise UserError(
                f"{OPTION} {path} holds statistics; pass it as --teacher-statistics"
            )
        about = {name: about[name] for name in ABOUT}
        arrays = found["arrays"]
        maps = {n.removeprefix(MAP): a for n, a in arrays.items() if n.startswith(MAP)}
        others = {n: a for n, a in arrays.items() if not n.startswith(MAP)}
        outputs = unpack(others, len(about["classes"]))
    return StoredOutputs(outputs, maps, about, found["digest"])


def read(path: Path) -> StoredOutputs:
    """Reads a file of outputs; raises as `load` does."""
    return parse(path, load(path))


# ---------------------------------------------------------------------------
# Checks before training.


def check_method(
    settings, found: StoredOutputs, name: str, method, memory: float
) -> None:
    """Raises if a method needs more than the stored outputs, or too much memory.

    Args:
      settings: the settings of the command.
      found: the stored outputs.
      name: name of the method.
      method: the method; None for one that chooses among the teacher's layers.
      memory: memory of a device in bytes, of which outputs may take a quarter.

    Raises:
      UserError: the method needs the teacher's network, or a map that is not stored; or
        the outputs that it compares are too large.
    """
    file = f"{OPTION} {settings.networks.teacher_outputs}"
    if method is None:
        raise UserError(
            f"{name} with --layers {RELEASED} measures the layers of the teacher's "
            f"network, which is not in {file}; name the layers"
        )
    if arrays := methods.needed_arrays(name):
        raise UserError(
            f"{name} needs {' and '.join(arrays)}, computed by the teacher's network, "
            f"which is not in {file}; leave {name} out"
        )
    maps = found.maps
    if missing := sorted({*methods.teacher_layers(method)} - {*maps}):
        raise UserError(
            f"{name} compares the teacher's {', '.join(missing)}, but {file} has "
            f"{', '.join(maps) or 'no maps'}; make a file with --layers "
            f"STUDENT:{missing[0]}"
        )
    size = found.size(methods.teacher_layers(method))
    if size > memory / 4:
        raise UserError(
            f"{file}: the outputs that {name} compares take {size / 1e9:.1f} GB, a "
            f"quarter of the memory is {memory / 4e9:.1f} GB; make a file of fewer "
            "--views, or compare pooled features"
        )


def check_views(path: Path, views, found: StoredOutputs) -> None:
    """Raises if the outputs are not those on the views of this command.

    Args:
      path: the file, for messages.
      views: the views of the students' images; None if there are none.
      found: the stored outputs.

    Raises:
      UserError: there are no views; or the type of the computations, or the number,
        the augmentation, the images or the pixels of the views differ.
    """
    about, file = found.about, f"{OPTION} {path}"
    if views is None:
        raise UserError(
            f"{file} holds outputs on {about['views']} fixed views of each image; add "
            f"--views {about['views']}"
        )
    settings = views.settings
    same = "pass the same --train-images, --student-images and --unlabelled-images"
    if about["views"] != views.count:
        raise UserError(
            f"{file} has {about['views']} views of each image, this command says "
            f"--views {views.count}; pass --views {about['views']}"
        )
    # Options that a file of an earlier version lacks had the effect of their defaults.
    known = {**asdict(Augmentation()), **about["augmentation"], "dtype": about["dtype"]}
    asked = {**asdict(settings.augmentation), "dtype": settings.networks.dtype}
    for name, wanted in asked.items():
        if (made := known[name]) != wanted:
            raise UserError(
                f"{file} was made with {name}={made}, this command says {wanted}; pass "
                "the same, or make another file"
            )
    if about["images"] != len(views.indices):
        raise UserError(
            f"{file} has outputs on {about['images']} images, students see "
            f"{len(views.indices)}; {same}"
        )
    if about["source"] != views.source:
        raise UserError(f"{file} has outputs on other images than these; {same}")
    if about["drawn"] != views.drawn:
        raise UserError(
            f"{file} has outputs on other views of these images, as another version of "
            "JAX or another device may draw them; make the file as this command runs"
        )
