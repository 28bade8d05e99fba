"""Chooses lambda for each distance on held-out training images, never on the test set.

    python experiments/choose_weights.py --grid 1e-4 1e-3 1e-2 -- \
        --dataset digits --held-out 300

What follows ``--`` are settings of cifar.py.  Prints the held-out accuracy of every
lambda (0: the loss did not stay finite) and the ``--weights`` line for cifar.py;
writes ``weights.json``.  All lambdas of a distance share one compiled program, and with
``--together`` each batch and the teacher's forward pass.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import cifar  # sets the environment before JAX is imported
import layers
import processes
import records
import runs
from progress import RunError
from rich.table import Table
from settings import UserError, as_json, check, parse
from teacher import find_teacher, load_teacher

GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DIVERGED = "diverged.json"


def train_group(problem, group, model, teacher, reporter) -> list[dict | None]:
    """Trains a group of runs; None for those whose loss did not stay finite.

    These leave a file that says so, and are not tried again.  Of several that train
    together the others begin anew without them.
    """

    def reason(run):
        runs.check_folder(run, problem.out)
        path = run.folder(problem.out) / DIVERGED
        cure = f"delete it, and {path.parent} is tried again"
        return records.read_json(path, cure)["error"] if path.exists() else None

    def mark(run, error):
        runs.forget(problem, group)
        folder = run.folder(problem.out)
        records.write_json(folder / DIVERGED, {"error": str(error)})

    say = reporter.progress.console.print
    lost = processes.first(lambda: [reason(run) for run in group])
    while left := [run for run, why in zip(group, lost, strict=True) if why is None]:
        try:
            found = runs.train_together(problem, left, model, teacher, reporter)
        except RunError as error:  # a lambda may be far too large
            run = left[error.which]
            processes.first(lambda run=run, error=error: mark(run, error))
            lost[group.index(run)] = str(error)
        else:
            break
    done = dict(zip(left, found if left else (), strict=True))
    for run, why in zip(group, lost, strict=True):
        reached = why or f"{done[run]['accuracy']:.2f} % of held-out images"
        say(reached if why else f"{run.label}: {reached}")
    return [done.get(run) for run in group]


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
    with reporter.progress:
        teacher = load_teacher(source, reporter)
        layers.prepare(problem, teacher, reporter.progress.console)
        model = problem.model(settings.student_model, settings.width)
        accuracy: dict[str, dict[str, float]] = {n: {} for n in settings.distances}
        for group in runs.grid_groups(problem, teacher.digest, grid):
            results = train_group(problem, group, model, teacher, reporter)
            for run, result in zip(group, results, strict=True):
                row, key = accuracy[run.name], f"{run.weight:g}"
                reached = result["accuracy"] if result else 0.0
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
