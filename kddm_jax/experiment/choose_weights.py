"""Chooses lambda for each distance on held-out training images, never on the test set.

    python experiments/choose_weights.py --grid 1e-4 1e-3 1e-2 -- \
        --dataset digits --held-out 300

What follows ``--`` are settings of cifar.py.  Prints the held-out accuracy of every
lambda (0: the loss did not stay finite) and the ``--weights`` line for cifar.py;
writes ``weights.json``.  All lambdas of a distance share one compiled program (but
those of distances between layers).
"""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path

from flax import linen as nn
from rich.table import Table

from kddm_jax.experiment import distill as cifar
from kddm_jax.experiment.machine import processes, records
from kddm_jax.experiment.machine.errors import RunError, UserError
from kddm_jax.experiment.settings import as_json, check, parse
from kddm_jax.experiment.training import outputs as layers
from kddm_jax.experiment.training import problems, runs
from kddm_jax.experiment.training import train as training
from kddm_jax.experiment.training.teacher import (
    Teacher,
    find_teacher,
    known_digest,
    load_teacher,
)

GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DIVERGED = "diverged.json"


def train(
    problem: problems.Problem,
    run: runs.Run,
    model: nn.Module,
    teacher: Teacher,
    reporter: cifar.Reporter,
) -> float:
    """Trains one student of the grid; if it diverges, its accuracy is 0.

    Divergence is recorded in ``diverged.json``.  A recorded run is not trained again,
    unless it stopped under ``--on-nonfinite stop`` and the command now says ``skip``.

    Args:
      problem: data, devices, settings.
      run: one of `runs.grid_runs`.
      model: the network.
      teacher: the trained teacher.
      reporter: shows progress.

    Returns:
      Its accuracy on held-out images in percent, 0 if it diverged.

    Raises:
      UserError, Terminated, CheckpointError: as `training.train`.
    """
    how = problem.settings.on_nonfinite
    path = run.folder(problem.out) / DIVERGED
    say = reporter.progress.console.print

    def earlier():
        runs.check_folder(run, problem.out)
        if (path.parent / "result.json").exists() or not path.exists():
            return None
        found = records.read_json(path, f"delete it, and {path.parent} is tried again")
        return None if (found["on_nonfinite"], how) == ("stop", "skip") else found

    found = processes.first(earlier)
    if found is None:
        try:
            result = training.train(problem, run, model, teacher, reporter)
        except RunError as error:  # a lambda may be far too large
            why = str(error).partition("; ")[0].partition(": ")[2]
            found = {"error": why, "on_nonfinite": how}
            processes.first(lambda: records.write_json(path, found))
        else:
            say(f"{run.label}: {result['accuracy']:.2f} % of held-out images")
            return result["accuracy"]
    again = f"delete {path} to try it again"
    say(f"{run.label}: {found['error']}; counts as 0 %; {again}")
    return 0.0


def choose(settings, grid, console) -> dict[str, object]:
    """Trains a student per distance, lambda and seed; averages over seeds.

    A seed that diverges counts as zero.

    Args:
      settings: of cifar.py, with held-out images.
      grid: of lambdas.
      console: to print on.

    Returns:
      What ``weights.json`` says: settings, accuracy by distance and lambda, the best.

    Raises:
      UserError: there are no held-out images, or as cifar.py.
    """
    if not settings.held_out:
        raise UserError("--held-out is 0; keep some training images, such as 300")
    named = {f"{weight:g}": weight for weight in grid}  # so their folders
    if len(named) < len(grid):
        lost = ", ".join(str(w) for w in grid if w not in named.values())
        raise UserError(f"--grid: {lost} and another are one number to six digits")
    for weight in grid:
        check(dataclasses.replace(settings, weights=None, weight=weight))
    settings = dataclasses.replace(settings, weights=None)
    out = settings.out or Path("runs") / f"{settings.dataset}-{settings.recipe}-weights"
    problem = cifar.prepare(settings, out)
    source = find_teacher(problem)
    runs.check_distances(problem, source.model)
    for who, weights in problem.starts.items():
        console.print(f"{who} starts from {weights}")
    reporter = cifar.Reporter(console, settings.progress and console.is_terminal)
    planned = [] if source.given else [runs.teacher_run(problem)]
    for of_all in runs.grid_runs(problem, known_digest(source), grid).values():
        planned += of_all

    with contextlib.ExitStack() as stack, reporter.progress:
        processes.first(lambda: cifar.open_folder(out, planned, stack))
        teacher = load_teacher(source, reporter)
        layers.prepare(problem, teacher, reporter.progress.console)
        model = problem.model(settings.student_model, settings.width)
        accuracy: dict[str, dict[str, float]] = {n: {} for n in settings.distances}
        for name, of_all in runs.grid_runs(problem, teacher.digest, grid).items():
            for run in of_all:
                row, key = accuracy[name], f"{run.weight:g}"
                reached = train(problem, run, model, teacher, reporter)
                row[key] = row.get(key, 0.0) + reached / len(settings.seeds)
    best = {
        name: float(max(row, key=row.get))
        for name, row in accuracy.items()
        if max(row.values()) > 0  # else every lambda was too large
    }
    chosen = {
        "settings": as_json(settings),
        "held_out_accuracy": accuracy,
        "teacher": teacher.accuracy,
        "weights": best,
        "environment": records.environment(problem.devices),
    }
    processes.first(lambda: records.write_json(out / "weights.json", chosen))
    return chosen


def show(chosen, grid, console) -> None:
    """Prints the grid, and the line for cifar.py."""
    view = Table("held-out accuracy, %", *(f"λ = {weight:g}" for weight in grid))
    for name, row in chosen["held_out_accuracy"].items():
        view.add_row(name, *(f"{row[f'{weight:g}']:.1f}" for weight in grid))
    console.print(view)
    pairs = " ".join(f"{name} {weight:g}" for name, weight in chosen["weights"].items())
    console.print(f"--weights {pairs}", soft_wrap=True)


def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    first = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="choose_weights.py"
    )
    first.add_argument("--grid", type=float, nargs="+", default=GRID)
    first.add_argument("settings", nargs="*", help="settings of cifar.py, after --")
    chosen = first.parse_args(arguments)

    def work():
        settings = parse(chosen.settings)
        processes.start(settings)
        console = cifar.console()
        grid = tuple(dict.fromkeys(chosen.grid))
        show(choose(settings, grid, console), grid, console)

    return cifar.answer_errors(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
