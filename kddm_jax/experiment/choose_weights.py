"""Implements ``kddm choose-weights``, which tunes every method on held-out images.

    kddm choose-weights --normalizations None unit -- --dataset digits --held-out 300 \
        --seeds 0 1

Settings of ``kddm distill`` follow after ``--``. The test set is never used. The command
tunes the student alone first, then every distance:

1. It chooses the learning rate and the weight decay of the student alone. All distilled
   students are trained with them.
2. For every distance and normalization it trains one seed for each lambda of a coarse
   grid, if asked to with fewer epochs.
3. For the best normalization of a distance, and for raw features, it trains all seeds
   for each lambda of a fine grid around the best one. A pair that was worse than the
   student alone keeps the lambda of the coarse grid.

A grid whose best value is at its edge is extended. The command prints the held-out
accuracies and the options for ``kddm distill``, and writes ``weights.json``. A run that
diverges counts as 0 %. All lambdas of a distance share one compiled program.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kddm_jax.experiment import study
from kddm_jax.experiment.checks import check
from kddm_jax.experiment.machine import processes, records
from kddm_jax.experiment.machine.errors import RunError, UserError
from kddm_jax.experiment.machine.terminal import answer_errors, console
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.settings import Settings, as_json, change, parts_of
from kddm_jax.experiment.training import methods, runs

GRID = (0.1, 1.0, 10.0)
EXTENSIONS = 4  # values that are added to a grid at most
DIVERGED = "diverged.json"
ABOUT = "Tunes the student alone and lambda of each distance on held-out images."


@dataclass(frozen=True)
class Search:
    """Says what is tried.

    Attributes:
      weights: coarse grid of lambda, at least two values.
      normalizations: normalizations to try; empty tries that of the settings only.
      rates: grid of the learning rate of the student alone; empty keeps the settings'.
      decays: grid of its weight decay; empty keeps the settings'.
      first_epochs: epochs of the runs of the coarse grid; None trains as long as in the
        settings.
    """

    weights: tuple[float, ...] = GRID
    normalizations: tuple[str | None, ...] = ()
    rates: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()
    first_epochs: int | None = None


def _rounded(value):
    """Rounds to two digits, so that an extended grid has plain numbers."""
    return float(f"{value:.2g}")


def climb(
    score: Callable[[float], float], grid: Sequence[float], more: int = EXTENSIONS
) -> dict[float, float]:
    """Scores the values of a grid, and extends it while the best value is at an edge.

    The grid continues with the ratio of its two values at that edge.

    Args:
      score: function of a value; larger scores are better.
      grid: positive values, at least two; a zero is never passed.
      more: number of values that are added at most.

    Returns:
      The score of each value, in the order of the values.
    """
    values = sorted(grid)
    scores = {value: score(value) for value in values}
    for _ in range(more):
        best = max(values, key=lambda value: scores[value])
        if best == values[0] > 0 < values[1]:
            new = _rounded(best * values[0] / values[1])
        elif best == values[-1]:
            new = _rounded(best * values[-1] / values[-2])
        else:
            break
        if new in scores or not scores[best]:
            break
        scores[new] = score(new)
        values = sorted(scores)
    return {value: scores[value] for value in values}


def best_of(scores: Mapping[float, float]) -> float:
    """Returns the value of the highest score, the smallest of several."""
    return max(sorted(scores), key=lambda value: scores[value])


def finer(grid: Sequence[float], best: float) -> tuple[float, ...]:
    """Returns the best value and two neighbours, at half the grid's steps."""
    values = sorted(grid)
    step = math.sqrt(values[1] / values[0])
    return tuple(_rounded(value) for value in (best / step, best, best * step))


# ---------------------------------------------------------------------------
# Runs.


def train(opened: study.Study, run: runs.Run) -> float:
    """Trains one student; if it diverges, its accuracy is 0.

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


@dataclass
class _Tuning:
    """Trains candidates and keeps a record of each.

    Attributes:
      opened: the study.
      search: what is tried.
      settings: the study's settings, later with the chosen rate and decay.
      tried: what was trained, as in ``weights.json``.
    """

    opened: study.Study
    search: Search
    settings: Settings
    tried: list[dict[str, Any]]

    def score(self, name: str, seeds: Sequence[int], **changes) -> float:
        """Returns the mean held-out accuracy of a method over seeds."""
        settings = change(self.settings, weights=None, **changes)
        problem, digest = self.opened.problem, self.opened.teacher.digest
        found = []
        for seed in seeds:
            run = runs.student_run(
                *(problem, digest, name, seed),
                settings=settings,
                place=_place(name, settings),
            )
            found.append(train(self.opened, run))
            record = {"name": name, "seed": seed, **_choices(name, settings)}
            record |= {"accuracy": found[-1], "place": run.place}
            if record not in self.tried:
                self.tried.append(record)
        return float(np.mean(found))

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.settings.run.seeds

    @property
    def first_epochs(self) -> int:
        return self.search.first_epochs or self.settings.optimizer.epochs


def _choices(name, settings):
    """Returns what distinguishes the candidates of a method, by setting."""
    optimizer, method = settings.optimizer, settings.method
    of_optimizer = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    if name in runs.ALONE:
        return {"epochs": optimizer.epochs, **of_optimizer}
    normalization = method.normalization if methods.normalizes(name) else None
    return {
        "epochs": optimizer.epochs,
        "normalization": normalization,
        "weight": method.weight,
    }


def _place(name, settings):
    """Returns the folder of a candidate, within the folder of results."""
    values = _choices(name, settings).items()
    return "-".join(
        f"{k}-{v:g}" if isinstance(v, float) else f"{k}-{v}" for k, v in values
    )


# ---------------------------------------------------------------------------
# The search.


def _tune_alone(tuning: _Tuning) -> dict[str, Any]:
    """Chooses the learning rate, then the weight decay, of the student alone."""
    best: dict[str, float] = {}
    grids = {"lr": tuning.search.rates, "weight_decay": tuning.search.decays}
    for option, grid in grids.items():
        if not grid:
            continue

        def score(value, option=option):
            return tuning.score("student", tuning.seeds, **{**best, option: value})

        scores = climb(score, grid)
        best[option] = best_of(scores)
    tuning.settings = change(tuning.settings, **best)
    accuracy = tuning.score("student", tuning.seeds)
    optimizer = tuning.settings.optimizer
    return {
        "lr": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "accuracy": accuracy,
    }


def _tune(tuning: _Tuning, name: str) -> list[dict[str, Any]]:
    """Chooses lambda for the normalizations of a distance that deserve it."""
    normalizations = tuning.search.normalizations or (
        tuning.settings.method.normalization,
    )
    if not methods.normalizes(name):
        normalizations = (None,)
    first, seed = {}, tuning.seeds[:1]
    for normalization in normalizations:
        if methods.is_zero(name, normalization):
            continue

        def coarse(weight, normalization=normalization):
            return tuning.score(
                *(name, seed),
                normalization=normalization,
                weight=weight,
                epochs=tuning.first_epochs,
            )

        first[normalization] = climb(coarse, tuning.search.weights)
    ranked = sorted(first, key=lambda n: max(first[n].values()), reverse=True)
    kept = [n for n in first if n in (ranked[0], None)]
    alone = tuning.score("student", seed, epochs=tuning.first_epochs)
    chosen = []
    for normalization in kept:
        scores, lost = first[normalization], max(first[normalization].values()) < alone
        if not lost:

            def fine(weight, normalization=normalization):
                return tuning.score(
                    *(name, tuning.seeds), normalization=normalization, weight=weight
                )

            scores = climb(fine, finer(scores, best_of(scores)))
        weight, values = best_of(scores), [*scores]
        chosen.append(
            {
                "name": name,
                "normalization": normalization,
                "weight": weight,
                "accuracy": scores[weight],
                "seeds": 1 if lost else len(tuning.seeds),
                "at_edge": weight in (values[0], values[-1]),
                "best": normalization == ranked[0],
            }
        )
    return chosen


def choose(settings: Settings, search: Search, console: Console) -> dict[str, Any]:
    """Tunes the student alone and every distance of the settings.

    Args:
      settings: settings of ``kddm distill``, with held-out images.
      search: what is tried.
      console: console that prints the lines.

    Returns:
      The content of ``weights.json``: the settings, ``alone`` (learning rate, weight
      decay and accuracy of the student alone), ``chosen`` (lambda for each distance and
      normalization) and ``tried`` (every run).

    Raises:
      UserError: there are no held-out images; or as in `study.open`.
    """
    if not settings.data.held_out:
        raise UserError("--held-out is 0; keep some training images, such as 300")
    if len(settings.run.seeds) < 2:
        raise UserError("one seed cannot choose lambda; pass two, such as --seeds 0 1")
    _check(settings, search)
    plan = lambda problem, digest: ()
    first = change(settings, weights=None, weight=search.weights[0])
    with study.open(first, console, suffix="-weights", plan=plan) as opened:
        tuning = _Tuning(opened, search, opened.problem.settings, [])
        found: dict[str, Any] = {"settings": as_json(tuning.settings)}
        path = opened.problem.out / "weights.json"
        found |= {"alone": _tune_alone(tuning), "chosen": [], "tried": tuning.tried}
        found["teacher"] = opened.teacher.accuracy
        found["environment"] = records.environment(opened.problem.devices)
        for name in settings.method.distances:
            found["chosen"] += _tune(tuning, name)
            processes.first(lambda: records.write_json(path, found))
    return found


def _check(settings, search):
    """Refuses candidates that are out of range or that would share a folder."""
    for name in settings.method.distances:
        if len(parts := parts_of(name)) > 1:
            raise UserError(
                f"--distances {name}: each distance of a sum has its own lambda, but "
                f"the grid has one; tune them alone: --distances {' '.join(parts)}"
            )
    grids = {"grid": search.weights, "rates": search.rates, "decays": search.decays}
    for option, grid in grids.items():
        if option == "grid" and len(grid) < 2 or len(grid) == 1:
            raise UserError(
                f"--{option} has a single value, {grid[0]:g}; pass two or more, "
                "because a best value at the edge extends the grid"
            )
        named = {f"{value:g}": value for value in grid}  # as in the folders' names
        if len(named) < len(grid):
            lost = ", ".join(str(v) for v in grid if v not in named.values())
            raise UserError(
                f"--{option}: {lost} and another are one number to six digits"
            )
    if any(weight <= 0 for weight in search.weights):
        raise UserError(f"--grid must be positive, got {min(search.weights):g}")
    for weight in search.weights:
        check(change(settings, weights=None, weight=weight))
    for normalization in search.normalizations:
        check(change(settings, normalization=normalization))
    for rate in search.rates:
        check(change(settings, lr=rate))
    for decay in search.decays:
        check(change(settings, weight_decay=decay))


# ---------------------------------------------------------------------------
# Output.


def show(found: Mapping[str, Any], console: Console) -> None:
    """Prints the chosen values and the options for ``kddm distill``."""
    alone = found["alone"]
    columns = ("method", "normalization", "λ", "held-out accuracy, %", "seeds")
    view = Table(*columns)
    view.add_row("student alone", "", "", f"{alone['accuracy']:.1f}", "")
    for row in found["chosen"]:
        edge = " (edge of the grid)" if row["at_edge"] else ""
        view.add_row(
            row["name"],
            str(row["normalization"]),
            f"{row['weight']:g}{edge}",
            f"{row['accuracy']:.1f}",
            str(row["seeds"]),
        )
    console.print(view)
    console.print(f"--lr {alone['lr']:g} --weight-decay {alone['weight_decay']:g}")
    normalizations = dict.fromkeys(row["normalization"] for row in found["chosen"])
    for normalization in normalizations:
        pairs = " ".join(
            f"{row['name']} {row['weight']:g}"
            for row in found["chosen"]
            if row["normalization"] == normalization and row["accuracy"]
        )
        line = f"--normalization {normalization} --weights {pairs}"
        console.print(line, soft_wrap=True)


def _normalization(text):
    return None if text == "None" else text


def main(arguments: list[str], prog: str = "kddm choose-weights") -> int:
    """Runs the command and returns its exit status."""
    first = argparse.ArgumentParser(description=ABOUT, prog=prog)
    number = {"type": float, "nargs": "+"}
    first.add_argument("--grid", **number, default=GRID, help="coarse grid of lambda")
    first.add_argument(
        "--normalizations",
        type=_normalization,
        nargs="+",
        default=(),
        help="normalizations to try, such as None unit (default: --normalization)",
    )
    first.add_argument(
        "--rates", **number, default=(), help="learning rates of the student alone"
    )
    first.add_argument(
        "--decays", **number, default=(), help="weight decays of the student alone"
    )
    first.add_argument(
        "--first-epochs", type=int, help="epochs of the coarse grid (default: --epochs)"
    )
    first.add_argument("settings", nargs="*", help="settings of kddm distill, after --")
    given = first.parse_args(arguments)

    def work():
        settings = parse(given.settings, prog)
        run = settings.run
        processes.start(run.coordinator, run.processes, run.process)
        unique = lambda values: tuple(dict.fromkeys(values))
        search = Search(
            unique(given.grid),
            unique(given.normalizations),
            unique(given.rates),
            unique(given.decays),
            given.first_epochs,
        )
        terminal = console()
        show(choose(settings, search, terminal), terminal)

    return answer_errors(work)
