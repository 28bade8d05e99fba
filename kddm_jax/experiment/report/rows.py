"""Groups the runs of a study into the rows of a table.

A row is a method with its normalization, its lambda and, if it is a control, its
placebo. The runs of a row differ in their seed only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kddm_jax.distances import DISTANCES
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import FEATURE_ONLY, renamed

# Students without a teacher: with the epochs of a distilled student, or its compute.
ALONE = ("student", "student_longer")
NORMALIZATIONS: Mapping[Any, str] = {
    None: "raw",
    "teacher": "teacher scale",
    "unit": "unit rows",
    "centered": "centered",
    "standardized": "standardized",
}
PLACEBOS = {
    "pairs": "pairs shuffled within a class",
    "labels": "labels permuted",
    "gaussian": "Gaussian features",
}
SHOWN = ("normalization", "placebo")


# ---------------------------------------------------------------------------
# Rows.


class Key(NamedTuple):
    """Distinguishes the rows of a table; everything is written as the table shows it.

    Attributes:
      name: name of the runs.
      placebo: what the control destroys; "" if the row is none.
      normalization: normalization of the features; "" if no features are compared.
      weight: lambda; "" for a student alone.
    """

    name: str
    placebo: str = ""
    normalization: str = ""
    weight: str = ""


@dataclass(frozen=True)
class Row:
    """Contains the runs of a row, one for each seed.

    Attributes:
      key: name, placebo, normalization and lambda.
      title: title of the row, different from those of the other rows of the method.
      runs: results of the runs.
    """

    key: Key
    title: str
    runs: tuple[Mapping[str, Any], ...]

    @property
    def alone(self) -> bool:
        """Returns whether the row is a student without a teacher."""
        return self.key.name in ALONE

    @property
    def accuracy(self) -> dict[int, float]:
        """Returns the accuracy after the last epoch by seed, in percent."""
        return {run["seed"]: run["accuracy"] for run in self.runs}

    @property
    def mean(self) -> float:
        """Returns the mean accuracy over seeds, in percent."""
        return float(np.mean([*self.accuracy.values()]))


def _compares_features(name):
    """Returns whether a normalization changes a method; users' modules are not read."""
    if name == FEATURE_ONLY:
        return False
    return name not in DISTANCES or "features" in DISTANCES[name].inputs


def _method(run, settings) -> dict[str, Any]:
    """Returns the settings of a run that its row shows, first from the run itself."""
    known = {**renamed(settings), **renamed(run.get("settings", {}))}
    return {name: known.get(name) for name in SHOWN}


def _key(run, settings):
    name = run["name"]
    if name in ALONE:
        return Key(name)
    method, words = _method(run, settings), ""
    if _compares_features(name):
        words = NORMALIZATIONS.get(method["normalization"], method["normalization"])
    placebo = method["placebo"] or ""
    return Key(name, PLACEBOS.get(placebo, placebo), words, f"{run['weight']:g}")


def _title(title, key, keys):
    """Adds to a method's title what distinguishes its rows."""
    same = [other for other in keys if other[:2] == key[:2]]
    words = [title]
    if len({other.normalization for other in same}) > 1:
        words.append(key.normalization)
    if len([other for other in same if other.normalization == key.normalization]) > 1:
        words.append(f"λ = {key.weight}")
    return ", ".join([*words, *([key.placebo] if key.placebo else [])])


def rows(results: Mapping[str, Any]) -> list[Row]:
    """Groups the runs of a study.

    Args:
      results: the content of ``results.json``.

    Returns:
      The rows: students alone, then the methods in the order of the runs.
    """
    groups: dict[Key, list[Mapping]] = {}
    for run in results["runs"]:
        groups.setdefault(_key(run, results["settings"]), []).append(run)
    place = lambda key: ALONE.index(key.name) if key.name in ALONE else len(ALONE)
    keys = sorted(groups, key=place)  # keeps the order of equal places
    return [
        Row(key, _title(groups[key][0]["title"], key, keys), tuple(groups[key]))
        for key in keys
    ]


def reference(found: Sequence[Row]) -> Row:
    """Returns the better of the students alone, to which methods are compared.

    Raises:
      UserError: there is no student alone.
    """
    alone = [row for row in found if row.alone]
    if not alone:
        raise UserError(
            "the results have no student alone to compare with; rerun the command of "
            "kddm distill that made them"
        )
    return max(alone, key=lambda row: row.mean)
