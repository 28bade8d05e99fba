"""Chooses lambda for the small examples and measures their test accuracy.

    python examples/choose.py --json experiments/results/examples.json

Every lambda is evaluated on 300 held-out training digits, as the mean of three seeds.
Only the best one is then evaluated on the test digits.
"""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")  # before JAX; for sharded.py
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # faster SVDs on a busy machine

import argparse
import importlib
import json
import shlex
import sys
from pathlib import Path

import jax
import numpy as np

from kddm_jax import data

NAMES = ("flax_nnx", "equinox_mlp", "sharded", "plain_jax")
GRID = (1.0, 3.0, 10.0, 30.0)
SEEDS = 3


def without_test(digits: data.Dataset) -> data.Dataset:
    """Replaces the test digits by held-out training digits."""
    train, held_out = data.stratified_split(digits.train_labels, 300, seed=0)
    return digits._replace(
        train_images=digits.train_images[train],
        train_labels=digits.train_labels[train],
        test_images=digits.train_images[held_out],
        test_labels=digits.train_labels[held_out],
    )


def measure(name: str, digits: data.Dataset, grid) -> dict[str, object]:
    """Measures an example's held-out accuracies, best lambda and test accuracies."""
    compare = importlib.import_module(name).compare
    held_out = {}
    for weight in grid:
        found = [[*compare(without_test(digits), weight, s)][2] for s in range(SEEDS)]
        held_out[f"{weight:g}"] = float(np.mean(found))
        print(f"{name}: lambda {weight:g}, held-out {np.mean(found):.1f} %", flush=True)
    best = max(held_out, key=held_out.get)
    test = [[*compare(digits, float(best), seed)] for seed in range(SEEDS)]
    return {"name": name, "held_out": held_out, "best": float(best), "test": test}


def table(found) -> dict[str, object]:
    """Makes the table that `kddm report` renders."""
    grid = sorted({weight for one in found for weight in one["held_out"]}, key=float)
    columns = ["", *(f"λ = {w}" for w in grid), "teacher", "alone", "distilled"]
    rows = []
    for one in found:
        test = np.array(one["test"])
        spread = [
            f"{mean:.1f} ± {deviation:.1f}"
            for mean, deviation in zip(test.mean(0), test.std(0, ddof=1), strict=True)
        ]
        held_out = [
            f"{one['held_out'][w]:.1f}" if w in one["held_out"] else "–" for w in grid
        ]
        rows.append([one["name"], *held_out, *spread])
    return {"columns": columns, "rows": rows}


def results(found, command: str, path: Path | None) -> dict[str, object]:
    """Adds these examples to those that the file already has."""
    kept = json.loads(path.read_text()) if path and path.exists() else {}
    rows = {one["name"]: one for one in [*kept.get("found", ()), *found]}
    found = [rows[name] for name in NAMES if name in rows]
    commands = [line for line in [kept.get("command"), command] if line]
    return {
        **table(found),
        "caption": "Percent: columns of λ on 300 held-out training digits, the others "
        f"with the best λ on 355 test digits; {SEEDS} seeds, "
        f"{jax.devices()[0].device_kind}, JAX {jax.__version__}.",
        "command": "; ".join(dict.fromkeys(commands)),
        "found": found,
    }


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--grid", nargs="+", type=float, default=GRID)
    parser.add_argument("--json", type=Path, help="file to write or add results to")
    args = parser.parse_args(arguments)
    digits = data.load("digits")
    found = [measure(name, digits, args.grid) for name in args.examples]
    command = shlex.join(["python", "examples/choose.py", *arguments])
    written = results(found, command, args.json)
    for row in written["rows"]:
        print("  ".join(row))
    if args.json:
        args.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
