"""Saves, verifies and restores checkpoints, which are complete or absent.

A checkpoint is a folder ``step-00000123`` with the arrays (Orbax), ``meta.json``, and
``manifest.json`` with the SHA-256 of every other file.  It is written under another
name and renamed last, so that a killed save leaves nothing that looks like a
checkpoint.  Older checkpoints are removed after that; they, too, are renamed first.
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

import flax.serialization
import flax.traverse_util
import jax
import numpy as np

from kddm_jax.extras import extra

Arrays = dict[str, Any]  # nested by module, NumPy arrays at the end
Tree = TypeVar("Tree")  # any PyTree, the same out as in

_ARRAYS, _META, _MANIFEST = "arrays", "meta.json", "manifest.json"


class CheckpointError(Exception):
    """Raised if a checkpoint is missing, damaged, or of another model, in one line."""


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
    return sorted(
        (p for p in folder.glob("step-*") if p.suffix != ".partial"), reverse=True
    )


def save(
    folder: Path, step: int, tree: object, meta: Mapping[str, object], *, keep: int = 2
) -> Path:
    """Saves a tree of arrays and a JSON record, atomically.

    The calling process saves and waits for no other process.

    Args:
      folder: folder of a run's checkpoints; made if absent.
      step: number in the checkpoint's name; an existing one of that step is replaced.
      tree: arrays of any PyTree that ``flax.serialization`` knows.
      meta: record that JSON can hold.
      keep: number of checkpoints to keep, including this one.  Checkpoints of later
        steps do not count: a run that resumed before them found them damaged.

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: the files cannot be written; earlier checkpoints are intact.
      ValueError: ``keep < 1``.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    target = Path(folder).absolute() / f"step-{step:08d}"
    partial, aside = (target.with_suffix(f".{s}") for s in ("partial", "old.partial"))
    host = jax.tree.map(np.asarray, flax.serialization.to_state_dict(tree))
    checkpointer = _checkpointer()
    try:
        _remove_partial(target.parent)  # remains of killed saves
        partial.mkdir(parents=True)
        _check_space(partial, host)
        with _silent("absl"):
            checkpointer.save(partial / _ARRAYS, host)
        (partial / _META).write_text(json.dumps(dict(meta), indent=1))
        (partial / _MANIFEST).write_text(json.dumps(_digests(partial), indent=1))
        _sync(partial)
        if target.exists():  # none has the name between the two renames
            target.rename(aside)
        partial.rename(target)
        _sync_folder(target.parent)
    except (OSError, ValueError) as error:  # a full disk is Orbax's ValueError
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
        raise CheckpointError(
            f"cannot write checkpoint {target}: {reason}; "
            "free space or choose another folder"
        ) from error
    for old in [path for path in _steps(target.parent) if path <= target][keep:]:
        with contextlib.suppress(OSError):  # half removed, it would look damaged
            old.rename(old.with_suffix(".partial"))
    _remove_partial(target.parent)
    return target


def _remove_partial(folder):
    for path in folder.glob("step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpointer():
    """Makes Orbax's checkpointer for this process alone, which waits for no other."""
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
    """Checks the space on disk; Orbax's threads log a hundred lines if it is full."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{needed:,} bytes are needed, the disk has {free:,} left"
        )


@contextlib.contextmanager
def _silent(name):
    """Silences a logger: Orbax logs a page for an error that it then raises."""
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
    """Finds the newest undamaged checkpoint; warns of damaged ones.

    Args:
      folder: folder of a run's checkpoints.

    Returns:
      Its path, or None if there are no checkpoints.

    Raises:
      CheckpointError: there are checkpoints, and all are damaged.
    """
    candidates = _steps(Path(folder))
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
    """Finds the checkpoint that a path stands for.

    Args:
      path: a checkpoint, a folder of checkpoints, or a run's folder.

    Returns:
      The checkpoint itself, or the newest undamaged one of the folder; None if the
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
      The record that was given to `save`.

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
    arrays = _checkpointer().restore(Path(path).absolute() / _ARRAYS)
    return arrays, meta


def match(path: Path, arrays: Mapping[str, object], like: Tree) -> Tree:
    """Gives restored arrays the structure of a tree, checking every shape.

    Args:
      path: folder of the checkpoint, for messages.
      arrays: nested dictionaries, from `restore_arrays`.
      like: a tree of the wanted structure and shapes.

    Returns:
      The tree, its arrays on the host.

    Raises:
      CheckpointError: the structure or a shape differs.
    """
    names = lambda tree: set(flax.traverse_util.flatten_dict(tree, sep="/"))
    wanted, found = names(flax.serialization.to_state_dict(like)), names(arrays)
    for name in sorted(wanted ^ found):
        raise CheckpointError(
            f"checkpoint {path} is of another model: {name} is "
            f"{'missing' if name in wanted else 'not expected'}; "
            "choose the model that it was made by"
        )
    try:
        tree: Any = flax.serialization.from_state_dict(like, dict(arrays))
        differing = [
            f"{jax.tree_util.keystr(key)} has shape {list(np.shape(a))}, "
            f"expected {list(np.shape(b))}"
            for (key, a), b in zip(
                jax.tree_util.tree_leaves_with_path(tree),
                jax.tree.leaves(like),
                strict=True,
            )
            if np.shape(a) != np.shape(b)
        ]
    except (ValueError, KeyError, TypeError) as error:
        tree, differing = like, [" ".join(str(error).split())[:200]]
    if differing:
        raise CheckpointError(
            f"checkpoint {path} is of another model: {differing[0]}; "
            "choose the model that it was made by"
        )
    return tree


def restore(path: Path, like: Tree) -> tuple[Tree, dict[str, object]]:
    """Restores a verified checkpoint into the structure of a tree.

    Args:
      path: folder of the checkpoint.
      like: a tree of the same structure and shapes.

    Returns:
      The tree, its arrays on the host, and the record.

    Raises:
      CheckpointError: the checkpoint is missing or damaged, or its structure or a shape
        differs.
    """
    arrays, meta = restore_arrays(path)
    return match(path, arrays, like), meta
