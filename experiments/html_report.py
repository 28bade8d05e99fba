"""One page per command: table, curves, features, time, settings, in a single file.

    python experiments/html_report.py runs/digits-laptop

`cifar.py` writes it as ``report.html``; this renders it again from a folder's
``results.json`` and ``embedding.json``.  It opens without a network, on a phone and in
the dark: figures are SVG drawn by the template, whose engine escapes every string.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import report
from charts import COLOURS, Chart, Series, chart, style
from records import read_json

HERE = Path(__file__).resolve().parent
STATS = {  # of a solver: the title of its chart, and the axis
    "converged": ("share of steps that converged", {"limits": (0.0, 1.0)}),
    "iterations": ("iterations", {}),
    "marginal_error": ("marginal error", {"log": True}),
}


# ---------------------------------------------------------------------------
# What the page shows.


def _groups(results) -> dict[str, list[Mapping]]:
    """Runs by name, students alone first."""
    groups: dict[str, list[Mapping]] = {}
    for run in results["runs"]:
        groups.setdefault(run["name"], []).append(run)
    return groups


def _styles(groups) -> dict[str, str]:
    """CSS classes by the name of the runs."""
    distances = [name for name in groups if name != "student"]
    found = {name: style(i) for i, name in enumerate(distances)}
    return {"student": "alone", "teacher": "teacher", **found}


def _series(groups, styles, value) -> list[Series]:
    """Of every name with ``value(record, name)``, over its epochs and seeds."""
    found = []
    for name, runs in groups.items():
        rows = [
            [
                (r["epoch"], v)
                for r in run["history"]
                if (v := value(r, name)) is not None
            ]
            for run in runs
        ]
        if rows[0] and len({len(row) for row in rows}) == 1:
            epochs = [epoch for epoch, _ in rows[0]]
            values = np.array([[v for _, v in row] for row in rows], float)
            found.append(Series(runs[0]["title"], styles[name], epochs, values))
    return found


def curves(results: Mapping[str, object]) -> list[Chart]:
    """Accuracy on evaluation images, cross-entropy and distance of every epoch.

    Args:
      results: as in ``results.json``.

    Returns:
      The charts that there is anything for.
    """
    groups, teacher = _groups(results), results["teacher"]
    styles = _styles(groups)
    taught = {}
    if teacher.get("history"):
        taught["teacher"] = [{"title": "teacher", "history": teacher["history"]}]
    every = {**taught, **groups}
    accuracy = _series(every, styles, lambda r, _: r.get("test_accuracy"))
    epochs = [r["epoch"] for runs in every.values() for r in runs[0]["history"]]
    if epochs:
        level = np.full((1, 2), teacher["accuracy"])
        ends = [min(epochs), max(epochs)]
        accuracy.append(Series("teacher, at its end", "teacher level", ends, level))
    followers = {name: runs for name, runs in groups.items() if name != "student"}
    distances = _series(followers, styles, report.distance_of)
    shares = [s._replace(values=s.values / s.values[:, :1]) for s in distances]
    charts = (
        chart("accuracy on evaluation images, %", accuracy),
        chart(
            "training cross-entropy",
            _series(every, styles, lambda r, _: r.get("task")),
            log=True,
        ),
        chart("distance, as a share of the first epoch's", shares, log=True),
    )
    return [c for c in charts if c is not None]


class Solver(NamedTuple):
    """What the solver of a term said.

    Attributes:
      title: of the run and, where they differ, the term.
      converged: mean share of steps, and of the worst epoch.
      iterations: mean, and of the worst epoch.
      marginal_error: mean, and of the worst epoch.
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


def solvers(
    results: Mapping[str, object],
) -> tuple[list[Solver], list[tuple[str, str]], list[Chart]]:
    """What the solvers of transport said, epoch by epoch.

    Args:
      results: as in ``results.json``.

    Returns:
      A row for each term that has a solver; title and style of each line; a chart
      for each of `STATS`.
    """
    groups = _groups(results)
    styles, rows, drawn = _styles(groups), {}, {stat: [] for stat in STATS}
    legend = {}
    for name, runs in groups.items():
        keys = [key for key in runs[0]["history"][0] if "/" in key]
        for key in keys:
            term, _, stat = key.rpartition("/")
            series = _series({name: runs}, styles, lambda r, _, key=key: r.get(key))
            if stat not in STATS or not series:
                continue
            (one,) = series
            title = one.title if term == name else f"{one.title}, {term}"
            mean, worst = FORMATS[stat](one.values)
            row = rows.setdefault((name, term), Solver(title))
            text = mean if mean == worst else f"{mean} ({worst})"
            rows[name, term] = row._replace(**{stat: text})
            drawn[stat].append(one._replace(title=title))
            legend[title] = one.style
    charts = [chart(title, drawn[s], **axis) for s, (title, axis) in STATS.items()]
    return [*rows.values()], [*legend.items()], [c for c in charts if c is not None]


class Panel(NamedTuple):
    """A picture of features, in pixels.

    Attributes:
      title: of the network.
      axes: whose.
      behind: the teacher's points, an SVG path, or "".
      classes: style and points, an SVG path, of each class.
    """

    title: str
    axes: str
    behind: str
    classes: list[tuple[str, str]]


SIDE, MARGIN = 260, 8


def class_style(index: int, count: int) -> str:
    """The ``style`` attribute of a class's colour."""
    if count <= COLOURS:
        return f"stroke: var(--c{index})"
    return f"stroke: hsl({360 * index / count:.0f} 60% var(--lightness))"


def _path(points, low, high):
    """A dot for each, a line without length; low to high fill the panel, each axis."""
    share = (points - (low + high) / 2) / np.maximum(high - low, 1e-30)
    share = share * [1, -1]  # up is up
    return "".join(
        f"M{x:.1f} {y:.1f}h0" for x, y in SIDE / 2 + (SIDE - 2 * MARGIN) * share
    )


def panels(embedding: Mapping[str, object]) -> list[Panel]:
    """Lays the features of each network out.

    Args:
      embedding: as in ``embedding.json``.

    Returns:
      A panel for each.
    """
    labels, found = np.asarray(embedding["labels"]), []
    count = len(embedding["classes"])
    for panel in embedding["panels"]:
        points = np.asarray(panel["points"])
        behind = np.asarray(panel["behind"] or np.zeros((0, 2)))
        both = np.concatenate([points, behind])
        low, high = both.min(0), both.max(0)
        classes = [
            (class_style(c, count), _path(points[labels == c], low, high))
            for c in range(count)
            if (labels == c).any()
        ]
        axes = "the teacher's axes" if len(behind) else "its own axes"
        path = _path(behind, low, high)
        found.append(Panel(panel["title"], axes, path, classes))
    return found


RUN_COLUMNS = (
    *("", "seed", "λ", "last %", "best %", "best epoch", "seconds"),
    *("to first step, s", "images/s", "steps skipped"),
)


def _number(value, form):
    return "–" if value is None else form.format(value)


def run_rows(results: Mapping[str, object]) -> list[tuple[str, ...]]:
    """A row for the teacher, if it was trained, and for every run.

    Args:
      results: as in ``results.json``.

    Returns:
      Strings, in the order of `RUN_COLUMNS`.
    """
    teacher = results["teacher"]
    made = [{**teacher, "title": "teacher", "seed": 0, "weight": 0, "name": "teacher"}]
    rows = []
    for run in [*(made if teacher["timing"] else []), *results["runs"]]:
        timing, history = run["timing"], run.get("history") or []
        alone = run["name"] in ("teacher", "student")
        rows.append(
            (
                run["title"],
                str(run["seed"]),
                "" if alone else f"{run['weight']:g}",
                f"{run['accuracy']:.2f}",
                f"{run['best_accuracy']:.2f}",
                _number(run.get("best_epoch"), "{}"),
                f"{timing['seconds']:.1f}",
                _number(timing.get("seconds_to_first_step"), "{:.1f}"),
                _number(timing.get("images_per_second"), "{:.0f}"),
                str(sum(record.get("skipped", 0) for record in history)),
            )
        )
    return rows


def _setting(value):
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def settings_rows(settings: Mapping[str, object]) -> list[tuple[str, str, bool]]:
    """Every setting: name, value, whether it is another than the recipe's."""
    from settings import as_json, defaults

    plain = as_json(defaults(settings["dataset"], settings["recipe"]))
    same = lambda name: json.dumps(settings[name]) == json.dumps(plain.get(name))
    return [(name, _setting(v), not same(name)) for name, v in settings.items()]


def environment_rows(results: Mapping[str, object]) -> list[tuple[str, str]]:
    """What the runs were made with; several values where they differ."""
    made = [run["environment"] for run in [*results["runs"], results["teacher"]]]
    made = [environment for environment in made if environment]
    names = [name for name in made[0] if name != "command"]
    values = lambda name: sorted({str(e[name]) for e in made if name in e})
    return [(name.replace("_", " "), ", ".join(values(name))) for name in names]


def _summary(results, rows):
    """Title and accuracy: student, teacher, the best of the distilled."""
    student, teacher, *distilled = [(row[0], row[1]) for row in rows]
    cards = [("student alone", student[1]), teacher]
    if distilled:
        best = max(distilled, key=lambda row: float(row[1].split()[0]))
        some = f", highest of {len(distilled)}" if len(distilled) > 1 else ""
        cards.append((f"{best[0]}{some}", best[1]))
    return cards


def render(
    results: Mapping[str, object], embedding: Mapping[str, object] | None = None
) -> str:
    """Renders the page.

    Args:
      results: as in ``results.json``.
      embedding: as in ``embedding.json``; None: no picture of features.

    Returns:
      HTML, one file that needs no other.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups, rows = _groups(results), report.table(results)
    styles, (solver_rows, solver_legend, solver_charts) = (
        _styles(groups),
        solvers(results),
    )
    names = [*groups][:1] + ["teacher"] + [*groups][1:]
    titles = {"teacher": "teacher", **{n: g[0]["title"] for n, g in groups.items()}}
    classes = embedding["classes"] if embedding else []
    return environment.get_template("report.html.jinja").render(
        settings=results["settings"],
        conditions=report.conditions(results),
        command=report.command(results["settings"]),
        columns=report.COLUMNS,
        rows=rows,
        cards=_summary(results, rows),
        legend=[(titles[name], styles[name]) for name in names],
        several_seeds=any(len(runs) > 1 for runs in groups.values()),
        curves=curves(results),
        embedding=embedding,
        method=embedding and embedding["made_of"]["method"],
        panels=panels(embedding) if embedding else [],
        classes=[(c, class_style(i, len(classes))) for i, c in enumerate(classes)],
        side=SIDE,
        run_columns=RUN_COLUMNS,
        run_rows=run_rows(results),
        solver_rows=solver_rows,
        solver_legend=solver_legend,
        solver_charts=solver_charts,
        environment=environment_rows(results),
        settings_rows=settings_rows(results["settings"]),
    )


def write(
    results: Mapping[str, object], embedding: Mapping[str, object] | None, out: Path
) -> None:
    """Writes ``report.html``."""
    (out / "report.html").write_text(render(results, embedding), encoding="utf-8")


def main(folders: Sequence[str]) -> int:
    """Renders the pages of folders of runs anew; returns the exit status."""
    from cifar import answer_errors  # which imports this module

    def work():
        for folder in map(Path, folders):
            known = (folder / "embedding.json").exists()
            embedding = read_json(folder / "embedding.json") if known else None
            write(read_json(folder / "results.json"), embedding, folder)
            print(folder / "report.html")

    return answer_errors(work)


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
