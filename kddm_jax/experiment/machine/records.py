"""Reads and writes JSON files of runs, and describes machine and software."""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from kddm_jax.experiment.machine import processes
from kddm_jax.experiment.machine.errors import UserError


def _commit() -> str:
    """Returns the commit of a checkout, or the version of an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        try:
            return f"version {version('kddm-jax')}"
        except PackageNotFoundError:
            return "unknown"
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def _command() -> str:
    """Returns the command line of this process, without the folders of this machine."""
    script = Path(sys.argv[0])
    if script.suffix != ".py" or script.name == "__main__.py":
        return shlex.join(["kddm", *sys.argv[1:]])
    return shlex.join(["python", f"experiments/{script.name}", *sys.argv[1:]])


def environment(devices) -> dict[str, Any]:
    """Describes the machine and the software of a measurement."""
    cpu = f"CPU ({os.cpu_count()} cores)"
    return {
        "command": _command(),
        "commit": _commit(),
        "device": cpu if devices[0].platform == "cpu" else devices[0].device_kind,
        "device_count": len(devices),
        "process_count": processes.count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an `OSError`; that of a full disk lacks it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = path.with_suffix(".partial")
    with naming(path):
        try:
            with partial.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, fix: str = "run its command again") -> dict[str, Any]:
    """Reads a JSON file that a command wrote.

    Args:
      path: path of the file.
      fix: end of the error message, which says what to do.

    Returns:
      The content of the file.

    Raises:
      UserError: the file is not readable.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON; {fix}") from error


def distance_of(
    record: dict[str, Any], name: str, weights: Mapping[str, float] | None = None
) -> object | None:
    """Sums an epoch's unweighted distance over layers; None if there is no distance.

    Args:
      record: the metrics of an epoch.
      name: name of the run.
      weights: lambda of each distance, for a run whose method is a sum of several; they
        are added with these weights.

    Returns:
      The sum.
    """
    weights = weights or {name: 1.0}
    layers = [
        value * weights[key.split("@")[0]]
        for key, value in record.items()
        if "/" not in key and key.split("@")[0] in weights  # "/": diagnostics
    ]
    return sum(layers) if layers else None
