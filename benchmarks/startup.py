"""Measures how long a command needs to import the package and make its first step.

    python benchmarks/startup.py
    python benchmarks/startup.py --rounds 9 --no-steps

Imports are timed in fresh processes that take turns.  The first step is that of
`experiments/cifar.py` on digits, from the start of a run to its first losses, with an
empty compilation cache and again with the filled one.  Asserts that importing the loss
and all distances takes at most 1.3 times as long as importing JAX, Flax and Optax,
which they need (ott is imported by the first solve), and that a filled cache saves
time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {
    "jax": "jax",
    "jax, flax, optax": "jax, flax.linen, optax",
    "jax, flax, optax, ott": "jax, flax.linen, optax, ott.solvers.linear",
    "kddm_jax": "kddm_jax.losses",
}
BASE, OURS = "jax, flax, optax", "kddm_jax"
RATIO = 1.3
DIGITS = (
    *("--dataset", "digits", "--epochs", "1", "--teacher-epochs", "1", "--width", "8"),
    *("--teacher-model", "ResNet34", "--student-model", "ResNet18"),
    *("--distances", "cw2", "--no-progress"),
)


def _run(*command):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)


def importing(modules: str):
    """Makes a call that imports modules in a new process."""
    lines = f"import warnings; warnings.simplefilter('ignore'); import {modules}"
    return lambda: _run(sys.executable, "-c", lines)


def first_steps(folder: Path) -> dict[str, float]:
    """Returns seconds to the first step of every run, in the order of the runs."""
    out, cache = folder / "out", folder / "cache"
    options = ("--out", str(out), "--compilation-cache", str(cache))
    _run(sys.executable, str(ROOT / "experiments/cifar.py"), *DIGITS, *options)
    results = json.loads((out / "results.json").read_text())
    runs = {"teacher": results["teacher"]}
    runs.update({run["name"]: run for run in results["runs"]})
    return {k: run["timing"]["seconds_to_first_step"] for k, run in runs.items()}


def measure_steps() -> dict[str, dict[str, float]]:
    """Measures first steps with an empty and then with a filled cache."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "filled"):
            found[cache] = first_steps(Path(folder))
            shutil.rmtree(Path(folder) / "out")
    return found


def broken(seconds, steps) -> list[str]:
    """Lists the claims that do not hold.

    Args:
      seconds: times of imports, a list for each name of `IMPORTS`.
      steps: result of `measure_steps`, or empty.

    Returns:
      One line for each claim.
    """
    found = []
    ratio = harness.median_of(lambda a, b: a / b, seconds[OURS], seconds[BASE])
    if ratio > RATIO:
        found.append(f"the import takes {ratio:.2f} times, limit {RATIO}")
    if steps:
        empty, filled = (sum(steps[cache].values()) for cache in ("empty", "filled"))
        if filled >= empty:
            found.append(f"the cache saves nothing: {filled:.1f}, {empty:.1f} s")
    return found


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="number of imports of each")
    add("--no-steps", action="store_true", help="imports only")
    add("--no-assert", action="store_true", help="measure only")
    add("--json", help="file for the numbers")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the tables and checks the claims."""
    args = parse_args()
    calls = {name: importing(modules) for name, modules in IMPORTS.items()}
    calls[OURS]()  # compiles the bytecode
    seconds = harness.interleaved(calls, args.rounds)
    rows = [
        (name, statistics.median(taken), harness.median_of(
            lambda a, b: a / b, taken, seconds[BASE]))
        for name, taken in seconds.items()
    ]  # fmt: skip
    print(harness.markdown(("import", "seconds", f"/ {BASE}"), rows))
    steps = {} if args.no_steps else measure_steps()
    if steps:
        lines = [(name, steps["empty"][name], s) for name, s in steps["filled"].items()]
        columns = ("first step, seconds", "empty cache", "filled cache")
        print("\n" + harness.markdown(columns, lines))
    print(f"\n{harness.device_name()}, load average {harness.load_average()}")
    report = {"device": harness.device_name(), "imports": seconds, "steps": steps}
    versions = harness.versions("optax", "ott-jax")
    harness.write_json(args.json, {**report, "versions": versions})
    failed = [] if args.no_assert else broken(seconds, steps)
    assert not failed, "; ".join(failed)
    held = "All claims hold." if steps else "The claim on the import holds."
    print("Times not asserted." if args.no_assert else held)


if __name__ == "__main__":
    main()
