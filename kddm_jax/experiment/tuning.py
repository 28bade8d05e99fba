"""Tunes the student alone, and lambda of a distance, on held-out images.

A candidate is a method with values of the settings to choose: learning rate and weight
decay for the student alone; learning rate, normalization and lambda for a distance.
Each candidate has its own folder, so that a later command reads its result instead of
training it again. `choose_weights.py` describes the search.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kddm_jax.experiment import study
from kddm_jax.experiment.grids import at_edge, best_of, climb, finer
from kddm_jax.experiment.machine import processes, records
from kddm_jax.experiment.machine.errors import RunError, UserError
from kddm_jax.experiment.settings import Settings, change
from kddm_jax.experiment.training import methods, runs

GRID = (0.1, 1.0, 10.0)
DIVERGED = "diverged.json"


@dataclass(frozen=True)
class Search:
    """Describes the values to try.

    Attributes:
      weights: coarse grid of lambda.
      normalizations: normalizations to try; empty tries that of the settings only.
      rates: grid of the learning rate; empty keeps that of the settings.
      decays: grid of the student's weight decay; empty keeps that of the settings.
      first_epochs: number of epochs of the runs of the coarse grid; None trains them as
        long as the other runs.
    """

    weights: tuple[float, ...] = GRID
    normalizations: tuple[str | None, ...] = ()
    rates: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()
    first_epochs: int | None = None


# ---------------------------------------------------------------------------
# Runs.


def train(opened: study.Study, run: runs.Run) -> float:
    """Trains one student; if it diverges, its accuracy is 0.

    Divergence is recorded in ``diverged.json``.  A recorded run is not trained again,
    unless it stopped under ``--on-nonfinite stop`` and the option is now ``skip``.

    Args:
      opened: the study.
      run: a run of the study's problem.

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
        finally:
            opened.reporter.remove(run)
    again = f"delete {path} to try it again"
    opened.say(f"{run.label}: {found['error']}; counts as 0 %; {again}")
    return 0.0


def _choices(name, settings):
    """Returns the values in which the candidates of a method differ, by setting."""
    optimizer, method = settings.optimizer, settings.method
    choices = {"epochs": optimizer.epochs, "lr": optimizer.lr}
    if name in runs.ALONE:
        return {**choices, "weight_decay": optimizer.weight_decay}
    normalization = method.normalization if methods.normalizes(name) else None
    return {**choices, "normalization": normalization, "weight": method.weight}


def _place(choices):
    """Returns the folder of a candidate, within the folder of results."""
    return "-".join(
        f"{k}-{v:g}" if isinstance(v, float) else f"{k}-{v}" for k, v in choices.items()
    )


@dataclass
class Tuning:
    """Trains candidates and records every run.

    Attributes:
      opened: the study.
      search: the values to try.
      settings: settings of the study, later with the chosen decay.
      tried: record of each run, as in ``weights.json``, by what identifies the run.
    """

    opened: study.Study
    search: Search
    settings: Settings
    tried: dict[tuple, dict[str, Any]] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Returns all seeds of the study."""
        return self.settings.run.seeds

    @property
    def first_epochs(self) -> int:
        """Returns the number of epochs of the coarse grid."""
        return self.search.first_epochs or self.settings.optimizer.epochs

    def score(self, name: str, seeds: Sequence[int], **changes: object) -> float:
        """Returns the mean held-out accuracy of a candidate over seeds, in percent.

        Args:
          name: "student" for the student alone, or a method.
          seeds: the seeds.
          **changes: settings of the candidate that are not those of the study.
        """
        settings = change(self.settings, **changes)
        return float(np.mean([self._accuracy(name, s, settings) for s in seeds]))

    def _accuracy(self, name, seed, settings):
        choices = _choices(name, settings)
        key = (name, seed, *choices.values())
        if key not in self.tried:
            place = _place(choices)
            run = runs.student_run(
                *(self.opened.problem, self.opened.teacher.digest, name, seed),
                settings=settings,
                place=place,
            )
            record = {"name": name, "seed": seed, **choices, "place": place}
            self.tried[key] = {**record, "accuracy": train(self.opened, run)}
        return self.tried[key]["accuracy"]


# ---------------------------------------------------------------------------
# The search.


def tune_alone(tuning: Tuning) -> dict[str, Any]:
    """Chooses the learning rate, then the weight decay, of the student alone.

    Args:
      tuning: trains the candidates; its settings get the chosen decay.

    Returns:
      ``lr``, ``weight_decay``, the mean ``accuracy`` of all seeds, and the settings
      whose best value is ``at_edge`` of its grid.

    Raises:
      UserError: all candidates diverged.
    """
    optimizer, edges = tuning.settings.optimizer, []
    best = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    grids = {"lr": tuning.search.rates, "weight_decay": tuning.search.decays}
    for option, grid in grids.items():
        if grid:
            score = lambda value, option=option: tuning.score(
                "student", tuning.seeds, **{**best, option: value}
            )
            scores = climb(score, grid)
            edges += [option] if at_edge(scores) else []
            best[option] = best_of(scores)
    tuning.settings = change(tuning.settings, weight_decay=best["weight_decay"])
    accuracy = tuning.score("student", tuning.seeds, **best)
    if not accuracy:
        option = "values of --rates" if tuning.search.rates else "--lr"
        raise UserError(f"every student alone diverged; pass a smaller {option}")
    return {**best, "accuracy": accuracy, "at_edge": edges}


def normalizations(
    name: str, settings: Settings, search: Search
) -> tuple[str | None, ...]:
    """Returns the normalizations to try for a method.

    Those with which the method is always zero are left out. A method that does not
    compare features has none.
    """
    if not methods.normalizes(name):
        return (None,)
    wanted = search.normalizations or (settings.method.normalization,)
    return tuple(n for n in wanted if not methods.is_zero(name, n))


def _coarse(tuning, name, normalization):
    """Returns the accuracy of one seed for each lambda of the coarse grid."""

    def score(weight):
        changes = {"normalization": normalization, "weight": weight}
        changes["epochs"] = tuning.first_epochs
        return tuning.score(name, tuning.seeds[:1], **changes)

    return climb(score, tuning.search.weights)


def _rate(tuning, name, normalization, weight):
    """Returns the best learning rate of one seed, and whether it is at an edge."""

    def score(lr):
        changes = {"normalization": normalization, "weight": weight, "lr": lr}
        return tuning.score(name, tuning.seeds[:1], **changes)

    if not tuning.search.rates:
        return tuning.settings.optimizer.lr, False
    scores = climb(score, tuning.search.rates)
    return best_of(scores), at_edge(scores)


def _fine(tuning, name, normalization, coarse, lr):
    """Returns the mean accuracy of all seeds for each lambda of the finer grid."""

    def score(weight):
        changes = {"normalization": normalization, "weight": weight, "lr": lr}
        return tuning.score(name, tuning.seeds, **changes)

    return climb(score, finer([*coarse], best_of(coarse)))


def tune(tuning: Tuning, name: str) -> list[dict[str, Any]]:
    """Chooses learning rate and lambda with a distance's best normalization, and raw.

    Args:
      tuning: trains the candidates.
      name: name of the distance.

    Returns:
      A row for each of the two, as in ``chosen`` of ``weights.json``: the ``lr``,
      whether it is ``lr_at_edge`` of its grid, the ``weight`` and its mean ``accuracy``
      over ``seeds`` (their number) after ``epochs``, whether the weight is ``at_edge``
      of its grid, and which of the two is ``best``.
    """
    coarse = {
        normalization: _coarse(tuning, name, normalization)
        for normalization in normalizations(name, tuning.settings, tuning.search)
    }
    top = max(coarse, key=lambda normalization: max(coarse[normalization].values()))
    alone = tuning.score("student", tuning.seeds[:1], epochs=tuning.first_epochs)
    rows = []
    for normalization, scores in coarse.items():
        if normalization not in (top, None):
            continue
        ahead, edge = max(scores.values()) >= alone, False
        lr = tuning.settings.optimizer.lr
        if ahead:
            lr, edge = _rate(tuning, name, normalization, best_of(scores))
            scores = _fine(tuning, name, normalization, scores, lr)
        seeds, epochs = len(tuning.seeds), tuning.settings.optimizer.epochs
        made = (seeds, epochs) if ahead else (1, tuning.first_epochs)
        row = _row(name, normalization, scores, *made)
        rows.append({**row, "lr": lr, "lr_at_edge": edge})
    best = max(rows, key=lambda row: (row["seeds"], row["accuracy"]))
    return [{**row, "best": row is best} for row in rows]


def _row(
    name: str,
    normalization: str | None,
    scores: Mapping[float, float],
    seeds: int,
    epochs: int,
):
    return {
        "name": name,
        "normalization": normalization,
        "weight": best_of(scores),
        "accuracy": max(scores.values()),
        "seeds": seeds,
        "epochs": epochs,
        "at_edge": at_edge(scores),
    }
