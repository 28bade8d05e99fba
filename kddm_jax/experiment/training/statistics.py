"""Writes and reads statistics of a teacher's features.

Statistics are all that a student needs of a teacher for distances between
distributions: whoever owns the teacher can give them away without the teacher and
without the images. A file contains one of these, computed from the teacher's features
of its training images, or of fixed views of them:

  gaussian   mean and covariance of each class
  diagonal   mean of each class, and variance of each feature
  means      mean of each class
  centroids  centroids of each class by k-means, with the share of each
  rows       features of some images of each class

All classes count alike in distances that do not take labels. With ``--normalization
unit``, features are scaled to length one before anything is computed.
"""

import contextlib
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.numerics.bank import Bank, gaussian_bank

KINDS = ("gaussian", "diagonal", "means", "centroids", "rows")
# What a file says about its statistics and the teacher.
ABOUT = ("kind", "count", "normalization", "dataset", "classes", "images", "views")
ABOUT += ("held_out", "teacher", "model", "width", "accuracy", "eval_images")
COUNTED = ("centroids", "rows")  # kinds that have a number for each class


@dataclass(frozen=True)
class Statistics:
    """Contains statistics of a teacher that were read from a file.

    Attributes:
      bank: rows that stand for the teacher's features, on the host.
      about: what the file says about the statistics and the teacher.
      digest: digest of the file.
    """

    bank: Bank
    about: dict[str, Any]
    digest: str

    @property
    def words(self) -> str:
        """Describes the statistics in a table."""
        return words(self.about["kind"], self.about["count"])


def words(kind: str, count: int | None) -> str:
    """Describes statistics of a kind, with ``count`` rows for each class."""
    return {
        "gaussian": "class covariances",
        "diagonal": "class variances",
        "means": "class means",
        "centroids": f"{count} centroids of each class",
        "rows": f"{count} images of each class",
    }[kind]


def write(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Writes a file of arrays, which replaces another one only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        content: Any = {"about": np.array(json.dumps(about)), **arrays}
        np.savez(file, **content)
    os.replace(partial, path)


# What NumPy and zipfile raise for damaged files, some for an unknown method or flag.
DAMAGE = (ValueError, KeyError, TypeError, EOFError, RuntimeError)
DAMAGE += (zipfile.BadZipFile, zlib.error)


@contextlib.contextmanager
def reading(option: str, path: Path, command: str) -> Iterator[None]:
    """Turns the errors of reading a file into a `UserError`.

    Args:
      option: the option that names the file.
      path: the file.
      command: the command that writes such files.
    """
    try:
        yield
    except OSError as error:
        what = error.strerror or "damaged"
        raise UserError(
            f"{option} {path}: {what}; pass a file that {command} wrote"
        ) from error
    except DAMAGE as error:
        raise UserError(
            f"{option} {path} is damaged or no file of {command}; write it again"
        ) from error


def _reading(path):
    return reading("--teacher-statistics", path, "kddm outputs --statistics")


def load(path: Path) -> bytes:
    """Reads the bytes of a file of statistics.

    Raises:
      UserError: the file cannot be read.
    """
    with _reading(path):
        return path.read_bytes()


def parse(path: Path, content: bytes) -> Statistics:
    """Reads statistics from the bytes of a file.

    Args:
      path: the file, for messages.
      content: what ``kddm outputs --statistics`` wrote.

    Returns:
      The statistics.

    Raises:
      UserError: the file is damaged or something else.
    """
    with _reading(path):
        with np.load(io.BytesIO(content)) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        if "drawn" in about:
            raise UserError(
                f"--teacher-statistics {path} holds outputs; pass it as "
                "--teacher-outputs"
            )
        bank = _bank(about["kind"], arrays)
        about = {name: about[name] for name in ABOUT}
    return Statistics(bank, about, hashlib.sha256(content).hexdigest()[:16])


def _bank(kind, arrays):
    if kind in COUNTED:
        bank = Bank(arrays["features"], arrays["labels"], arrays.get("weights"))
    elif kind == "means":
        labels: Any = np.arange(len(arrays["means"]), dtype=np.int32)
        bank = Bank(arrays["means"], labels)
    else:
        bank = gaussian_bank(arrays["means"], arrays["covariances"])
    return bank


def read(path: Path) -> Statistics:
    """Reads a file of statistics; raises as `load` and `parse` do."""
    return parse(path, load(path))
