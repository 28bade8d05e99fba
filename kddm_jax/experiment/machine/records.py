"""What a run leaves behind: JSON, and what its numbers were measured with."""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import jax

from kddm_jax.experiment.machine import processes
from kddm_jax.experiment.machine.errors import UserError


def _commit() -> str:
    """The checkout's commit, "unknown" without git."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def environment(devices) -> dict[str, object]:
    """What numbers are measured with."""
    cpu = f"CPU ({os.cpu_count()} cores)"
    script = f"experiments/{Path(sys.argv[0]).name}"
    return {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "commit": _commit(),
        "device": cpu if devices[0].platform == "cpu" else devices[0].device_kind,
        "device_count": len(devices),
        "process_count": processes.count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file whole or not at all."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w") as file:
            file.write(json.dumps(value, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:  # a full disk names no file
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_json(path: Path, cure: str = "run its command again") -> dict[str, object]:
    """Reads a JSON file that a command wrote.

    Args:
      path: of the file.
      cure: what the error says to do.

    Returns:
      Its content.

    Raises:
      UserError: it is not readable.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON; {cure}") from error
