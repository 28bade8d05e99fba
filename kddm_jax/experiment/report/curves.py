"""Draws learning curves, and the quality of the teacher's layers."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

from kddm_jax.experiment.machine.records import distance_of
from kddm_jax.experiment.report.rows import rows
from kddm_jax.experiment.settings import LONGER

mpl.use("Agg")
from cycler import cycler  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of backend)
from matplotlib.ticker import MaxNLocator  # noqa: E402

DPI = 110
COLOURS = 128  # size of a picture's palette, which saves two thirds of the bytes
# Each of ten colours is used for a solid line, and then for dots and dashes.
CYCLE = cycler(linestyle=["-", "-."]) * cycler(color=mpl.color_sequences["tab10"])
PLAIN = {"color": "black", "linestyle": "--"}  # the student alone
STYLES = {"student": PLAIN, LONGER: {**PLAIN, "linestyle": ":"}}


def plain(text: object) -> str:
    """Escapes a string for Matplotlib, in which a $ would begin a formula."""
    return str(text).replace("$", r"\$")


def pixels(figure) -> np.ndarray:
    """Renders a figure as uint8 pixels ``[h, w, 3]`` and closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    plt.close(figure)
    return np.asarray(Image.open(buffer).convert("RGB"))


def save(figure, path: Path) -> Path:
    """Writes a figure as a small PNG and closes it."""
    picture = Image.fromarray(pixels(figure))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = picture.quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    return path


def svg(figure) -> str:
    """Renders a figure as an SVG element and closes it.

    Text stays text, and equal figures give equal strings.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "kddm_jax", "svg.fonttype": "none"}):
        keys = ("Creator", "Date", "Format", "Type")
        figure.savefig(buffer, format="svg", dpi=200, metadata=dict.fromkeys(keys))
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def scatter(axes, points, labels, count: int, **style):
    """Draws points ``[n, 2]`` in their classes' colours, and returns the colours."""
    hues = plt.get_cmap("tab10" if count <= 10 else "turbo", count)
    axes.scatter(*points.T, c=hues(labels), linewidths=0.6, **style)
    return hues


def series(runs: Sequence[Mapping], value: Callable):
    """Averages a number in the runs' histories over seeds.

    Args:
      runs: results of one method, one for each seed.
      value: function that returns the number of an epoch's record, or None if it was
        not measured.

    Returns:
      ``(epochs, mean, spread)``.  The spread is the standard deviation over seeds, zero
      for one seed.
    """
    epochs = [r["epoch"] for r in runs[0]["history"] if value(r) is not None]
    rows = np.array(
        [[value(r) for r in run["history"] if value(r) is not None] for run in runs]
    )
    spread = rows.std(0, ddof=1) if len(runs) > 1 else np.zeros(rows.shape[1])
    return epochs, rows.mean(0), spread


def draw(axes, runs: Sequence[Mapping], value: Callable, **style) -> None:
    """Draws `series` as a line, with a band if there are several seeds.

    Nothing is drawn if the number was not measured.

    Args:
      axes: Matplotlib axes.
      runs: as in `series`.
      value: as in `series`.
      **style: style of the line.
    """
    epochs, mean, spread = series(runs, value)
    if not epochs:
        return
    marker = "o" if len(epochs) == 1 else None  # a line of one point is invisible
    (line,) = axes.plot(epochs, mean, marker=marker, **style)
    if len(runs) > 1:
        band = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
        axes.fill_between(epochs, mean - spread, mean + spread, **band)


def panels(
    groups: Mapping[Any, Sequence[Mapping]],
    styles: Mapping[Any, Mapping],
    part: str,
    *,
    relative: bool = False,
):
    """Draws accuracy, cross-entropy and distance, with a curve for each group of runs.

    Args:
      groups: groups of runs, by any key.
      styles: styles of the lines, with their labels, by the same key.
      part: part of the images, for the axis's name.
      relative: whether distances are divided by their value in the first epoch, so that
        different distances can be compared.

    Returns:
      The figure and its three axes.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for one in axes:
        one.set_prop_cycle(CYCLE)
        one.set_xlabel("epoch")
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    for key, runs in groups.items():
        style = {"linewidth": 1.2, **styles[key]}
        draw(axes[0], runs, lambda r: r.get("test_accuracy"), **style)
        draw(axes[1], runs, lambda r: r.get("task"), **style)
        weights = runs[0].get("settings", {}).get("weights")  # of a sum of distances
        name = runs[0]["name"]
        distance = lambda r, name=name, of=weights: distance_of(r, name, of)
        if relative and (first := series(runs, distance)[1][:1]).any():
            distance = lambda r, of=distance, by=float(first[0]): of(r) / by
        draw(axes[2], runs, distance, **style)
    axes[0].set(ylabel=f"accuracy on {part} images, %")
    axes[1].set(ylabel="cross-entropy of training", yscale="log")
    share = " / its first epoch's" if relative else ""
    axes[2].set(ylabel=f"distance in training{share}", yscale="log")
    return figure, axes


def seeds_of(runs: Sequence[Mapping]) -> str:
    """Describes in words the seeds of a curve."""
    count = len(runs)
    return f"{count} seeds, mean and standard deviation" if count > 1 else "1 seed"


def of_runs(results: Mapping):
    """Draws the learning curves of all runs, as mean and spread over seeds.

    Args:
      results: the content of ``results.json``.

    Returns:
      The figure.
    """
    found = rows(results)
    groups = {row.key: row.runs for row in found}
    part = "held-out" if results["settings"]["held_out"] else "test"
    styles = {
        row.key: {"label": plain(row.title), **STYLES.get(row.key.name, {})}
        for row in found
    }
    figure, axes = panels(groups, styles, part, relative=True)
    line = {"color": "grey", "linewidth": 1, "linestyle": ":"}
    axes[0].axhline(results["teacher"]["accuracy"], label="teacher", **line)
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, fontsize="small", loc="outside right upper")
    if not axes[2].lines:  # students alone
        axes[2].set_axis_off()
    figure.suptitle(
        f"{plain(results['settings']['dataset'])}: "
        f"{seeds_of(next(iter(groups.values())))}"
    )
    return figure


def of_layers(record: Mapping, path: Path) -> Path:
    """Draws quality, its parts and the linear probe against the teacher's layer.

    Args:
      record: the content of ``quality.json``; those of version 0.2.0 have no probe.
      path: path of the picture.

    Returns:
      The path.
    """
    layers = list(record["layers"])
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for letter, style in (("Q", "-o"), ("S", ":"), ("I", "--"), ("E", "-.")):
        values = [record["layers"][layer][letter] for layer in layers]
        axes.plot(values, style, label=letter, markersize=3)
    probes = [record["layers"][layer].get("probe") for layer in layers]
    if None not in probes:
        shares = np.array(probes) / 100
        axes.plot(shares, "-s", label="linear probe", markersize=3)
    chosen = [layers.index(pair.split(":")[1]) for pair in record["pairs"]]
    best = [record["layers"][layers[i]]["Q"] for i in chosen]
    axes.plot(chosen, best, "kx", markersize=9, label="chosen")
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize="small")
    axes.set(ylabel="quality", title="the teacher's layers, from the first to the last")
    axes.legend(fontsize="small")
    return save(figure, path)
