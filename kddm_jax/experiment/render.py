"""Implements the command ``kddm report``, which renders results again from their JSON.

    kddm report runs/digits-laptop
    kddm report experiments/results/cifar10-paper.json
    kddm report runs/raw runs/unit
    kddm report experiments/README.md

For a folder of ``kddm distill``, the command writes table, curves and page again. For
several folders, for a folder of ``kddm choose-weights``, or for JSON files, it prints
one table of all and writes nothing. In a Markdown page, it replaces the marked tables.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from kddm_jax.experiment import distill
from kddm_jax.experiment.finished import results_of
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.machine.records import read_json
from kddm_jax.experiment.machine.terminal import answer_errors
from kddm_jax.experiment.report import table, weights
from kddm_jax.experiment.report.rows import merge

ABOUT = "Renders a finished study again, or prints one table of several."
RESULTS = "results.json"
BLOCK = re.compile(r"(<!-- table: ([^>]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def _file(path):
    """Returns the JSON file of a study's folder, or the file itself."""
    if path.suffix == ".json":
        return path
    if not (path / RESULTS).exists() and (path / "weights.json").exists():
        return path / "weights.json"
    return results_of(path)


def _is_table(results):
    """Returns whether these are results of a command that makes tables."""
    kinds = (
        {"tables", "command"},
        {"columns", "rows"},
        {"runs", "teacher", "settings"},
    )
    return isinstance(results, dict) and any(kind <= {*results} for kind in kinds)


def _rendered(paths):
    files = [read_json(path) for path in paths]
    for path, results in zip(paths, files, strict=True):
        if "held_out_accuracy" in results:
            raise UserError(
                f"{path} is a grid of version 0.2.0; render it with that version, or "
                "run kddm choose-weights again with another --out"
            )
    if all(map(weights.is_choice, files)):
        return weights.markdown(files)
    if len(files) == 1 and _is_table(files[0]):
        return table.markdown(files[0])
    if len(files) == 1:
        raise UserError(
            f"{paths[0]} is neither results.json of kddm distill nor weights.json of "
            "kddm choose-weights; pass the folder of one of them"
        )
    if all("eval_images" in results for results in files):
        return table.markdown(merge(dict(zip(map(str, paths), files, strict=True))))
    raise UserError(
        f"{' '.join(map(str, paths))}: several files make one table only if all are "
        "results of kddm distill, or all are grids of kddm choose-weights; run kddm "
        "report for each alone"
    )


def fill(page: Path) -> str:
    """Renders the tables of a Markdown page.

    Args:
      page: path of a page with ``<!-- table: FILES -->`` and ``<!-- /table -->`` around
        each table.  Paths of files are relative to the page; several results of ``kddm
        distill``, or several grids of ``kddm choose-weights``, make one table.

    Returns:
      The text of the page with each table rendered from its JSON.
    """

    def render(match):
        rendered = _rendered([page.parent / name for name in match[2].split()])
        return f"{match[1]}{rendered}{match[3]}"

    return BLOCK.sub(render, page.read_text())


def folder(path: Path) -> None:
    """Writes the table, the curves and the page of a folder of results again."""
    # Jinja2 and Matplotlib are imported only if there is something to draw.
    from kddm_jax.experiment.report import page

    results = read_json(path / RESULTS)
    known = (path / "embedding.json").exists()
    embedding = read_json(path / "embedding.json") if known else None
    distill.write(results, path)
    page.write(results, embedding, path)
    print(path / "report.html")


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status.

    A page that cannot be rendered is not changed.
    """
    parser = argparse.ArgumentParser(description=ABOUT, prog="kddm report")
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="folder of results, folders or JSON files of one table, or Markdown page",
    )
    given = parser.parse_args(arguments)

    def work():
        pages = [path for path in given.paths if path.suffix == ".md"]
        studies = [path for path in given.paths if path not in pages]
        files = [*map(_file, studies)]
        if len(studies) == 1 and files[0] == studies[0] / RESULTS:
            folder(studies[0])
        elif studies:
            print(_rendered(files))
        for page in pages:
            page.write_text(fill(page))

    return answer_errors(work)
