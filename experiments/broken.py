"""Draws the accuracy of students against the share of images without their own pair.

    python experiments/broken.py results/broken-*.json --to results/broken-pairs.png

The files are results of ``kddm distill --placebo pairs --placebo-share S``, in which
this share of the images has the teacher's outputs of another image of its class, and of
the same command without placebo. Files of one data set make one panel.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kddm_jax.experiment.machine import records
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.machine.terminal import answer_errors
from kddm_jax.experiment.report import rows
from kddm_jax.experiment.report.accuracies import difference
from kddm_jax.experiment.report.curves import plt

Points = dict[float, dict[int, float]]  # accuracies by share and seed


def share_of(run: Mapping[str, Any]) -> float:
    """Returns the share of images that have the outputs of another one."""
    settings = run["settings"]
    if not settings.get("placebo"):
        return 0.0
    share = settings.get("placebo_share")  # runs of earlier versions have none
    return 1.0 if share is None else share


def points_of(results: Mapping[str, Any]) -> tuple[dict[str, Points], list[float]]:
    """Groups accuracies by distance and share, and returns those of students alone.

    Raises:
      UserError: there is a placebo other than "pairs".
    """
    found: dict[str, Points] = {}
    for run in results["runs"]:
        if run["name"] in rows.STUDENTS_ALONE:
            continue
        if run["settings"].get("placebo") not in (None, "pairs"):
            raise UserError(
                f"{run['title']} has the placebo {run['settings']['placebo']}; leave "
                "its file out, the figure is of broken pairs"
            )
        by_share = found.setdefault(run["title"], {})
        by_seed = by_share.setdefault(share_of(run), {})
        if run["seed"] in by_seed:
            raise UserError(
                f"{run['title']} has two runs of seed {run['seed']} with the share "
                f"{share_of(run):g}; pass results with one lambda each"
            )
        by_seed[run["seed"]] = run["accuracy"]
    alone = rows.reference(rows.rows(results))
    return found, [*alone.accuracy.values()]


def half_width(accuracies: Sequence[float]) -> float:
    """Returns half the 95 % interval of a mean over seeds; 0 for one seed."""
    zero = dict.fromkeys(range(len(accuracies)), 0.0)
    found = difference(dict(enumerate(accuracies)), zero)
    low, high = (found and found.interval) or (0.0, 0.0)
    return (high - low) / 2


def draw(studies: Sequence[Mapping[str, Any]], to: Path) -> Path:
    """Draws a panel for each data set.

    Args:
      studies: results, one study for each data set.
      to: path of the picture.

    Returns:
      The path.
    """
    figure, panels = plt.subplots(
        *(1, len(studies)),
        figsize=(4 * len(studies), 3.2),
        squeeze=False,
        layout="constrained",
    )
    for axes, results in zip(panels[0], studies, strict=True):
        found, alone = points_of(results)
        for title, by_share in found.items():
            if len(by_share) < 2:  # measured with whole pairs only
                continue
            shares = sorted(by_share)
            values = [[*by_share[share].values()] for share in shares]
            axes.errorbar(
                *([100 * share for share in shares], [np.mean(v) for v in values]),
                yerr=[half_width(v) for v in values],
                label=title,
                marker="o",
                capsize=3,
            )
        axes.axhline(float(np.mean(alone)), color="grey", linestyle=":")
        axes.set(
            title=results["settings"]["dataset"],
            xlabel="images without their own pair, %",
            ylabel="test accuracy, %",
        )
        axes.legend(fontsize="small")
    figure.savefig(to, dpi=150)
    plt.close(figure)
    return to


def main(arguments: list[str]) -> int:
    """Draws the figure and returns the exit status."""
    parser = argparse.ArgumentParser(description="Draws the figure of broken pairs.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, default=Path("broken-pairs.png"))
    given = parser.parse_args(arguments)

    def work():
        by_dataset: dict[str, dict[str, Any]] = {}
        for path in given.files:
            results: Any = records.read_json(path, "pass a results.json")
            dataset = results["settings"]["dataset"]
            by_dataset.setdefault(dataset, {})[str(path)] = results
        studies = [rows.merge(files) for files in by_dataset.values()]
        print(draw(studies, given.to))

    return answer_errors(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
