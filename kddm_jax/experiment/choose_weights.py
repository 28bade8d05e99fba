"""Implements ``kddm choose-weights``, which tunes every method on held-out images.

    kddm choose-weights --normalizations None unit -- --dataset digits --held-out 300 \
        --seeds 0 1

Settings of ``kddm distill`` follow after ``--``. The test set is never used.

1. The command chooses the learning rate and the weight decay of the student alone.
   Distilled students have the same weight decay.
2. For every distance and normalization, it trains one seed for each lambda of a coarse
   grid, for fewer epochs if you pass ``--first-epochs``. These runs, and the student
   alone to which they are compared, have the learning rate of the settings (``--lr``).
3. For the best normalization of a distance, and for raw features, it chooses the
   learning rate with one seed, because a distance adds to the gradient. It then trains
   all seeds for each lambda of a finer grid around the best one. If all students of the
   coarse grid are worse than the student alone, it does neither.

A grid whose best value is at its edge is extended. The command prints the chosen values
as options of ``kddm distill``, and writes all accuracies to ``weights.json``. A run
that diverges counts as 0 %. All lambdas of a distance share one compiled program.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from kddm_jax.experiment import study
from kddm_jax.experiment.checks import check
from kddm_jax.experiment.grids import CLOSEST
from kddm_jax.experiment.machine import processes, records
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.machine.terminal import answer_errors, console
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.settings import Settings, as_json, change, parts_of
from kddm_jax.experiment.training import methods, runs
from kddm_jax.experiment.training.problems import Problem
from kddm_jax.experiment.tuning import (
    GRID,
    Search,
    Tuning,
    normalizations,
    tune,
    tune_alone,
)

ABOUT = "Tunes the student alone and lambda of each distance on held-out images."


def choose(settings: Settings, search: Search, console: Console) -> dict[str, Any]:
    """Tunes the student alone, then every distance of the settings.

    Args:
      settings: settings of ``kddm distill``, with held-out images and several seeds.
      search: the values to try.
      console: console that prints the lines.

    Returns:
      The content of ``weights.json``: the settings, ``alone`` (from
      `tuning.tune_alone`), ``chosen`` (from `tuning.tune`, for all distances),
      ``tried`` (a record of every run), ``options`` (from `options`), the teacher's
      accuracy and digest, and the environment.

    Raises:
      UserError: the settings or the values to try do not allow a choice; or as in
        `study.open`.
    """
    _check_settings(settings)
    _check_search(settings, search)
    with study.open(
        *(settings, console),
        suffix="-weights",
        plan=lambda problem, digest: (),  # a run depends on the results of earlier ones
        check=lambda problem: _check_distances(problem, search),
    ) as opened:
        problem = opened.problem
        tuning = Tuning(opened, search, problem.settings)
        found: dict[str, Any] = {
            "settings": as_json(problem.settings),
            "alone": tune_alone(tuning),
            "chosen": [],
            "teacher": opened.teacher.accuracy,
            "teacher_digest": opened.teacher.digest,
            "environment": records.environment(problem.devices),
        }

        def keep():
            found["tried"] = [*tuning.tried.values()]
            found["options"] = options(found)
            path = problem.out / "weights.json"
            processes.first(lambda: records.write_json(path, found))
            # A program takes about a thousand memory maps on a CPU, and Linux gives a
            # process 65,530. Those of another method are compiled or read again.
            jax.clear_caches()

        keep()
        for name in settings.method.distances:
            found["chosen"] += tune(tuning, name)
            keep()
    console.print(f"{problem.out}/weights.json")
    return found


# ---------------------------------------------------------------------------
# Checks, before anything is trained.


def _check_settings(settings):
    """Refuses settings with which nothing can be chosen."""
    for name in settings.method.distances:
        if len(parts := parts_of(name)) > 1:
            raise UserError(
                f"--distances {name}: each distance of a sum has its own lambda, but "
                f"the grid has one; tune them alone: --distances {' '.join(parts)}"
            )
    if not settings.data.held_out:
        raise UserError(
            "--held-out is 0, so there are no images to choose on; keep some training "
            "images, such as --held-out 300"
        )
    seeds = settings.run.seeds
    if len(seeds) < 2:
        raise UserError(
            f"--seeds names only {seeds[0]}, and one seed is too little to choose by; "
            "pass at least two, such as --seeds 0 1"
        )
    for option in ("weight", "weights"):
        if getattr(settings.method, option) is not None:
            raise UserError(
                f"--{option}: this command chooses lambda; leave out --{option}, and "
                "name the lambdas to try by --grid, before the --"
            )


def _check_search(settings, search):
    """Refuses values to try that are out of range or too close to each other."""
    for option, setting, grid in (
        ("grid", "weight", search.weights),
        ("rates", "lr", search.rates),
        ("decays", "weight_decay", search.decays),
    ):
        if grid:
            _check_grid(option, grid)
        for value in grid:
            check(change(settings, **{setting: value}))
    for normalization in search.normalizations:
        check(change(settings, normalization=normalization))
    epochs, first = settings.optimizer.epochs, search.first_epochs
    if first is not None and not 0 < first <= epochs:
        raise UserError(
            f"--first-epochs must be at least 1 and at most --epochs, which is {epochs}"
            f"; got {first}"
        )


def _check_grid(option: str, grid: Sequence[float]) -> None:
    given = " ".join(f"{value:g}" for value in grid)
    zero = option == "decays"  # a student without weight decay is a candidate
    if not all(0 <= v < float("inf") and (zero or v) for v in grid):
        least = "zero or positive" if zero else "positive"
        raise UserError(f"--{option}: values must be {least} and finite, got {given}")
    values = sorted(value for value in grid if value)
    if len(values) < 2:
        raise UserError(
            f"--{option} {given}: pass at least two positive values, because a grid is "
            "extended by the factor between two of them"
        )
    for low, high in zip(values, values[1:], strict=False):
        if high / low < CLOSEST:
            raise UserError(
                f"--{option}: {low} and {high} are too close; neighbours must differ "
                f"by a factor of at least {CLOSEST}"
            )


def _check_distances(problem: Problem, search: Search) -> None:
    """Traces every distance with every normalization on the real shapes."""
    for name in problem.settings.method.distances:
        if not methods.normalizes(name):
            continue  # `runs.check_distances` has traced it
        found = normalizations(name, problem.settings, search)
        if not found:
            tried = " ".join(map(str, search.normalizations))
            raise UserError(
                f"distance {name} is zero with each of --normalizations {tried}; add "
                "None, or leave out the distance"
            )
        for normalization in found:
            settings = change(problem.settings, normalization=normalization)
            method = runs.method_of(problem, name, settings)
            statistics = problem.statistics
            if statistics and statistics.about["normalization"] != normalization:
                raise UserError(
                    f"--teacher-statistics has features with --normalization "
                    f"{statistics.about['normalization']}, so {normalization} cannot "
                    "be tried; leave --normalizations out"
                )
            bank = statistics and statistics.bank
            methods.check(name, method, *problem.shapes, problem.compared_images, bank)


# ---------------------------------------------------------------------------
# Output.


def _lambda(row):
    if not row["accuracy"]:
        return "diverged"
    return f"{row['weight']:g}{' (edge)' if row['at_edge'] else ''}"


def _table(found):
    columns = ("method", "normalization", "learning rate", "λ")
    view = Table(*columns, "held-out accuracy, %", "seeds")
    seeds, alone = len(found["settings"]["seeds"]), found["alone"]
    accuracy = f"{alone['accuracy']:.1f}"
    view.add_row("student alone", "", f"{alone['lr']:g}", "", accuracy, str(seeds))
    for row in found["chosen"]:
        normalizes = methods.normalizes(row["name"])
        view.add_row(
            row["name"],
            str(row["normalization"]) if normalizes else "",
            f"{row['lr']:g}",
            _lambda(row),
            f"{row['accuracy']:.1f}",
            str(row["seeds"]),
        )
    return view


def _notes(found):
    """Yields notes about single rows of the table."""
    for name in found["alone"]["at_edge"]:
        option, value = name.replace("_", "-"), found["alone"][name]
        yield f"student alone: --{option} {value:g} is at the edge of its grid"
    for row in found["chosen"]:
        name, epochs = row["name"], row["epochs"]
        if methods.normalizes(name):
            name += f", normalization {row['normalization']}"
        if row["seeds"] == 1:
            yield (
                f"{name}: worse than the student alone after {epochs} "
                f"epoch{'' if epochs == 1 else 's'}, so only one seed was trained"
            )
        if row["at_edge"] and row["accuracy"]:
            yield f"{name}: λ = {row['weight']:g} is at the edge of its grid"
        if row["lr_at_edge"]:
            yield f"{name}: learning rate {row['lr']:g} is at the edge of its grid"


def options(found: Mapping[str, Any]) -> list[str]:
    """Returns the chosen options of ``kddm distill``.

    There is a line for the student alone, and one for each pair of learning rate and
    normalization. A method that diverged for each lambda is in none.

    Args:
      found: the content of ``weights.json``.
    """
    groups: dict[tuple[float, str | None], list] = {}
    for row in found["chosen"]:
        if row["accuracy"]:
            groups.setdefault((row["lr"], row["normalization"]), []).append(row)
    alone = found["alone"]
    decay = f"--weight-decay {alone['weight_decay']:g}"
    lines = [f"--lr {alone['lr']:g} {decay} --distances"]
    for (lr, normalization), group in groups.items():
        names = " ".join(row["name"] for row in group)
        pairs = " ".join(f"{row['name']} {row['weight']:g}" for row in group)
        method = f"--normalization {normalization} --distances {names}"
        lines.append(f"--lr {lr:g} {decay} {method} --weights {pairs}")
    return lines


def show(found: Mapping[str, Any], console: Console) -> None:
    """Prints the chosen values and the options for ``kddm distill``."""
    console.print(_table(found))
    for line in _notes(found):
        console.print(line)
    console.print(
        "options for kddm distill (add the settings of this command without "
        "--held-out, one --teacher for all lines, and an --out for each line; kddm "
        "report joins their results.json):"
    )
    for line in found["options"]:
        console.print(f"  {line}")


def _normalization(text):
    return None if text == "None" else text


def _parser(prog):
    parser = argparse.ArgumentParser(description=ABOUT, prog=prog)
    usual = " ".join(f"{weight:g}" for weight in GRID)
    for option, default, about in (
        ("--grid", GRID, f"coarse grid of lambda (default: {usual})"),
        ("--rates", (), "learning rates (default: only --lr)"),
        (
            "--decays",
            (),
            "weight decays of the student alone (default: only --weight-decay)",
        ),
    ):
        parser.add_argument(option, type=float, nargs="+", default=default, help=about)
    parser.add_argument(
        "--normalizations",
        type=_normalization,
        nargs="+",
        default=(),
        help="normalizations to try, such as None unit (default: only --normalization)",
    )
    parser.add_argument(
        "--first-epochs", type=int, help="epochs of the coarse grid (default: --epochs)"
    )
    parser.add_argument(
        "settings", nargs="*", help="settings of kddm distill, after --"
    )
    return parser


def main(arguments: list[str], prog: str = "kddm choose-weights") -> int:
    """Runs the command and returns its exit status."""
    given = _parser(prog).parse_args(arguments)

    def work():
        settings = parse(given.settings, prog)
        run = settings.run
        processes.start(run.coordinator, run.processes, run.process)
        grids = (given.grid, given.normalizations, given.rates, given.decays)
        unique = (tuple(dict.fromkeys(values)) for values in grids)
        search, terminal = Search(*unique, first_epochs=given.first_epochs), console()
        show(choose(settings, search, terminal), terminal)

    return answer_errors(work)
