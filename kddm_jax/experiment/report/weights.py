"""Renders the accuracies of ``kddm choose-weights`` in Markdown.

``tried`` of a file ``weights.json`` has a record of every run.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kddm_jax.distances import DISTANCES
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.published import PUBLISHED
from kddm_jax.experiment.report.rows import MAY_DIFFER, check_settings
from kddm_jax.experiment.report.table import command, machine

# Method and normalization, then lambda, of the runs of a grid.
Grids = dict[tuple[str, str | None], dict[float, list[Mapping[str, Any]]]]
# Settings that a candidate replaces, and those that do not change its result.
OF_A_CANDIDATE = MAY_DIFFER - {
    "layers",
    "projector",
    "pretrained_student",
    "teacher_statistics",
    "teacher_outputs",
    "placebo",
    "placebo_share",
    "student_images",
    "unlabelled_images",
    "predicted_labels",
}


def is_choice(results: Mapping[str, Any]) -> bool:
    """Returns whether results are those of ``kddm choose-weights``."""
    return "tried" in results


def markdown(choices: Sequence[dict[str, Any]]) -> str:
    """Renders the held-out accuracies of several commands.

    Args:
      choices: contents of files ``weights.json`` with the same settings. A distance
        that occurs in several files is rendered once.

    Returns:
      A table of the student alone with a row for each learning rate and weight decay,
      and a table with a row for each distance and normalization and a column for each
      lambda. The best accuracy of a row is bold, that of a single seed is in italics,
      and "diverged" means that the loss did not stay finite. The commands follow.

    Raises:
      UserError: the files cannot be compared.
    """
    for choice in choices:
        _check_alike(choices[0], choice)
    tried = [record for choice in choices for record in choice["tried"]]
    found, settings = grids(choices), choices[0]["settings"]
    chosen = {pair: lr for choice in choices for pair, lr in rates(choice).items()}
    columns = sorted({weight for row in found.values() for weight in row})
    head = ("student alone: learning rate", "weight decay", "accuracy %", "seeds")
    rows = dict.fromkeys(row for choice in choices for row in _alone(choice))
    lines = _lines(head, rows)
    if found:
        head = ("", "normalization", "learning rate")
        head = (*head, *(f"λ = {weight:g}" for weight in columns))
        rows = [
            (
                _title(name),
                _normalization(name, of),
                f"{chosen[name, of]:g}" if (name, of) in chosen else "",
                *_cells(row, columns),
            )
            for (name, of), row in found.items()
        ]
        lines += ["", *_lines(head, rows)]
    accuracy = (
        f"mean of {_count(len(settings['seeds']), 'seed')} after "
        f"{_count(settings['epochs'], 'epoch')}"
    )
    single = {
        records[0]["epochs"]
        for row in found.values()
        for records in row.values()
        if len(records) == 1
    }
    if single:
        epochs = " or ".join(map(str, sorted(single)))
        noun = "epoch" if epochs == "1" else "epochs"
        accuracy += f" (in italics: one seed after {epochs} {noun})"
    if any(not record["accuracy"] for record in tried):
        accuracy += "; a run that diverged counts as 0"
    lines += ["", _caption(choices, accuracy)]
    if made_by := [f"- `{made}`" for made in map(_command, choices) if made]:
        lines += ["", *made_by]
    return "\n".join(lines) + "\n"


def _command(choice):
    """Returns the command without the machine's folders, or "" if it is not known."""
    made = choice["environment"].get("command", "")
    own, dashes, _ = made.partition(" -- ")
    return command(choice["settings"], f"{own} --") if dashes else ""


def _check_alike(*choices):
    """Refuses two files whose runs cannot be compared."""
    settings = [choice["settings"] for choice in choices]
    check_settings(("the grids",), settings, OF_A_CANDIDATE)
    known = all("teacher_digest" in choice for choice in choices)
    _check_equal(
        "teacher", *(c["teacher_digest" if known else "teacher"] for c in choices)
    )
    _check_equal("seeds", *(one["seeds"] for one in settings))
    for name in ("lr", "weight_decay"):
        _check_equal(name, *(choice["alone"][name] for choice in choices))


def _check_equal(name, one, other):
    if one != other:
        raise UserError(
            f"grids with {name}={one} and {name}={other} make no table; run kddm "
            "report for each alone"
        )


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _lines(columns, rows):
    return [_line(columns), "|---" * len(columns) + "|", *map(_line, rows)]


def _title(name):
    known = {**DISTANCES, **PUBLISHED}
    return known[name].title if name in known else name


def _caption(choices, accuracy):
    settings = choices[0]["settings"]
    seen = settings.get("teacher_saw_held_out")
    made = [choice["environment"] for choice in choices]
    return (
        f"{settings['dataset']}: accuracy on {settings['held_out']} held-out training "
        f"images{', which the teacher has seen' if seen else ''}, {accuracy}; "
        f"teacher {choices[0]['teacher']:.2f}; {machine(made)}."
    )


def _count(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------------------
# Records of every run.


def rates(choice: Mapping[str, Any]) -> dict[tuple[str, str | None], float]:
    """Returns the chosen learning rate by method and normalization."""
    return {(row["name"], row["normalization"]): row["lr"] for row in choice["chosen"]}


def grids(choices: Iterable[Mapping[str, Any]]) -> Grids:
    """Groups the runs of distances by method and normalization, then by lambda.

    Args:
      choices: contents of ``weights.json``. Long runs with another learning rate than
        the chosen one are left out.

    Returns:
      The runs of all seeds of each lambda, in rising order. If a lambda belongs to the
      coarse and to the finer grid, they are the longer runs, which are those of more
      seeds, too.

    Raises:
      UserError: a run occurs twice, with different accuracies.
    """
    found: dict[tuple, dict[float, dict[int, dict[int, Mapping]]]] = {}
    for choice in choices:
        chosen, longest = rates(choice), choice["settings"]["epochs"]
        for record in choice["tried"]:
            if record["name"] == "student":
                continue
            pair = (record["name"], record["normalization"])
            rate = chosen.get(pair, choice["settings"].get("lr"))
            if record["epochs"] == longest and record["lr"] != rate:
                continue
            by_epochs = found.setdefault(pair, {}).setdefault(record["weight"], {})
            by_seed = by_epochs.setdefault(record["epochs"], {})
            known = by_seed.setdefault(record["seed"], record)
            if known["accuracy"] != record["accuracy"]:
                raise UserError(
                    f"{pair[0]}, λ = {record['weight']:g}, seed {record['seed']} has "
                    f"accuracy {known['accuracy']:g} in one grid and "
                    f"{record['accuracy']:g} in another; run kddm report for each alone"
                )
    return {
        pair: {
            weight: [*row[weight][max(row[weight])].values()] for weight in sorted(row)
        }
        for pair, row in found.items()
    }


def _mean(records):
    return float(np.mean([record["accuracy"] for record in records]))


def _cells(row, columns):
    """Returns a cell for each lambda; the best one is bold."""
    finest = max(len(records) for records in row.values())
    ahead = {w: _mean(records) for w, records in row.items() if len(records) == finest}
    best = max(ahead, key=lambda weight: ahead[weight])
    for weight in columns:
        if weight not in row:
            yield ""
            continue
        mean = _mean(row[weight])
        text = f"{mean:.1f}" if mean else "diverged"
        text = f"*{text}*" if len(row[weight]) == 1 else text
        yield f"**{text}**" if weight == best and mean else text


def _alone(choice):
    """Returns a row for each learning rate and weight decay of the student alone."""
    found: dict[tuple[float, float], list] = {}
    for record in choice["tried"]:
        whole = record["epochs"] == choice["settings"]["epochs"]
        if record["name"] == "student" and whole:
            pair = (record["lr"], record["weight_decay"])
            found.setdefault(pair, []).append(record)
    chosen = (choice["alone"]["lr"], choice["alone"]["weight_decay"])
    for pair, records in sorted(found.items()):
        mean = f"{_mean(records):.1f}" if _mean(records) else "diverged"
        mean = f"**{mean}**" if pair == chosen else mean
        yield f"{pair[0]:g}", f"{pair[1]:g}", mean, str(len(records))


def _normalization(name, normalization):
    """Returns a normalization as the table shows it; users' modules are not read."""
    known = name in DISTANCES and "features" not in DISTANCES[name].inputs
    if known or name in PUBLISHED:
        return "–"
    return "raw" if normalization is None else normalization
