"""Groups runs into the rows of a table, for one study or for several.

A row is a method with its normalization, lambda, learning rate, weight decay, layers
and, if it is a control, placebo. The runs of a row differ in their seed only. `rows`
groups the runs of a study. `merge` joins studies that differ only in their seeds and in
what the rows show.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np

from kddm_jax.distances import DISTANCES
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.options import Mark
from kddm_jax.experiment.published import PUBLISHED
from kddm_jax.experiment.settings import (
    ALONE,
    FEATURE_ONLY,
    GROUP_OF,
    LONGER,
    RELEASED,
    Settings,
    as_json,
    marked,
    parts_of,
    renamed,
)

# Students without a teacher: with the epochs of a distilled student, or its compute.
STUDENTS_ALONE = ("student", LONGER)
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
    "views": "views of an image exchanged",
    "gaussian": "Gaussian features",
}
# A table shows these, or they do not change a run's last epoch. The teacher is compared
# by its digest, a file of pretrained weights by its digest in the runs, and the images
# of students and of the evaluation by their numbers, because None means all.
SHOWN = ("normalization", "placebo", "placebo_share", "statistics", "outputs", "lr")
SHOWN += ("weight_decay", "layers", "projector")
SHOWN += ("unlabelled_images", "predicted_labels")
MAY_DIFFER = marked(Mark.NAMED_OTHERWISE) | marked(Mark.OF_TEACHER)
IMAGES = {"student_images", "test_images"}
MAY_DIFFER |= {*SHOWN, *IMAGES, "eval_every"}
MAY_DIFFER -= {"distance_group"}
OF_A_SEED = {*SHOWN, *IMAGES, "eval_every", "seed"}


# ---------------------------------------------------------------------------
# Rows.


class Key(NamedTuple):
    """Distinguishes the rows of a table; everything is written as the table shows it.

    Attributes:
      name: name of the runs.
      remarks: what the control destroys, or the statistics or reduced outputs of a
        teacher that the student learns from; "" if there are none.
      normalization: normalization of the features; "" if no features are compared.
      weight: lambda; "" for a student alone.
      rate: peak learning rate; "" if it was not recorded.
      decay: weight decay; "" if it was not recorded.
      layers: the values of ``--layers`` and ``--projector``; "" if no features or maps
        are compared.
      unlabelled: the student's unlabelled images; "" if it has none.
    """

    name: str
    remarks: str = ""
    normalization: str = ""
    weight: str = ""
    rate: str = ""
    decay: str = ""
    layers: str = ""
    unlabelled: str = ""


@dataclass(frozen=True)
class Row:
    """Contains the runs of a row, one for each seed.

    Attributes:
      key: what distinguishes the row.
      title: title of the row, different from those of the other rows of the method.
      runs: results of the runs.
    """

    key: Key
    title: str
    runs: tuple[Mapping[str, Any], ...]

    @property
    def alone(self) -> bool:
        """Returns whether the row is a student without a teacher."""
        return self.key.name in STUDENTS_ALONE

    @property
    def accuracy(self) -> dict[int, float]:
        """Returns the accuracy after the last epoch by seed, in percent."""
        return {run["seed"]: run["accuracy"] for run in self.runs}

    @property
    def mean(self) -> float:
        """Returns the mean accuracy over seeds, in percent."""
        return float(np.mean([*self.accuracy.values()]))


def _compares(name, *kinds):
    """Returns whether a method compares such arrays; users' modules are not read.

    Settings do not choose the layers and the normalization of published methods.
    """
    return name not in PUBLISHED and any(
        part not in DISTANCES or not {*kinds}.isdisjoint(DISTANCES[part].inputs)
        for part in parts_of(name)
    )


def _weight(run):
    """Returns the lambda of a run, or those of the distances that it sums."""
    weights = run.get("settings", {}).get("weights")
    return ", ".join(f"{w:g}" for w in (weights or {"": run["weight"]}).values())


def _method(run, settings) -> dict[str, Any]:
    """Returns the settings of a run that its row shows, first from the run itself."""
    known = {**renamed(settings), **renamed(run.get("settings", {}))}
    return {name: known.get(name) for name in SHOWN}


def _remarks(method):
    """Describes what a student learns from, if it is not the teacher on its images."""
    placebo: str = method["placebo"] or ""
    share = method["placebo_share"]
    words: list[str] = []
    if placebo:
        words.append(PLACEBOS.get(placebo) or placebo)
    if placebo and share not in (None, 1):  # runs of earlier versions have no share
        words[0] += f" for {100 * share:g} % of images"
    for kind in ("statistics", "outputs"):
        if method[kind]:
            words.append(f"from {method[kind]}")
    return ", ".join(words)


def _unlabelled(method):
    """Describes the unlabelled images of a student."""
    if not method["unlabelled_images"]:
        return ""
    without = ", no predicted classes" * (method["predicted_labels"] is False)
    return f"{method['unlabelled_images']} unlabelled images{without}"


def all_unlabelled(found: Sequence["Row"]) -> str:
    """Describes the unlabelled images if all distilled students have the same ones."""
    images = {row.key.unlabelled for row in found if not row.alone}
    return images.pop() if len(images) == 1 else ""


def _key(run, settings):
    name = run["name"]
    method, words, layers = _method(run, settings), "", ""
    numbers = (method["lr"], method["weight_decay"])
    rate, decay = ("" if number is None else f"{number:g}" for number in numbers)
    if name in STUDENTS_ALONE:  # the compute of a distilled run depends on its images
        unlabelled = _unlabelled(method) if name == LONGER else ""
        return Key(name, rate=rate, decay=decay, unlabelled=unlabelled)
    if _compares(name, "features", "maps"):
        layers = " ".join(method["layers"] or ())
        pairs = method["layers"] or ("features",)
        projected = not all(pair.startswith("logits:") for pair in pairs)
        if method["projector"] and layers != RELEASED and projected:
            layers = f"{layers} by a {method['projector']} projector".strip()
    if _compares(name, "features"):
        words = NORMALIZATIONS.get(method["normalization"], method["normalization"])
    if name == FEATURE_ONLY and layers == RELEASED:
        words = NORMALIZATIONS[None]  # that loss transforms nothing
    shown = _remarks(method), words, _weight(run), rate, decay, layers
    return Key(name, *shown, _unlabelled(method))


def _title(title, key, keys):
    """Adds to a method's title what distinguishes its rows."""
    same = [other for other in keys if other[:2] == key[:2]]
    words = [title]
    if len({other.normalization for other in same}) > 1:
        words.append(key.normalization)
    if len({o.weight for o in same if o.normalization == key.normalization}) > 1:
        words.append(f"λ = {key.weight}")
    if len({other.rate for other in same if other[:4] == key[:4]}) > 1:
        words.append(f"learning rate {key.rate}")
    if len({other.decay for other in same if other[:5] == key[:5]}) > 1:
        words.append(f"weight decay {key.decay}")
    if len({other.layers for other in same}) > 1 and key.layers:
        words.append(f"layers {key.layers}")
    alone = key.name in STUDENTS_ALONE
    alike = [o for o in keys if (o.name == key.name if alone else o.name not in ALONE)]
    if len({other.unlabelled for other in alike}) > 1 and key.unlabelled:
        words.append(key.unlabelled if not alone else f"with {key.unlabelled}")
    return ", ".join(filter(None, [*words, key.remarks]))


def rows(results: Mapping[str, Any]) -> list[Row]:
    """Groups the runs of a study, or of merged ones.

    Args:
      results: the content of ``results.json``, or what `merge` returns.

    Returns:
      The rows: students alone, then the methods in the order of the runs.
    """
    groups: dict[Key, list[Mapping]] = {}
    for run in results["runs"]:
        groups.setdefault(_key(run, results["settings"]), []).append(run)
    places = {name: place for place, name in enumerate(STUDENTS_ALONE)}
    place = lambda key: places.get(key.name, len(places))
    keys = sorted(groups, key=place)  # keeps the order of equal places
    return [
        Row(key, _title(groups[key][0]["title"], key, keys), tuple(groups[key]))
        for key in keys
    ]


def reference(found: Sequence[Row]) -> Row:
    """Returns the student alone to which methods are compared.

    It is the better of the rows that have the most seeds; a row of fewer seeds would
    leave pairs, and so seeds of the methods, out.

    Raises:
      UserError: there is no student alone.
    """
    alone = [row for row in found if row.alone]
    if not alone:
        raise UserError(
            "the results have no student alone to compare with; rerun the command of "
            "kddm distill that made them"
        )
    most = max(len(row.runs) for row in alone)
    whole = [row for row in alone if len(row.runs) == most]
    return max(whole, key=lambda row: row.mean)


# ---------------------------------------------------------------------------
# Several studies.


def _refuse(places, what, values) -> NoReturn:
    raise UserError(
        f"{' and '.join(places)} differ in {what} ({values[0]} and {values[1]}), so "
        "they make no table together; run kddm report for each alone"
    )


def _defaults():
    return json.loads(json.dumps(as_json(Settings())))  # in the form that is read


def check_settings(
    places: Sequence[str],
    settings: Sequence[Mapping[str, Any]],
    may_differ: Collection[str] = frozenset(MAY_DIFFER),
) -> None:
    """Refuses two commands that differ in a setting that decides a result.

    Args:
      places: names of the commands' files, for the message.
      settings: the two settings as JSON values; missing ones had their defaults.
      may_differ: names of settings that may differ.

    Raises:
      UserError: another setting differs, apart from those of the group `Run`.
    """
    plain = _defaults()  # earlier versions did not record all settings
    first, other = ({**plain, **renamed(values)} for values in settings)
    for name in plain:
        shared = GROUP_OF[name] != "run" and name not in may_differ
        if shared and first[name] != other[name]:
            _refuse(places, name, (first[name], other[name]))


def _check_alike(places, studies):
    """Refuses two studies whose rows cannot be compared."""
    check_settings(places, [study["settings"] for study in studies])
    digests = [study["teacher"].get("digest") for study in studies]
    if digests[0] != digests[1]:
        _refuse(places, "the teacher's digest", digests)
    images = [study["eval_images"] for study in studies]
    if images[0] != images[1]:
        _refuse(places, "the number of evaluation images", images)
    images = [study.get("student_images") for study in studies]
    if None in images:  # earlier versions recorded the setting only
        images = [study["settings"].get("student_images") for study in studies]
    if images[0] != images[1]:
        _refuse(places, "student_images", images)


def _check_row(places, runs):
    """Refuses two runs of a row that differ in more than their seed."""
    plain, title = _defaults(), runs[0]["title"]
    first, other = ({**plain, **renamed(run.get("settings", {}))} for run in runs)
    for name in sorted({*first, *other} - OF_A_SEED):
        pair = first.get(name), other.get(name)
        if pair[0] != pair[1]:
            _refuse(places, f"{name} of {title}", pair)
    found = [run["accuracy"] for run in runs]
    if runs[0]["seed"] == runs[1]["seed"] and found[0] != found[1]:
        folder = f"{runs[0]['name'].replace(':', '.')}/seed{runs[0]['seed']}"
        raise UserError(
            f"{' and '.join(places)} differ in the accuracy of {title}, seed "
            f"{runs[0]['seed']} ({found[0]:.2f} and {found[1]:.2f} %); copy the folder "
            f"{folder} of one study into the other and rerun its command, or run "
            "kddm report for each alone"
        )


def merge(studies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Joins the runs of several studies.

    Args:
      studies: contents of ``results.json``, by the names that messages use.

    Returns:
      Results with the runs of all studies, and with the studies as ``studies``. A row
      that occurs in several studies has the seeds of all; a seed that occurs twice is
      taken once.

    Raises:
      UserError: the studies differ in more than their seeds and what rows show, or have
        different accuracies of one seed.
    """
    (place, first), *others = studies.items()
    for other, study in others:
        _check_alike((place, other), (first, study))
    found: dict[Key, dict[int, tuple[str, Mapping]]] = {}  # by row and by seed
    for place, study in studies.items():
        for run in study["runs"]:
            own = {
                **renamed(run.get("settings", {})),
                **_method(run, study["settings"]),
            }
            run, row = {**run, "settings": own}, _key(run, study["settings"])
            seeds = found.setdefault(row, {})
            if seeds:  # compared with the run of the same seed, or else with any
                known = seeds.get(run["seed"], next(iter(seeds.values())))
                _check_row((known[0], place), (known[1], run))
            seeds.setdefault(run["seed"], (place, run))
    trained = [s["teacher"] for s in studies.values() if s["teacher"]["timing"]]
    return {
        **first,
        "teacher": (trained or [first["teacher"]])[0],
        "runs": [run for seeds in found.values() for _, run in seeds.values()],
        "studies": [*studies.values()],
    }
