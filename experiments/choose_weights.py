"""Chooses lambda for each distance on held-out training images, never on the test set.

    python experiments/choose_weights.py --grid 1e-4 1e-3 1e-2 -- \
        --dataset digits --held-out 300

What follows ``--`` are settings of cifar.py.  Prints the held-out accuracy of every
lambda (0: the loss did not stay finite) and the ``--weights`` line for cifar.py;
writes ``weights.json``.  All lambdas of a distance share one compiled program (but
those of distances between layers), and with ``--together`` each batch and the teacher's
forward pass.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import cifar  # sets the environment before JAX is imported
import layers
import problems
import processes
import records
import runs
import training
from flax import linen as nn
from progress import RunError
from rich.table import Table
from settings import UserError, as_json, check, parse
from teacher import Teacher, find_teacher, known_digest, load_teacher

GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DIVERGED = "diverged.json"


def train_group(
    problem: problems.Problem,
    group: Sequence[runs.Run],
    model: nn.Module,
    teacher: Teacher,
    reporter: cifar.Reporter,
) -> list[dict[str, object] | None]:
    """Trains a group of runs.  One whose loss does not stay finite stops no other.

    It leaves a file that says so, and is not tried again, unless by ``--on-nonfinite
    skip`` after ``stop``.  Others that train together with it begin anew without it.

    Args:
      problem: data, devices, settings.
      group: as of `runs.grid_groups`.
      model: the network.
      teacher: whom they follow.
      reporter: told of progress.

    Returns:
      Their results, None for those that diverged.

    Raises:
      UserError, Terminated, CheckpointError: as `training.train_together`.
    """
    how = problem.settings.on_nonfinite
    path_of = lambda run: run.folder(problem.out) / DIVERGED

    def earlier(run):
        runs.check_folder(run, problem.out)
        path = path_of(run)
        if (path.parent / "result.json").exists() or not path.exists():
            return None
        found = records.read_json(path, f"delete it, and {path.parent} is tried again")
        return None if (found["on_nonfinite"], how) == ("stop", "skip") else found

    def mark(left, lost):
        training.forget(problem, left)
        for i, found in lost.items():
            records.write_json(path_of(group[i]), found)

    known = processes.first(lambda: [earlier(run) for run in group])
    lost = {i: found for i, found in enumerate(known) if found is not None}
    results = [None] * len(group)
    while chosen := [i for i in range(len(group)) if i not in lost]:
        left = [group[i] for i in chosen]
        try:
            made = training.train_together(problem, left, model, teacher, reporter)
        except RunError as error:  # a lambda may be far too large
            why = str(error).partition("; ")[0].partition(": ")[2]
            found = {"error": why, "on_nonfinite": how}
            new = {chosen[i]: found for i in error.which}
            processes.first(lambda left=left, new=new: mark(left, new))
            lost.update(new)
        else:
            for i, result in zip(chosen, made, strict=True):
                results[i] = result
            break
    say = reporter.progress.console.print
    for i, (run, result) in enumerate(zip(group, results, strict=True)):
        if result:
            say(f"{run.label}: {result['accuracy']:.2f} % of held-out images")
        else:
            again = f"delete {path_of(run)} to try it again"
            say(f"{run.label}: {lost[i]['error']}; counts as 0 %; {again}")
    return results


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
