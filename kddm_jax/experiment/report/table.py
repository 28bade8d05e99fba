"""Renders tables of results in the terminal and in Markdown.

As in KD2M, the table has a row for the student, one for the teacher, and one for each
distance, with mean and standard deviation over seeds and the share of the gap between
student and teacher that a distance closes. The difference to the student alone is
paired by seed and has a confidence interval. All accuracies are those after the last
epoch. Everything is rendered from the JSON of the runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kddm_jax.experiment.recipes import defaults
from kddm_jax.experiment.report.accuracies import (
    CONFIDENCE,
    difference,
    gap_closed,
    spread,
)
from kddm_jax.experiment.report.rows import Row, all_unlabelled, reference, rows
from kddm_jax.experiment.settings import FILES, PLACES, as_json, renamed

COLUMNS = (
    *("", "accuracy %", "top-5 %", "difference to alone", "gap closed"),
    *("λ", "normalization", "learning rate", "weight decay", "seeds", "seconds"),
)
TITLES = 20  # narrowest column of titles on a terminal, in characters


def columns(results: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the table's columns, those of `COLUMNS` that it needs."""
    found = rows(results)
    keys = [row.key for row in found]
    needed = {
        "top-5 %": any(_top5(row) for row in found),
        "normalization": len({key.normalization for key in keys} - {""}) > 1,
        "learning rate": len({key.rate for key in keys} - {""}) > 1,
        "weight decay": len({key.decay for key in keys} - {""}) > 1,
    }
    return tuple(c for c in COLUMNS if needed.get(c, True))


def _top5(row):
    """Returns a row's top-5 accuracy; "" if runs have none, as with few classes."""
    found = [run["top5"] for run in row.runs if "top5" in run]
    return spread(found) if len(found) == len(row.runs) else ""


def _compared(row, alone, results):
    """Compares a row with the student alone: its difference, and the gap it closes."""
    if row is alone:
        return {}
    found = difference(row.accuracy, alone.accuracy)
    cells = {"difference to alone": str(found or "–")}
    if not row.alone:
        closed = found and gap_closed(
            alone.mean + found.mean,
            [*alone.accuracy.values()],
            results["teacher"]["accuracy"],
            results["eval_images"],
        )
        cells["gap closed"] = "–" if closed is None else f"{round(closed)} %"
    return cells


def _cells(row: Row, alone: Row, results) -> dict[str, str]:
    """Returns the cells of a row by column."""
    return {
        "": row.title,
        "accuracy %": spread([*row.accuracy.values()]),
        "top-5 %": _top5(row),
        **_compared(row, alone, results),
        "λ": row.key.weight,
        "normalization": row.key.normalization,
        "learning rate": row.key.rate,
        "weight decay": row.key.decay,
        "seeds": str(len(row.runs)),
        "seconds": f"{np.mean([run['timing']['seconds'] for run in row.runs]):.0f}",
    }


def table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Makes the table's rows: students alone, the teacher, and the methods.

    Args:
      results: the content of ``results.json``, or several of them, merged by
        `rows.merge`.

    Returns:
      Rows of strings, in the order of `columns`.
    """
    teacher, found = results["teacher"], rows(results)
    alone = reference(found)
    spent = teacher["timing"] and teacher["timing"]["seconds"]
    cells = [_cells(row, alone, results) for row in found]
    cells.insert(
        sum(row.alone for row in found),
        {
            "": "teacher",
            "accuracy %": f"{teacher['accuracy']:.2f}",
            "top-5 %": f"{teacher['top5']:.2f}" if "top5" in teacher else "",
            "seconds": f"{spent:.0f}" if spent is not None else "",
        },
    )
    return [tuple(row.get(c, "") for c in columns(results)) for row in cells]


def markdown(results: Mapping[str, Any]) -> str:
    """Renders the table and its caption as Markdown.

    Args:
      results: the content of ``results.json``; several of them, merged by
        `rows.merge`; or results of another command with ``columns``, ``rows``,
        ``caption`` and ``command``, or with several ``tables`` of these and one
        ``command``.

    Returns:
      The table, an empty line and the caption, for one table after the other.
    """
    if "tables" in results:
        *first, last = results["tables"]
        last = {**last, "command": results["command"]}
        return "\n".join(markdown(one) for one in (*first, last))
    if "rows" in results:
        names, cells = results["columns"], results["rows"]
        made_by = f" `{results['command']}`" if "command" in results else ""
        below = results["caption"] + made_by
    else:
        names, cells, below = columns(results), table(results), caption(results)
    lines = [
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
        *("| " + " | ".join(row) + " |" for row in cells),
    ]
    return "\n".join(lines) + "\n\n" + below + "\n"


def caption(results: Mapping[str, Any]) -> str:
    """Describes the measurement and how to read it, and lists its commands."""
    text = " ".join([conditions(results), *notes(results)])
    studies = results.get("studies", [results])
    made_by = [f"`{command_of(study)}`" for study in studies]
    if len(made_by) == 1:
        return f"{text} {made_by[0]}"
    return "\n".join([text, "", *(f"- {one}" for one in made_by)])


def notes(results: Mapping[str, Any]) -> list[str]:
    """Says in sentences what the table's differences and intervals mean."""
    found = rows(results)
    alone, compared = reference(found), len(found) > 1
    sentences = []
    if compared:
        counts = [len(row.runs) for row in found if row.alone]
        best = ", the best student alone" if len(counts) > 1 else ""
        best += " of those with the most seeds" if len({*counts}) > 1 else ""
        title = f'"{alone.title}"'
        sentences.append(f'Differences and "gap closed" refer to {title}{best}.')
    if max(len(row.runs) for row in found) == 1:
        return [*sentences, *(["One seed gives no interval."] if compared else [])]
    brackets = (
        f"; brackets are {100 * CONFIDENCE:.0f} % intervals of the mean difference, "
        "paired by seed (Student's t)"
    )
    sentences.append(
        f"± is the standard deviation over seeds{brackets if compared else ''}."
    )
    return [*sentences, _shared(results)]


def _shared(results):
    """Says what the seeds of a study share; they differ in what is drawn in training.

    The images and their fixed views are drawn by seed 0 in every run.
    """
    settings = results["settings"]
    names = ("student_images", "train_images")  # later ones are those of the teacher
    known = [results.get(names[0]), *(settings.get(name) for name in names)]
    count = next((f"{number} " for number in known if number), "")
    views = f" in {settings['views']} fixed views" if settings.get("views") else ""
    start = (
        "the same pretrained weights, " if settings.get("pretrained_student") else ""
    )
    part = "held-out" if settings["held_out"] else "test"
    return (
        f"All seeds share one teacher, {start}the same {count}labelled images{views} "
        f"and the same {part} images, so intervals do not cover other teachers or "
        "other samples."
    )


def conditions(results: Mapping[str, Any]) -> str:
    """Describes networks, data and machine of the table's measurement."""
    settings, teacher = results["settings"], results["teacher"]
    # A repeated command reuses finished runs, so each run has its own environment.
    made = [run["environment"] for run in [*results["runs"], teacher]]
    made = [environment for environment in made if environment]
    part = "held-out training" if settings["held_out"] else "test"
    more = all_unlabelled(rows(results))
    more = f"distilled students also see {more}; " if more else ""
    counts = sorted({len(row.runs) for row in rows(results)})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    names = (teacher["model"], settings["student_model"])
    widths = (teacher["width"], settings["width"])
    scaled = [name.startswith(("ResNet", "WRN", "VGG")) for name in names]
    pair = [
        f"{name} (width {width})" if of_width else name
        for name, width, of_width in zip(names, widths, scaled, strict=True)
    ]
    stemmed = {"ResNet9", "ResNet18", "ResNet34"} & {*names}
    stem = f", {settings['stem']} stem" if stemmed else ""
    return (
        f"{settings['dataset']}, recipe {settings['recipe']}: "
        f"{pair[0]} to {pair[1]}{stem}; accuracy after the last epoch on "
        f"{results['eval_images']} {part} images; {seeds} seed"
        f"{'' if seeds == '1' else 's'}; {more}"
        f"{_all(made, 'device_count')} × {_all(made, 'device')}, "
        f"JAX {_all(made, 'jax')}, {_sources(made)}."
    )


def command_of(results: Mapping[str, Any]) -> str:
    """Returns the command that made the results, without the machine's folders."""
    made = results.get("environment", {}).get("command", "")
    installed = made.startswith("kddm ")
    program = "kddm distill" if installed else "python experiments/cifar.py"
    return command(results["settings"], program)


def command(
    settings: Mapping[str, Any], program: str, plain: Mapping[str, Any] | None = None
) -> str:
    """Returns a program's command line with these settings.

    Args:
      settings: settings as JSON values.
      program: start of the command line.
      plain: the program's defaults as JSON values; None uses those of the recipe.
    """
    settings = renamed(settings)
    plain = plain or as_json(defaults(settings["dataset"], settings["recipe"]))
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
        elif name == "teacher":  # the last parts of its path say nothing
            words.append("CHECKPOINT")
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


def _widths(names, cells, most):
    """Returns the widths of columns, in characters.

    If the table is too wide, names and titles are broken, but never numbers.
    """
    longest = lambda texts: max(map(len, texts))
    by_column = [*zip(*cells, strict=True)]
    whole = [longest([n, *c]) for n, c in zip(names, by_column, strict=True)]
    frame = 3 * len(names) + 1
    if sum(whole) + frame <= most:
        return whole, sum(whole) + frame
    numbers = zip(names[1:], by_column[1:], strict=True)
    narrow = [longest([*name.split(), *column]) for name, column in numbers]
    title = min(whole[0], max(TITLES, most - sum(narrow) - frame))
    return [title, *narrow], title + sum(narrow) + frame


def show(results: Mapping[str, Any], console: Console) -> None:
    """Prints the table on a terminal, and what its numbers mean."""
    names, cells = columns(results), table(results)
    widths, total = _widths(names, cells, console.width)
    view = Table(title=results["settings"]["dataset"], width=total)
    for number, (name, width) in enumerate(zip(names, widths, strict=True)):
        view.add_column(name, width=width, justify="right" if number else "left")
    for row in cells:
        view.add_row(*map(Text, row))
    console.print(view, soft_wrap=True)
    for line in notes(results):
        console.print(line, soft_wrap=True)


# Accuracy on its training images, in percent, below which a teacher does not fit them.
# Quality compares how far the layers separate the classes of training images, and a
# teacher below this has not separated them in any layer.
FITTED = 90.0


def show_quality(record: dict[str, Any], console: Console) -> None:
    """Prints the quality of the teacher's layers; those chosen are marked.

    Args:
      record: the content of ``quality.json``.
      console: console that prints the table, and a warning if the teacher does not fit
        its training images.
    """
    columns = ("layer", *"SIEQ", "probe %", "followed by")
    view = Table(*columns, title="knowledge quality")
    followers = {pair.split(":")[1]: pair.split(":")[0] for pair in record["pairs"]}
    for layer, quality in record["layers"].items():
        numbers = [f"{quality[letter]:.3f}" for letter in "SIEQ"]
        probe = f"{quality['probe']:.1f}" if "probe" in quality else "–"
        view.add_row(layer, *numbers, probe, followers.get(layer, ""))
    console.print(view)
    accuracy = record.get("teacher_accuracy", FITTED)
    if accuracy < FITTED:
        console.print(
            f"warning: the teacher classifies {accuracy:.1f} % of its training images "
            f"correctly, below {FITTED:g} %, so the quality of its layers says little; "
            "train it longer, or name the pairs by --layers",
            soft_wrap=True,
        )
