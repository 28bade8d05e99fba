"""Renders tables of results in the terminal and in Markdown.

As in KD2M, the table has a row for the student, one for the teacher, and one for each
distance, with mean and standard deviation over seeds and the share of the gap between
student and teacher that a distance closes. Everything is rendered from the JSON of the
runs.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kddm_jax.experiment.recipes import defaults
from kddm_jax.experiment.settings import FILES, PLACES, as_json, renamed

COLUMNS = ("", "last epoch %", "best epoch %", "gap closed", "λ", "seconds")


def _standard_error(accuracies, images):
    """Computes the error of a mean accuracy, over seeds or binomial for one run."""
    mean = float(np.mean(accuracies))
    if len(accuracies) > 1:
        return float(np.std(accuracies, ddof=1)) / math.sqrt(len(accuracies))
    return math.sqrt(max(mean * (100 - mean), 0.0) / images)


def gap_closed(
    accuracy: float,
    student: Sequence[float],
    teacher: float,
    images: int,
) -> float | None:
    """Computes the share of the gap from student to teacher, in percent.

    Args:
      accuracy: accuracy of the distilled student, in percent.
      student: accuracies of the student alone, one per seed.
      teacher: accuracy of the teacher.
      images: number of images that the accuracies were measured on.

    Returns:
      ``100 (accuracy - student) / (teacher - student)``, or None if the gap is not
      larger than two standard errors, because a share of it would mean nothing.
    """
    gap = teacher - float(np.mean(student))
    error = math.hypot(
        _standard_error(student, images), _standard_error([teacher], images)
    )
    if gap <= 2 * error:
        return None
    return 100 * (accuracy - float(np.mean(student))) / gap


def _spread(values):
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Makes the table's rows.

    Args:
      results: the content of ``results.json``.

    Returns:
      Rows of strings, in the order of `COLUMNS`.
    """
    teacher, images = results["teacher"], results["eval_images"]
    runs: dict[str, list[dict]] = {}
    for run in results["runs"]:
        runs.setdefault(run["name"], []).append(run)
    alone = [run["accuracy"] for run in runs["student"]]
    spent = teacher["timing"] and teacher["timing"]["seconds"]
    trained = teacher["best_accuracy"] is not None
    rows = []
    for name, group in runs.items():
        last = [run["accuracy"] for run in group]
        closed = gap_closed(float(np.mean(last)), alone, teacher["accuracy"], images)
        distilled = name != "student"
        rows.append(
            (
                group[0]["title"],
                _spread(last),
                _spread([run["best_accuracy"] for run in group]),
                f"{closed:.0f} %" if distilled and closed is not None else "–",
                f"{group[0]['weight']:g}" if distilled else "",
                f"{np.mean([run['timing']['seconds'] for run in group]):.0f}",
            )
        )
    row = (
        "teacher",
        f"{teacher['accuracy']:.2f}",
        f"{teacher['best_accuracy']:.2f}" if trained else "",
        "",
        "",
        f"{spent:.0f}" if spent is not None else "",
    )
    return [rows[0], row, *rows[1:]]


def markdown(results: Mapping[str, Any]) -> str:
    """Renders the table and its caption as Markdown.

    Args:
      results: the content of ``results.json``, or results of another command with
        ``columns``, ``rows``, ``caption`` and ``command``, or with several ``tables``
        of these and one ``command``.

    Returns:
      The table, an empty line and the caption, for one table after the other.
    """
    if "tables" in results:
        *first, last = results["tables"]
        last = {**last, "command": results["command"]}
        return "\n".join(markdown(one) for one in (*first, last))
    if "rows" in results:
        columns, rows = results["columns"], results["rows"]
        made_by = f" `{results['command']}`" if "command" in results else ""
        below = results["caption"] + made_by
    else:
        columns, rows, below = COLUMNS, table(results), caption(results)
    lines = [
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n\n" + below + "\n"


def caption(results: Mapping[str, Any]) -> str:
    """Describes the conditions of the table's measurement, and its command."""
    return f"{conditions(results)} `{command_of(results)}`"


def conditions(results: Mapping[str, Any]) -> str:
    """Describes networks, data and machine of the table's measurement."""
    settings, teacher = results["settings"], results["teacher"]
    # A repeated command reuses finished runs, so each run has its own environment.
    made = [run["environment"] for run in [*results["runs"], teacher]]
    made = [environment for environment in made if environment]
    part = "held-out training" if settings["held_out"] else "test"
    seeds = len(settings["seeds"])
    names = (teacher["model"], settings["student_model"])
    widths = (teacher["width"], settings["width"])
    residual = [name.startswith("ResNet") for name in names]
    pair = [
        f"{name} (width {width})" if of_width else name
        for name, width, of_width in zip(names, widths, residual, strict=True)
    ]
    stem = f", {settings['stem']} stem" if any(residual) else ""
    return (
        f"{settings['dataset']}, recipe {settings['recipe']}: "
        f"{pair[0]} to {pair[1]}{stem}; accuracy on "
        f"{results['eval_images']} {part} images; {seeds} seed"
        f"{'s' if seeds > 1 else ''}; "
        f"{_all(made, 'device_count')} × {_all(made, 'device')}, "
        f"JAX {_all(made, 'jax')}, {_sources(made)}."
    )


def command_of(results: Mapping[str, Any]) -> str:
    """Returns the command that made the results, without the machine's folders."""
    made = results.get("environment", {}).get("command", "")
    installed = made.startswith("kddm ")
    program = "kddm distill" if installed else "python experiments/cifar.py"
    return command(results["settings"], program)


def command(settings: Mapping[str, Any], program: str) -> str:
    """Returns a program's command line with these settings."""
    settings = renamed(settings)
    plain = as_json(defaults(settings["dataset"], settings["recipe"]))
    words = [program, "--dataset", settings["dataset"]]
    if settings["recipe"] != "laptop":
        words += ["--recipe", settings["recipe"]]
    for name, value in settings.items():
        known = name in plain  # not a setting of an earlier version
        if not known or name in PLACES or _plain(value) == _plain(plain[name]):
            continue
        option = name.replace("_", "-")
        words.append(f"--no-{option}" if value is False else f"--{option}")
        if isinstance(value, bool):
            continue
        if isinstance(value, dict):
            words += [str(part) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple):
            words += [str(part) for part in value]
        elif name in FILES:
            words.append(Path(value).name)
        else:
            words.append(str(value))
    return " ".join(words)


def _plain(value):
    """Returns a value in the form that JSON reads."""
    return list(value) if isinstance(value, tuple) else value


def machine(environments: Sequence[Mapping[str, Any]]) -> str:
    """Describes the devices and the software of some runs."""
    return (
        f"{_all(environments, 'device')}, JAX {_all(environments, 'jax')}, "
        f"{_sources(environments)}"
    )


def _sources(environments):
    """Describes the commits, or the versions of an installed package."""
    found = _all(environments, "commit")
    return found if found.startswith("version ") else f"commit {found}"


def _all(environments, name):
    return ", ".join(sorted({str(environment[name]) for environment in environments}))


def show(results: Mapping[str, Any], console: Console) -> None:
    """Prints the table on a terminal."""
    view = Table(*COLUMNS, title=results["settings"]["dataset"])
    for column in view.columns[1:]:
        column.justify = "right"
    for row in table(results):
        view.add_row(*row)
    console.print(view)


def show_quality(record: dict[str, Any], console: Console) -> None:
    """Prints the quality of the teacher's layers; those chosen are marked."""
    view = Table("layer", "S", "I", "E", "Q", "followed by", title="knowledge quality")
    followers = {pair.split(":")[1]: pair.split(":")[0] for pair in record["pairs"]}
    for layer, quality in record["layers"].items():
        numbers = [f"{quality[letter]:.3f}" for letter in "SIEQ"]
        view.add_row(layer, *numbers, followers.get(layer, ""))
    console.print(view)
