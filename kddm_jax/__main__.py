"""The command ``kddm``: distillation from the command line.

Each subcommand imports what it needs when it is called, so that ``kddm --help`` is fast
and the environment below is set before the first import of NumPy and JAX.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from kddm_jax.extras import INSTALL

# OpenBLAS's own threads turn a 1 ms SVD into 800 ms when another job keeps a core busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class Command(NamedTuple):
    """A subcommand.

    Attributes:
      module: the module of its ``main``.
      about: one line for ``--help``.
    """

    module: str
    about: str


COMMANDS = {
    "distill": Command(
        "kddm_jax.experiment.distill",
        "train a teacher, students alone and distilled students, and print the table",
    ),
    "choose-weights": Command(
        "kddm_jax.experiment.choose_weights",
        "tune the student alone and the weight of each distance on held-out images",
    ),
    "outputs": Command(
        "kddm_jax.experiment.outputs",
        "store outputs or statistics of a teacher, to train students without it",
    ),
    "report": Command(
        "kddm_jax.experiment.render",
        "render a finished study again, or print one table of several",
    ),
    "export": Command(
        "kddm_jax.experiment.export",
        "write a trained ResNet9, 18 or 34 as safetensors with torchvision's names",
    ),
    "convert": Command(
        "kddm_jax.networks.weights",
        "convert ResNet weights between torchvision's names and ours",
    ),
    "prepare": Command(
        "kddm_jax.data.loading",
        "download a data set of TFDS and prepare it for reading without TensorFlow",
    ),
}
# One module of each package that the extra brings and the commands import.
EXTRA = ("orbax.checkpoint", "grain", "tyro", "rich", "sklearn", "PIL", "matplotlib")


def _help() -> str:
    rows = (f"  {name:<15}{command.about}" for name, command in COMMANDS.items())
    return "\n".join(
        [
            "usage: kddm COMMAND ...",
            "",
            "Distils neural networks by matching the distributions of their features.",
            "",
            *rows,
            "",
            "kddm COMMAND --help explains the options of a command.",
        ]
    )


def _missing() -> list[str]:
    """Returns the packages of the extra that are not installed."""
    missing = []
    for name in EXTRA:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # not even the package around it
            found = False
        missing += [] if found else [name.partition(".")[0]]
    return missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if missing := _missing():
        print(
            f"error: kddm needs {', '.join(missing)}; install the extra: {INSTALL}",
            file=sys.stderr,
        )
        return 2
    if name in ("", "-h", "--help"):
        print(_help())
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: unknown command {name!r}; known: {known}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name].module).main(rest[:-1])


if __name__ == "__main__":
    sys.exit(main())
