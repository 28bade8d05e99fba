"""Implements ``kddm export``, which writes a trained network as safetensors.

    kddm export runs/digits-laptop/l2/seed0 --to student.safetensors

The tensors have the names of torchvision's ResNets. `kddm_jax.networks.weights`, the
command ``kddm convert``, writes other files, too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kddm_jax import checkpoint
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.machine.terminal import answer_errors
from kddm_jax.experiment.settings import MODELS
from kddm_jax.networks import weights
from kddm_jax.networks.torchvision import NAMED, Architecture, WeightsError

SUFFIX = ".safetensors"


def export(run: Path, target: Path, *, overwrite: bool = False) -> Architecture:
    """Writes the network of a run's newest checkpoint under torchvision's names.

    The file's metadata has the mean and standard deviation of the run's data set.

    Args:
      run: folder of a teacher's or a student's run; projectors are left out.
      target: a ``.safetensors`` file.
      overwrite: whether an existing file may be replaced.

    Returns:
      The description of the network.

    Raises:
      UserError: there is no checkpoint, the network has no such names, or the file
        exists, has another suffix or cannot be written.
      CheckpointError: the checkpoint is damaged.
    """
    if target.suffix != SUFFIX:
        raise UserError(
            f"--to {target} does not end in {SUFFIX}; rename it, or write another kind "
            "of file by kddm convert"
        )
    found = checkpoint.find(run)
    if found is None:
        raise UserError(
            f"no checkpoint in {run}; pass a run's folder, such as "
            "runs/digits-laptop/l2/seed0"
        )
    made: Any = checkpoint.read_meta(found).get("run", {})
    name = made.get("teacher_model") or made.get("student_model")
    if name in {*MODELS} - {*NAMED.values()}:
        raise UserError(
            f"{run} is a {name}, and only {', '.join(NAMED.values())} have "
            "torchvision's names; read its arrays by "
            "kddm_jax.checkpoint.restore_arrays"
        )
    try:
        return weights.convert(found, target, overwrite=overwrite)
    except WeightsError as error:
        raise UserError(str(error)) from error


def _unfinished(run):
    """Returns ", after 3 of 100 epochs", or "" if the newest checkpoint is the last."""
    found = checkpoint.find(run)
    meta: Any = checkpoint.read_meta(found) if found else {}
    made, done = meta.get("run", {}), len(meta.get("history", ()))
    epochs = made.get("teacher_epochs") or made.get("epochs")
    return "" if epochs in (None, done) else f", after {done} of {epochs} epochs"


def main(arguments: Sequence[str], prog: str = "kddm export") -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Writes a trained ResNet9, 18 or 34 as safetensors with "
        "torchvision's names.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help=f"{SUFFIX} file to write"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE")
    given = parser.parse_args(arguments)

    def work():
        found = export(given.run, given.to, overwrite=given.force)
        print(f"{given.run} -> {given.to}: {found}{_unfinished(given.run)}")

    return answer_errors(work)
