"""Implements ``kddm choose-weights``, which chooses lambdas on held-out images.

    kddm choose-weights --grid 1e-4 1e-3 1e-2 -- --dataset digits --held-out 300

Settings of ``kddm distill`` follow after ``--``. The command prints the held-out
accuracy for every lambda (0 if the loss did not stay finite) and the ``--weights`` line
for ``kddm distill``, and writes ``weights.json``. The test set is never used. All
lambdas of a distance share one compiled program, except for distances between layers.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kddm_jax.experiment import study
from kddm_jax.experiment.checks import check
from kddm_jax.experiment.machine import processes, records
from kddm_jax.experiment.machine.errors import RunError, UserError
from kddm_jax.experiment.machine.terminal import answer_errors, console
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.settings import Settings, as_json, change
from kddm_jax.experiment.training import runs

GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DIVERGED = "diverged.json"
ABOUT = "Chooses lambda for each distance on held-out training images."


def train(opened: study.Study, run: runs.Run) -> float:
    """Trains one student of the grid; if it diverges, its accuracy is 0.

    Divergence is recorded in ``diverged.json``.  A recorded run is not trained again,
    unless it stopped under ``--on-nonfinite stop`` and the option is now ``skip``.

    Args:
      opened: the study.
      run: one of the study's runs.

    Returns:
      The student's accuracy on held-out images in percent, 0 if it diverged.

    Raises:
      UserError, Terminated, CheckpointError: as in `train.train`.
    """
    problem = opened.problem
    how = problem.settings.run.on_nonfinite
    path = run.folder(problem.out) / DIVERGED

    def earlier():
        runs.check_folder(run, problem.out)
        if (path.parent / "result.json").exists() or not path.exists():
            return None
        found = records.read_json(path, f"delete it, and {path.parent} is tried again")
        return None if (found["on_nonfinite"], how) == ("stop", "skip") else found

    found = processes.first(earlier)
    if found is None:
        try:
            result = opened.train(run)
        except RunError as error:  # a lambda may be far too large
            why = str(error).partition("; ")[0].partition(": ")[2]
            found = {"error": why, "on_nonfinite": how}
            processes.first(lambda: records.write_json(path, found))
        else:
            opened.say(f"{run.label}: {result['accuracy']:.2f} % of held-out images")
            return result["accuracy"]
    again = f"delete {path} to try it again"
    opened.say(f"{run.label}: {found['error']}; counts as 0 %; {again}")
    return 0.0


def choose(
    settings: Settings, grid: Sequence[float], console: Console
) -> dict[str, Any]:
    """Trains a student for each distance, lambda and seed, and averages over seeds.

    The accuracy of a seed that diverges counts as zero.

    Args:
      settings: settings of ``kddm distill``, with held-out images.
      grid: the lambdas to try.
      console: console that prints the lines.

    Returns:
      The content of ``weights.json``: settings, accuracy by distance and lambda, and
      the best lambda of each distance.

    Raises:
      UserError: there are no held-out images; or as in `study.open`.
    """
    if not settings.data.held_out:
        raise UserError("--held-out is 0; keep some training images, such as 300")
    named = {f"{weight:g}": weight for weight in grid}  # as in the folders' names
    if len(named) < len(grid):
        lost = ", ".join(str(w) for w in grid if w not in named.values())
        raise UserError(f"--grid: {lost} and another are one number to six digits")
    for weight in grid:
        check(change(settings, weights=None, weight=weight))
    settings = change(settings, weights=None)
    plan = lambda problem, digest: runs.grid_runs(problem, digest, grid)
    accuracy: dict[str, dict[str, float]] = {n: {} for n in settings.method.distances}
    with study.open(settings, console, suffix="-weights", plan=plan) as opened:
        for run in opened.runs:
            row, key = accuracy[run.name], f"{run.weight:g}"
            row[key] = row.get(key, 0.0) + train(opened, run) / len(settings.run.seeds)
        chosen = _chosen(opened, accuracy)
        path = opened.problem.out / "weights.json"
        processes.first(lambda: records.write_json(path, chosen))
    return chosen


def _chosen(opened, accuracy):
    best = {
        name: float(max(row, key=row.get))
        for name, row in accuracy.items()
        if max(row.values()) > 0  # else every lambda was too large
    }
    return {
        "settings": as_json(opened.problem.settings),
        "held_out_accuracy": accuracy,
        "teacher": opened.teacher.accuracy,
        "weights": best,
        "environment": records.environment(opened.problem.devices),
    }


def show(chosen, grid, console) -> None:
    """Prints the grid and the ``--weights`` line for ``kddm distill``."""
    view = Table("held-out accuracy, %", *(f"λ = {weight:g}" for weight in grid))
    for name, row in chosen["held_out_accuracy"].items():
        view.add_row(name, *(f"{row[f'{weight:g}']:.1f}" for weight in grid))
    console.print(view)
    pairs = " ".join(f"{name} {weight:g}" for name, weight in chosen["weights"].items())
    console.print(f"--weights {pairs}", soft_wrap=True)


def main(arguments: list[str], prog: str = "kddm choose-weights") -> int:
    """Runs the command and returns its exit status."""
    first = argparse.ArgumentParser(description=ABOUT, prog=prog)
    first.add_argument(
        "--grid", type=float, nargs="+", default=GRID, help="lambdas to try"
    )
    first.add_argument("settings", nargs="*", help="settings of kddm distill, after --")
    chosen = first.parse_args(arguments)

    def work():
        settings = parse(chosen.settings, prog)
        run = settings.run
        processes.start(run.coordinator, run.processes, run.process)
        grid = tuple(dict.fromkeys(chosen.grid))
        terminal = console()
        show(choose(settings, grid, terminal), grid, terminal)

    return answer_errors(work)
