"""Measures time and memory of every distance for more samples and classes.

    python benchmarks/scale.py --plot benchmarks/scale.png
    python benchmarks/scale.py --distances w2 cw2 --n 64 4096 --d 512

Measures value and gradient of each distance for n = 64 ... 4096 samples of 10 classes,
then of distances that take labels or predictions for 10 ... 1000 classes of 256
samples. A distance that took longer than ``--seconds`` is not tried at the next size.
Asserts that from one size to the next, the memory besides the arguments grows at most a
quarter faster than the largest matrix: [n, n], [n, d], [d, d], [k, k] or [n, k].
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import inspect
import math
import statistics
import time
from pathlib import Path

import distances
import harness
import jax

from kddm_jax.distances import DISTANCES

SPARE = 1.25
LEAST_BYTES = 1e6  # smaller amounts of memory are not asserted


def measure(name: str, n: int, classes: int, args) -> dict[str, object]:
    """Measures milliseconds and bytes of a distance at one size, or gives a note."""
    found = {"distance": name, "n": n, "classes": classes}
    batch = distances.make_batch(n, args.d, "unrelated", classes)
    programs = distances.Programs(name)
    if "num_classes" in inspect.signature(programs.row.fn).parameters:
        programs.options = {**programs.options, "num_classes": classes}
    try:
        made = programs.make(batch)
    except ValueError as error:  # linear_projection at n <= d + 1
        return {**found, "note": "n ≤ d + 1" if "n > d" in str(error) else str(error)}
    arrays, taken = programs.arrays(batch), []
    while len(taken) < args.rounds and sum(taken) < args.seconds:
        start = time.perf_counter()
        jax.block_until_ready(made["gradient"](*arrays))
        taken.append(time.perf_counter() - start)
    return {**found, "ms": statistics.median(taken) * 1e3, "memory": made["memory"]}


def grow(name: str, sizes: list[tuple[int, int]], args) -> list[dict[str, object]]:
    """Measures each ``(n, classes)`` until a call takes too long."""
    rows, slow = [], False
    for n, classes in sizes:
        if slow:
            note = f"> {args.seconds:g} s before"
            row = {"distance": name, "n": n, "classes": classes, "note": note}
        else:
            row = measure(name, n, classes, args)
            slow = row.get("ms", 0) > args.seconds * 1e3
        rows.append(row)
    return rows


def claims(rows: list[dict], d: int) -> list[tuple[str, float, float]]:
    """Returns ``(claim, measured, limit)`` for the growth of memory."""
    found = []
    for before, after in zip(rows, rows[1:], strict=False):
        if not all(row.get("memory", 0) > LEAST_BYTES for row in (before, after)):
            continue
        largest = [
            distances.largest_allowed(row["n"], d, row["classes"])
            for row in (before, after)
        ]
        growth = after["memory"] / before["memory"] / (largest[1] / largest[0])
        where = f"n={after['n']}, {after['classes']} classes"
        found.append((f"memory of {after['distance']}, {where}", growth, SPARE))
    return found


def table(groups: dict[str, list[dict]], key: str, sizes: list[int]) -> str:
    """Makes a table of milliseconds at every size and MB at the largest."""
    lines = []
    for name, rows in groups.items():
        cells = [row.get("ms", row.get("note")) for row in rows]
        memory = [row["memory"] for row in rows if row.get("memory") is not None]
        lines.append([name, *cells, memory[-1] / 1e6 if memory else None])
    head = [f"{key} = {size:,}" for size in sizes]
    return harness.markdown(["ms", *head, "MB at the last"], lines)


def plot(groups: dict[str, dict[str, list[dict]]], path: Path, title: str) -> None:
    """Draws milliseconds and MB against samples, and milliseconds against classes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 6), layout="constrained")
    panels = (
        ("n", "n", "ms", 1.0, "milliseconds"),
        ("n", "n", "memory", 1e-6, "megabytes"),
        ("classes", "classes", "ms", 1.0, "milliseconds, n = 256"),
    )
    colors = mpl.colormaps["tab20"].colors
    styles = {name: i for i, name in enumerate(groups["n"])}
    for axis, (kind, x, y, unit, label) in zip(axes, panels, strict=True):
        for name, rows in groups[kind].items():
            points = [(row[x], row[y] * unit) for row in rows if row.get(y)]
            i = styles[name]
            line = "-" if i < len(colors) else "--"
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    color=colors[i % len(colors)],
                    linestyle=line,
                    marker="o",
                    markersize=3,
                    label=name,
                )
        axis.set(xscale="log", yscale="log", xlabel=x, ylabel=label)
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right upper", fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--n", type=int, nargs="+", default=[64, 256, 1024, 4096], help="samples")
    add("--classes", type=int, nargs="+", default=[10, 100, 1000])
    add("--d", type=int, default=128, help="features")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=0.5, help="limit to try the next size")
    add("--distances", nargs="+", help='keys, or "key/choice" such as w2/exact')
    add("--plot", type=Path, metavar="FILE", help="draw the plot to FILE")
    add("--json", metavar="FILE", help="also write the rows to FILE")
    return parser.parse_args()


def main() -> None:
    """Measures, prints both tables, draws and checks the claims."""
    args = parse_args()
    variants = distances.VARIANTS
    names = args.distances or [v for k in DISTANCES for v in variants.get(k, (k,))]
    groups: dict[str, dict[str, list[dict]]] = {"n": {}, "classes": {}}
    for name in names:
        inputs = harness.parse_distance(name)[0].inputs
        by_n = [(n, 10) for n in args.n]
        groups["n"][name] = grow(name, by_n, args)
        if {"labels", "logits"} & {*inputs}:
            by_classes = [(256, k) for k in args.classes]
            groups["classes"][name] = grow(name, by_classes, args)
        print(f"{name} measured", flush=True)
    checked = [
        claim
        for group in groups.values()
        for rows in group.values()
        for claim in claims(rows, args.d)
    ]
    device = f"{harness.device_name()}, load average {harness.load_average()}"
    report = {"args": {**vars(args), "plot": None}, "device": device}
    report.update(versions=harness.versions("ott-jax"), rows=groups, claims=checked)
    harness.write_json(args.json, report)
    caption = f"Value and gradient, d = {args.d}, float32; {device}"
    print(f"\n{table(groups['n'], 'n', args.n)}\n")
    if groups["classes"]:
        print(f"{table(groups['classes'], 'k', args.classes)}\n")
    print(caption)
    if args.plot:
        plot(groups, args.plot, caption)
    broken = [c for c in checked if c[1] > c[2] or not math.isfinite(c[1])]
    assert not broken, f"claims that failed: {broken}"
    print(f"All {len(checked)} claims hold.")


if __name__ == "__main__":
    main()
