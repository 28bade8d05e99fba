"""Saves, verifies and restores checkpoints, which are complete or absent.

A checkpoint is a folder ``step-00000123``.  It contains the arrays (in Orbax's format;
``empty.json`` lists arrays of size zero), ``meta.json``, and ``manifest.json`` with the
SHA-256 of every other file.  A checkpoint is written under another name and then
renamed, so that an interrupted save leaves nothing that looks like a checkpoint.  Older
checkpoints are then removed; they are renamed first for the same reason.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.extras import extra

Arrays = dict[str, Any]  # dicts nested by module; the leaves are NumPy arrays
Tree = TypeVar("Tree")  # any PyTree; the result has the same structure

_ARRAYS, _EMPTY, _META = "arrays", "empty.json", "meta.json"
_MANIFEST = "manifest.json"
_ASIDE = ".old.partial"  # of a checkpoint that a save replaces


class CheckpointError(Exception):
    """Reports a missing or damaged checkpoint, or one of another model, in one line."""


def _digest(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(folder):
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST)
    return {p.relative_to(folder).as_posix(): _digest(p) for p in sorted(files)}


def _steps(folder):
    """Lists the checkpoints of a folder, newest first."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.glob("step-*") if p.suffix != ".partial")
    return sorted(found, key=_order, reverse=True)


def _order(path):
    """Orders names by their number, which may have more than eight digits."""
    return len(path.name), path.name


def _set_aside(folder):
    """Lists the checkpoints that a killed save has moved aside."""
    found = folder.glob(f"step-*{_ASIDE}") if folder.is_dir() else ()
    return [path for path in found if not _restored(path).exists()]


def _restored(aside):
    """Returns the path that a checkpoint had before it was moved aside."""
    return aside.with_name(aside.name.removesuffix(_ASIDE))


def _named(tree: object) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Maps the names of keys, fields and positions to each leaf and its path."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        leaves[parts or ("value",)] = path, leaf
    return leaves


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _on_host(target: Path, name: tuple[str, ...], leaf: Any) -> np.ndarray:
    """Copies a leaf to the host; raises if it is not an array of numbers."""
    array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == bool):
        kind = f"array of {array.dtype}" if np.ndim(leaf) else type(leaf).__name__
        raise CheckpointError(
            f"cannot write checkpoint {target}: {'/'.join(name)} is no array of "
            f"numbers, but {kind}; keep text in meta, and the rest out of the tree (of "
            "an Equinox module save eqx.filter(module, eqx.is_array))"
        )
    return array


def save(
    folder: Path, step: int, tree: object, meta: Mapping[str, object], *, keep: int = 2
) -> Path:
    """Saves a tree of arrays and a JSON record atomically.

    The calling process saves on its own, without waiting for other processes.

    Args:
      folder: folder of a run's checkpoints; it is made if it does not exist.
      step: number in the checkpoint's name; an existing checkpoint of that step is
        replaced.
      tree: arrays and numbers in any PyTree: dictionaries, dataclasses, a `TrainState`,
        an NNX module or its state, the arrays of an Equinox module.
      meta: record that can be written as JSON.
      keep: number of checkpoints to keep, including this one.  Checkpoints of later
        steps do not count, because the run found them damaged when it resumed.

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: a leaf is not an array of numbers, ``meta`` cannot be written as
        JSON, or the files cannot be written.  Earlier checkpoints stay intact.
      ValueError: ``keep`` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    target = Path(folder).absolute() / f"step-{step:08d}"
    partial, aside = (target.with_suffix(s) for s in (".partial", _ASIDE))
    host = {name: _on_host(target, name, a) for name, (_, a) in _named(tree).items()}
    full = {name: array for name, array in host.items() if array.size}
    arrays = flax.traverse_util.unflatten_dict(full)
    empty = [
        {"name": name, "dtype": a.dtype.name, "shape": a.shape}
        for name, a in host.items()
        if not a.size
    ]
    try:
        record = json.dumps(dict(meta), indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"cannot write checkpoint {target}: meta: {error}; keep arrays in the tree"
        ) from error
    checkpointer = _checkpointer()
    try:
        for old in _set_aside(target.parent):
            old.rename(_restored(old))
        _remove_partial(target.parent)  # remains of killed saves
        partial.mkdir(parents=True)
        _check_space(partial, arrays)
        if arrays:
            with _silent("absl"):
                checkpointer.save(partial / _ARRAYS, arrays)
        if empty:  # Orbax cannot save them
            (partial / _EMPTY).write_text(json.dumps(empty))
        (partial / _META).write_text(record)
        (partial / _MANIFEST).write_text(json.dumps(_digests(partial), indent=1))
        _sync(partial)
        if target.exists():  # between the renames, no folder has the target's name
            target.rename(aside)
        partial.rename(target)
        _sync_folder(target.parent)
    except (OSError, ValueError) as error:  # Orbax raises ValueError for a full disk
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
        of_disk = isinstance(error, OSError) or "OS error" in str(error)
        cure = "free space or choose another folder"
        cure = cure if of_disk else "save arrays of the dtypes of JAX"
        raise CheckpointError(
            f"cannot write checkpoint {target}: {reason}; {cure}"
        ) from error
    earlier = [p for p in _steps(target.parent) if _order(p) <= _order(target)]
    for old in earlier[keep:]:
        with contextlib.suppress(OSError):  # a half-removed one would look damaged
            old.rename(old.with_suffix(".partial"))
    _remove_partial(target.parent)
    return target


def _remove_partial(folder):
    for path in folder.glob("step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpointer():
    """Makes an Orbax checkpointer that does not wait for other processes."""
    with extra("kddm_jax.checkpoint"):  # imported here: it takes 1.5 s
        import orbax.checkpoint as ocp

    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own,
        active_processes={own},
        barrier_sync_key_prefix=f"process-{own}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _check_space(folder, tree):
    """Checks the disk space, because Orbax logs a hundred lines if the disk is full."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{needed:,} bytes are needed, the disk has {free:,} left"
        )


@contextlib.contextmanager
def _silent(name):
    """Silences a logger, because Orbax logs a page for an error that it also raises."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _sync(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> None:
    """Checks a checkpoint's files against their checksums.

    Args:
      path: folder of the checkpoint.

    Raises:
      CheckpointError: a file is missing, added, truncated or altered.
    """
    path = Path(path)
    try:
        expected = dict(json.loads((path / _MANIFEST).read_text()))
        found = _digests(path)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path} has no readable {_MANIFEST}; delete the folder"
        ) from error
    wrong = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
    if wrong:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {wrong[0]} differs from its checksum; "
            "delete the folder to use an older one"
        )


def latest(folder: Path) -> Path | None:
    """Finds the newest undamaged checkpoint, and warns about damaged ones.

    Args:
      folder: folder of a run's checkpoints.

    Returns:
      Its path, or None if there are no checkpoints.

    Raises:
      CheckpointError: there are checkpoints, and all are damaged.
    """
    found = [*_steps(Path(folder)), *_set_aside(Path(folder))]
    candidates = sorted(found, key=lambda p: _order(_restored(p)), reverse=True)
    for path in candidates:
        try:
            verify(path)
        except CheckpointError as error:
            warnings.warn(f"{error}", stacklevel=2)
        else:
            return path
    if candidates:
        raise CheckpointError(
            f"all checkpoints in {folder} are damaged; delete that folder to start over"
        )
    return None


def find(path: Path) -> Path | None:
    """Finds the checkpoint at a path or in a folder.

    Args:
      path: a checkpoint, a folder of checkpoints, or a run's folder.

    Returns:
      The checkpoint itself, or the newest undamaged one in the folder; None if the
      folder has no checkpoint.

    Raises:
      CheckpointError: there are checkpoints in the folder, and all are damaged.
    """
    path = Path(path)
    if (path / _META).exists():
        return path
    return latest(path / "checkpoints") or latest(path)


def read_meta(path: Path) -> dict[str, object]:
    """Reads a checkpoint's JSON record.

    Args:
      path: folder of the checkpoint.

    Returns:
      The record that was passed to `save`.

    Raises:
      CheckpointError: there is no readable record.
    """
    try:
        return json.loads((Path(path) / _META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint: no readable {_META}; pass a folder "
            "step-... or the run's folder that holds them"
        ) from error


def restore_arrays(path: Path) -> tuple[Arrays, dict[str, object]]:
    """Reads a verified checkpoint as nested dictionaries of NumPy arrays.

    Args:
      path: folder of the checkpoint.

    Returns:
      The arrays and the record.

    Raises:
      CheckpointError: the checkpoint is missing or damaged.
    """
    meta = read_meta(path)
    verify(path)
    path, arrays = Path(path).absolute(), {}
    if (path / _ARRAYS).exists():
        arrays = _checkpointer().restore(path / _ARRAYS)
    if (path / _EMPTY).exists():
        flat: Any = flax.traverse_util.flatten_dict(arrays, keep_empty_nodes=True)
        for one in json.loads((path / _EMPTY).read_text()):
            flat[tuple(one["name"])] = np.zeros(one["shape"], jnp.dtype(one["dtype"]))
        arrays = flax.traverse_util.unflatten_dict(flat)
    return arrays, meta


def match(path: Path, arrays: Mapping[str, object], like: Tree) -> Tree:
    """Puts restored arrays into the structure of a tree and checks every shape.

    Args:
      path: folder of the checkpoint, for error messages.
      arrays: nested dictionaries from `restore_arrays`.
      like: a tree with the wanted structure and shapes.

    Returns:
      The tree with its arrays on the host and its `jax.random` keys on the device.

    Raises:
      CheckpointError: the structure or a shape differs.
    """
    wanted, found = _named(like), _named(arrays)
    for name in sorted(wanted.keys() ^ found.keys()):
        raise CheckpointError(
            f"checkpoint {path} is of another model: {'/'.join(name)} is "
            f"{'missing' if name in wanted else 'not expected'}; "
            "choose the model that it was made by"
        )
    leaves = []
    for name, (place, expected) in wanted.items():
        _, leaf = found[name]
        shape = np.shape(expected)
        if _is_key(expected):  # its numbers have one more axis
            shape = jax.eval_shape(jax.random.key_data, expected).shape
        if np.shape(leaf) != shape:
            raise CheckpointError(
                f"checkpoint {path} is of another model: "
                f"{jax.tree_util.keystr(place)} has shape {list(np.shape(leaf))}, "
                f"expected {list(shape)}; choose the model that it was made by"
            )
        if _is_key(expected):
            leaf = jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(expected))
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def restore(path: Path, like: Tree) -> tuple[Tree, dict[str, object]]:
    """Restores a verified checkpoint into the structure of a tree.

    Args:
      path: folder of the checkpoint.
      like: a tree with the same structure and shapes.

    Returns:
      The tree with its arrays on the host, and the record.

    Raises:
      CheckpointError: the checkpoint is missing or damaged, or its structure or a shape
        differs.
    """
    arrays, meta = restore_arrays(path)
    return match(path, arrays, like), meta
