"""Implements ``kddm distill``, which trains teacher and students and prints a table."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from kddm_jax.experiment import study
from kddm_jax.experiment.machine import processes, records
from kddm_jax.experiment.machine.terminal import answer_errors, console
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.report import table
from kddm_jax.experiment.report.rows import reference, rows
from kddm_jax.experiment.settings import Settings, as_json


def run_all(settings: Settings, console: Console) -> dict[str, Any]:
    """Trains the runs of a study and writes, prints and returns their results.

    Args:
      settings: the settings of the command.
      console: console that prints the lines.

    Returns:
      The results, as in ``results.json``.
    """
    began = time.monotonic()
    with study.open(settings, console) as opened:
        results = []
        for run in opened.runs:
            results.append(opened.train(run))
            opened.say(f"{run.label}: {results[-1]['accuracy']:.2f} %")
        summary = _summary(opened, results, time.monotonic() - began)
        out = opened.problem.out
        processes.first(lambda: write(summary, out))
        processes.first(lambda: _write_page(opened, summary))
    table.show(summary, console)
    _warn_of_weak_teacher(summary, console)
    console.print(f"{out}/report.html, results.json, table.md, curves.png")
    return summary


def _summary(opened, results, seconds):
    problem, teacher = opened.problem, opened.teacher
    trained = teacher.result
    return {
        "settings": as_json(problem.settings),
        "student_images": len(problem.parts.student),
        "eval_images": len(problem.parts.eval_labels),
        "teacher": {
            "model": teacher.name,
            "width": teacher.width,
            "accuracy": teacher.accuracy,
            **({} if teacher.top5 is None else {"top5": teacher.top5}),
            "best_accuracy": trained and trained["best_accuracy"],
            "digest": teacher.digest,
            "pretrained": trained and trained["settings"].get("pretrained"),
            "history": trained and trained["history"],
            "timing": trained and trained["timing"],
            "environment": trained and trained["environment"],
        },
        "runs": results,
        "environment": records.environment(problem.devices),
        "timing": {"seconds": seconds},
    }


def write(results: dict[str, Any], out: Path) -> None:
    """Writes ``results.json``, ``table.md`` and ``curves.png``."""
    # Matplotlib is slow to import, so it is imported only if there is a plot to draw.
    from kddm_jax.experiment.report import curves

    records.write_json(out / "results.json", results)
    (out / "table.md").write_text(table.markdown(results))
    curves.save(curves.of_runs(results), out / "curves.png")


def _write_page(opened, summary):
    # scikit-learn's manifolds, Jinja2 and Matplotlib are slow to import, too.
    from kddm_jax.experiment.report import embedding, page

    problem, results = opened.problem, summary["runs"]
    page.write(summary, embedding.find(problem, opened.teacher, results), problem.out)


def _warn_of_weak_teacher(summary, console):
    teacher = summary["teacher"]["accuracy"]
    alone = reference(rows(summary)).mean
    if teacher <= alone:
        paper = (
            " The paper recipe needs ImageNet weights (--pretrained-teacher, "
            "--pretrained-student); without them use --recipe strong."
        )
        console.print(
            f"The teacher ({teacher:.2f} %) is no better than the student "
            f"alone ({alone:.2f} %): there is nothing to distil."
            f"{paper if summary['settings']['recipe'] == 'paper' else ''}"
        )


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""

    def work():
        settings = parse(arguments)
        run = settings.run
        processes.start(run.coordinator, run.processes, run.process)
        run_all(settings, console())

    return answer_errors(work)
