"""Renders a study as one HTML file with table, curves, features, time and settings.

``kddm distill`` writes the page as ``report.html``, and ``kddm report FOLDER`` renders
it again from ``results.json`` and ``embedding.json``. The page needs no other files and
works on a phone. Figures are Matplotlib's SVG, and Jinja2 escapes every other string.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kddm_jax.experiment.recipes import defaults
from kddm_jax.experiment.report import curves, table
from kddm_jax.experiment.report.accuracies import spread
from kddm_jax.experiment.report.curves import plt
from kddm_jax.experiment.report.rows import reference, rows
from kddm_jax.experiment.settings import as_json

HERE = Path(__file__).resolve().parent
STATS = {  # statistics of a solver, and the names of their axes
    "converged": "share of steps that converged",
    "iterations": "iterations",
    "marginal_error": "marginal error",
}


# ---------------------------------------------------------------------------
# The parts of the page.


class Solver(NamedTuple):
    """Contains the diagnostics of the solver of a term, formatted as strings.

    Attributes:
      title: title of the run, with the term if it has another name.
      converged: share of converged steps, as mean and in the worst epoch.
      iterations: number of iterations, as mean and in the worst epoch.
      marginal_error: marginal error, as mean and in the worst epoch.
    """

    title: str
    converged: str = ""
    iterations: str = ""
    marginal_error: str = ""


FORMATS = {
    "converged": lambda v: (f"{100 * v.mean():.4g} %", f"{100 * v.min():.4g} %"),
    "iterations": lambda v: (f"{v.mean():.1f}", f"{v.max():.1f}"),
    "marginal_error": lambda v: (f"{v.mean():.2g}", f"{v.max():.2g}"),
}


def _solved(results):
    """Yields ``(row, term, title, statistic)`` of all statistics of solvers."""
    for row in rows(results):
        for key in row.runs[0]["history"][0]:
            term, _, stat = key.rpartition("/")
            if term and stat in STATS:
                title = row.title if term == row.key.name else f"{row.title}, {term}"
                yield row, term, title, stat


def solvers(results: Mapping[str, Any]) -> list[Solver]:
    """Summarizes the diagnostics of the transport solvers.

    Args:
      results: the content of ``results.json``.

    Returns:
      A row for each term that has a solver.
    """
    found = {}
    for row, term, title, stat in _solved(results):
        records = [record for run in row.runs for record in run["history"]]
        values = [r[f"{term}/{stat}"] for r in records if f"{term}/{stat}" in r]
        mean, worst = FORMATS[stat](np.array(values))
        text = mean if mean == worst else f"{mean} ({worst})"
        known = found.get((row.key, term), Solver(title))
        found[row.key, term] = known._replace(**{stat: text})
    return [*found.values()]


def solver_curves(results: Mapping[str, Any]):
    """Plots the diagnostics of solvers by epoch; returns None if there are none."""
    solved = [*_solved(results)]
    if not solved:
        return None
    figure, axes = plt.subplots(1, len(STATS), figsize=(12, 3.6), layout="constrained")
    for one, (stat, name) in zip(axes, STATS.items(), strict=True):
        one.set_prop_cycle(curves.CYCLE)
        for row, term, title, which in solved:
            if which == stat:
                value = lambda record, key=f"{term}/{stat}": record.get(key)
                style = {"label": curves.plain(title), "linewidth": 1.2}
                curves.draw(one, row.runs, value, **style)
        one.set(xlabel="epoch", ylabel=name)
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    converged, _, error = axes
    converged.set_ylim(-0.02, 1.02)
    error.set_yscale("log")
    lines = converged.get_legend_handles_labels()
    figure.legend(*lines, fontsize="small", loc="outside right upper")
    return figure


MOST_NAMED = 20  # largest number of classes in a legend
COLUMNS = 4  # largest number of panels side by side


def features(embedding: Mapping[str, Any]):
    """Draws the features of each network in the plane, with a panel for each network.

    Args:
      embedding: the content of ``embedding.json``.

    Returns:
      The figure.
    """
    labels, shown = np.asarray(embedding["labels"]), embedding["panels"]
    columns = max(1, min(COLUMNS, len(shown)))
    names, lines = embedding["classes"], -(-len(shown) // columns)
    figure, axes = plt.subplots(
        *(lines, columns),
        figsize=(12, 3.2 * lines),
        layout="constrained",
        squeeze=False,
    )
    for one in axes.flat:
        one.set_axis_off()
    dots = {"s": 7, "rasterized": True}  # one picture rather than many elements
    for one, panel in zip(axes.flat, shown, strict=False):
        one.set_axis_on()
        behind = np.asarray(panel["behind"] or np.zeros((0, 2)))
        one.scatter(*behind.T, color="lightgrey", **dots)
        points = np.asarray(panel["points"])
        hues = curves.scatter(one, points, labels, len(names), **dots)
        whose = "the teacher's axes" if len(behind) else "its own axes"
        title = curves.plain(panel["title"])
        one.set_title(f"{title}, {whose}", fontsize="small")
        one.set(xticks=[], yticks=[])
    if shown and len(names) <= MOST_NAMED:
        marks = [
            Line2D([], [], color=hues(i), linestyle="", marker="o", label=label)
            for i, label in enumerate(map(curves.plain, names))
        ]
        figure.legend(handles=marks, fontsize="small", loc="outside right upper")
    return figure


RUN_COLUMNS = (
    *("", "seed", "λ", "accuracy %", "seconds"),
    *("to first step, s", "images/s", "steps skipped"),
)


def _number(value, form):
    return "–" if value is None else form.format(value)


def run_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Makes a row for the teacher, if it was trained, and for every run.

    Args:
      results: the content of ``results.json``.

    Returns:
      Strings, in the order of `RUN_COLUMNS`.
    """
    teacher = results["teacher"]
    listed = [("teacher", "", {**teacher, "seed": 0})] if teacher["timing"] else []
    listed += [
        (row.title, row.key.weight, run) for row in rows(results) for run in row.runs
    ]
    cells = []
    for title, weight, run in listed:
        timing, history = run["timing"], run.get("history") or []
        cells.append(
            (
                title,
                str(run["seed"]),
                weight,
                f"{run['accuracy']:.2f}",
                f"{timing['seconds']:.1f}",
                _number(timing.get("seconds_to_first_step"), "{:.1f}"),
                _number(timing.get("images_per_second"), "{:.0f}"),
                str(sum(record.get("skipped", 0) for record in history)),
            )
        )
    return cells


def _setting(value):
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def settings_rows(settings: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Returns each setting, its value, and whether it differs from the recipe."""
    plain = as_json(defaults(settings["dataset"], settings["recipe"]))
    text = json.dumps  # the same for lists and tuples; unknown settings are unchanged
    changed = lambda name, value: text(plain.get(name, value)) != text(value)
    return [(name, _setting(v), changed(name, v)) for name, v in settings.items()]


def environment_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Describes machine and software of the runs; lists all values if they differ."""
    made = [run["environment"] for run in [*results["runs"], results["teacher"]]]
    made = [environment for environment in made if environment]
    names = [name for name in made[0] if name != "command"]
    values = lambda name: sorted({str(e[name]) for e in made if name in e})
    return [(name.replace("_", " "), ", ".join(values(name))) for name in names]


def _summary(results):
    """Returns title and accuracy of student, teacher and the best distilled student."""
    found = rows(results)
    alone, distilled = reference(found), [row for row in found if not row.alone]
    name = "student alone" if alone.key.name == "student" else alone.title
    cards = [
        (name, spread([*alone.accuracy.values()])),
        ("teacher", f"{results['teacher']['accuracy']:.2f}"),
    ]
    if distilled:
        best = max(distilled, key=lambda row: row.mean)
        some = f", highest of {len(distilled)}" if len(distilled) > 1 else ""
        cards.append((f"{best.title}{some}", spread([*best.accuracy.values()])))
    return cards


def render(
    results: Mapping[str, Any], embedding: Mapping[str, Any] | None = None
) -> str:
    """Renders the page.

    Args:
      results: the content of ``results.json``.
      embedding: the content of ``embedding.json``; None draws no features.

    Returns:
      The HTML of the page, which needs no other files.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    picture = lambda figure: figure and Markup(curves.svg(figure))
    shown = features(embedding) if embedding and embedding["panels"] else None
    return environment.get_template("report.html.jinja").render(
        settings=results["settings"],
        conditions=table.conditions(results),
        command=table.command_of(results),
        notes=table.notes(results),
        columns=table.columns(results),
        rows=table.table(results),
        cards=_summary(results),
        curves=picture(curves.of_runs(results)),
        embedding=embedding,
        method=embedding and embedding["made_of"]["method"],
        features=picture(shown),
        run_columns=RUN_COLUMNS,
        run_rows=run_rows(results),
        solver_rows=solvers(results),
        solver_curves=picture(solver_curves(results)),
        environment=environment_rows(results),
        settings_rows=settings_rows(results["settings"]),
    )


def write(
    results: Mapping[str, Any], embedding: Mapping[str, Any] | None, out: Path
) -> None:
    """Writes ``report.html``."""
    (out / "report.html").write_text(render(results, embedding), encoding="utf-8")
