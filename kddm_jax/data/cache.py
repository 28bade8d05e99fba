"""Keeps decoded images on disk as ``.npy`` files, which are opened as memory maps.

A cache is a folder.  Its name is a digest of everything that decides its contents: the
names, sizes and times of the files read, and the options.  A changed file therefore
gives another cache.  A cache is written under another name and then renamed, so that a
killed process leaves nothing that looks like a cache.  If two processes build the same
cache, the first one is used.  Caches are in ``.kddm_jax`` in the data folder, or in
``~/.cache/kddm_jax/images`` if that folder is not writable.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kddm_jax.data.dataset import DataError, Dataset, Options, count_values, statistics

# Part of every key; increase it when decoding, resizing or these files change.
_FORMAT = 3
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_MANIFEST, _PARTIAL = "manifest.json", ".partial-"
_DAY = 86_400
# Inflating less than this takes no longer than opening a cache.
KEPT_FROM = 32 * 2**20


class Unwritable(DataError):
    """Reports that no folder for the cache is writable, or that the disk is full."""


class Key(NamedTuple):
    """Contains everything that decides the contents of a cache.

    Attributes:
      name: name of the data set.
      where: folder of the data set's files; not part of the digest, because a copy in
        another folder has the same contents.
      listing: digest of the files' names, sizes and times, from ``list_files``.
      image_size: the option of ``load``.
      skip_damaged: the option of ``load``.
    """

    name: str
    where: Path
    listing: str
    image_size: int | None = None
    skip_damaged: bool = False

    def contents(self) -> dict[str, object]:
        """Returns the fields as JSON values, without the folder of the files."""
        values = {**self._asdict(), "format": _FORMAT}
        del values["where"]
        return values

    def folder(self) -> str:
        """Returns the name of the cache's folder."""
        text = json.dumps(self.contents(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{self.name.replace('/', '-').replace(':', '-')}-{digest}"

    def roots(self) -> list[Path]:
        """Lists the folders that may contain the cache, in order."""
        home = Path("~/.cache/kddm_jax").expanduser()
        return [self.where / ".kddm_jax", home / "images"]


def list_files(files: Iterable[tuple[str, os.stat_result]]) -> str:
    """Computes a digest of the names, sizes and times of files, in their order."""
    digest = hashlib.sha256()
    for name, stat in files:
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class Writer:
    """Writes the images of both splits in pieces, without keeping them in memory."""

    def __init__(self, folder: Path):
        """Prepares to write into ``folder``."""
        self._folder, self._files = folder, {}
        self.restart()

    def restart(self) -> None:
        """Discards everything that was added."""
        self.close()
        self._files, self._shapes = {}, {}
        self._histogram = np.zeros((1, 256), np.int64)  # for any number of channels
        self._labels = {"train": [], "test": []}

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def add(self, split: str, images: np.ndarray, labels: np.ndarray) -> None:
        """Appends images ``[n, h, w, c]`` and labels ``[n]`` to "train" or "test"."""
        if split not in self._files:
            file = (self._folder / f"{split}_images.npy").open("wb")
            self._files[split], self._shapes[split] = file, (0, *images.shape[1:])
            self._write_header(split)
        count, *shape = self._shapes[split]
        assert images.shape[1:] == tuple(shape)
        self._files[split].write(np.ascontiguousarray(images).data)
        self._shapes[split] = (count + len(images), *shape)
        self._labels[split].append(labels.astype(np.int32))
        if split == "train":
            self._histogram = self._histogram + count_values(images)

    def is_constant(self) -> bool:
        """Returns whether every channel has one value in all training images."""
        return not any(statistics(self._histogram)[1])

    def _write_header(self, split):
        # NumPy pads headers, so that a larger number of images fits in place.
        header = {"descr": "|u1", "fortran_order": False, "shape": self._shapes[split]}
        self._files[split].seek(0)
        np.lib.format.write_array_header_1_0(self._files[split], header)

    def finish(self, key: Key, names: Sequence[str], left_out: Sequence[str]) -> None:
        """Completes the files and writes the manifest."""
        for split, file in self._files.items():
            self._write_header(split)
            _sync(file)
            with (self._folder / f"{split}_labels.npy").open("wb") as labels:
                np.save(labels, np.concatenate(self._labels[split]))
                _sync(labels)
        self.close()
        mean, std = statistics(self._histogram)
        manifest = {
            "key": key.contents(),
            "where": str(key.where.absolute()),
            "class_names": list(names),
            "mean": mean,
            "std": std,
            "left_out": list(left_out),
            "bytes": {
                file: (self._folder / file).stat().st_size
                for file in (f"{array}.npy" for array in _ARRAYS)
            },
        }
        with (self._folder / _MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            _sync(file)


def _sync(file):
    file.flush()
    os.fsync(file.fileno())


def _read_manifest(folder):
    """Reads the manifest; returns an empty one if there is none."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _whole(folder: Path, key: Key) -> dict[str, Any] | None:
    """Returns the manifest of a cache if the cache exists and is complete."""
    manifest = _read_manifest(folder)
    try:
        sizes = {f: (folder / f).stat().st_size for f in manifest.get("bytes", {})}
    except OSError:
        return None
    whole = manifest.get("key") == key.contents() and manifest["bytes"] == sizes
    return manifest if whole else None


def _open(folder: Path, key: Key, in_memory: bool) -> Dataset | None:
    """Opens the cache of a folder if it exists and is complete."""
    manifest = _whole(folder, key)
    if manifest is None:
        return None
    mode = None if in_memory else "r"
    try:
        labels = [np.load(folder / f"{s}_labels.npy") for s in ("train", "test")]
        images = [np.load(folder / f"{s}_images.npy", mode) for s in ("train", "test")]
    except (OSError, ValueError):
        return None
    if manifest["left_out"]:
        _warn_of_left_out(manifest["left_out"])
    return Dataset(
        *(images[0], labels[0], images[1], labels[1]),
        class_names=tuple(manifest["class_names"]),
        mean=tuple(manifest["mean"]),
        std=tuple(manifest["std"]),
    )


def _warn_of_left_out(names, shown=20):
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    warnings.warn(
        f"left out {len(names)} damaged or unreadable file(s): "
        f"{', '.join(names[:shown])}{more}",
        stacklevel=2,
    )


def _make_partial(key):
    """Makes a new folder in the first root that is writable."""
    refusals = []
    for root in key.roots():
        partial = root / f"{_PARTIAL}{uuid.uuid4().hex}"
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            refusals.append(f"{root} ({error.strerror})")
        else:
            return partial
    raise Unwritable(
        f"cannot write the decoded images of {key.name}: {', '.join(refusals)}; "
        "make one of these folders writable"
    )


def _publish(partial, target, key):
    """Renames a finished cache unless another process has already made the same."""
    for attempt in range(5):
        if _whole(target, key):
            return
        try:
            partial.rename(target)
            return
        except OSError:
            if attempt == 4:
                raise
        # A damaged cache has this name, so rename it away in one operation.
        aside = target.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            target.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _last_written(folder):
    """Returns the newest time of a folder's files, or of the folder if it is empty."""
    files = list(folder.glob("*")) or [folder]
    return max(file.stat().st_mtime for file in files)


def _remove_stale(root, key):
    """Removes outdated caches of the same folder, and remains of killed builds."""
    now, current = time.time(), key.contents()
    for folder in root.iterdir():
        if folder.name.startswith(_PARTIAL):
            # The process that made it may remove it at the same time.
            with contextlib.suppress(FileNotFoundError):
                if _last_written(folder) < now - _DAY:
                    shutil.rmtree(folder, ignore_errors=True)
            continue
        manifest = _read_manifest(folder)
        found = manifest.get("key") or {}
        changed = {name for name in current if found.get(name) != current[name]}
        same_place = manifest.get("where") == str(key.where.absolute())
        if changed and changed <= {"listing", "format"} and same_place:
            shutil.rmtree(folder, ignore_errors=True)


def _build(key, build):
    partial = _make_partial(key)
    writer = Writer(partial)
    try:
        writer.finish(key, *build(writer))
        _publish(partial, partial.with_name(key.folder()), key)
        _remove_stale(partial.parent, key)
    except OSError as error:
        raise Unwritable(
            f"cannot write {partial.parent}: {error.strerror or error}; free space "
            "there"
        ) from error
    finally:
        writer.close()
        shutil.rmtree(partial, ignore_errors=True)


def cached(
    key: Key,
    build: Callable[[Writer], tuple[Sequence[str], Sequence[str]]],
    *,
    in_memory: bool = False,
) -> Dataset:
    """Opens a cache, building it first if there is none.

    Args:
      key: key of the cache.
      build: function that adds all images to a ``Writer`` and returns the class names
        and the names of the images left out.
      in_memory: whether to read the images into memory instead of mapping them.

    Returns:
      The data set.

    Raises:
      Unwritable: no folder for the cache is writable, or the disk is full.
      DataError: from ``build``.
    """
    for attempt in range(3):
        for root in key.roots():
            found = _open(root / key.folder(), key, in_memory)
            if found is not None:
                return found
        if attempt < 2:  # another process may have removed the cache in the meantime
            _build(key, build)
    raise Unwritable(
        f"the cache of {key.where} was removed while it was opened; are the files "
        "being changed?"
    )


def keep(name: str, files: Sequence[Path], read: Callable[[], Dataset]) -> Dataset:
    """Reads official files, or the cache of files that take long to inflate.

    Args:
      name: name of the data set.
      files: the files that ``read`` reads.
      read: function that reads them.

    Returns:
      The data set, in memory.
    """
    stats = [(path.name, path.stat()) for path in files]
    if sum(stat.st_size for _, stat in stats) < KEPT_FROM:
        return read()

    def build(writer: Writer):
        dataset = read()
        writer.add("train", dataset.train_images, dataset.train_labels)
        writer.add("test", dataset.test_images, dataset.test_labels)
        return dataset.class_names, ()

    key = Key(name, files[0].parent, list_files(stats))
    try:
        return cached(key, build, in_memory=True)
    except Unwritable:  # reading again is slower, but gives the same images
        return read()


def key_of(name: str, where: Path, listing: str, options: Options) -> Key:
    """Makes the key of images that are decoded with options."""
    return Key(name, where, listing, options.image_size, options.skip_damaged)
