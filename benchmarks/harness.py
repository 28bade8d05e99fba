"""Shared parts of the benchmarks: distances by name, interleaved rounds, tables.

Timings on a shared machine drift by more than the differences of interest.  Every
comparison is therefore made in one run, in rounds of one call each, and compares
medians over the rounds, or takes the median of the differences within rounds.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

# Without an installed package, use the one in this checkout.
if importlib.util.find_spec("kddm_jax") is None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from kddm_jax.distances import DISTANCES, Distance  # noqa: E402
from kddm_jax.numerics.convolution import prefer_eigen  # noqa: E402

prefer_eigen()  # before JAX looks for devices, as in the experiments

# A variant of a distance is written "key/choice": "w2/exact", "w2_gaussian/diag".
CHOICES: Mapping[str, str] = {
    "sinkhorn": "solver",
    "entropic": "solver",
    "exact": "solver",
    "svd": "method",
    "newton_schulz": "method",
    "full": "covariance",
    "diag": "covariance",
}


def parse_distance(name: str) -> tuple[Distance, dict[str, object]]:
    """Returns the distance and the options of ``"key"`` or ``"key/choice"``."""
    key, _, choice = name.partition("/")
    if key not in DISTANCES:
        raise SystemExit(f"unknown distance {key!r}; known: {', '.join(DISTANCES)}")
    if choice and choice not in CHOICES:
        raise SystemExit(f"unknown choice {choice!r}; known: {', '.join(CHOICES)}")
    return DISTANCES[key], ({CHOICES[choice]: choice} if choice else {})


def weight_of(row: Distance) -> float:
    """Returns any default lambda; it has no influence on time."""
    return next(iter(row.weights.values()), 1.0)


def missing_package(error: ImportError) -> str:
    """Returns the note for a distance whose package is not installed."""
    package = (error.name or str(error)).partition(".")[0]
    return "needs " + {"ott": "ott-jax"}.get(package, package)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    deadline: float = 1e99,
    least: float = 0.0,
    most: float = 1e99,
) -> dict[str, list[float]]:
    """Times every call once in every round, in random order.

    In a fixed order a call would always find the caches of the same other call.

    Args:
      calls: calls by name; each must block until its work is done.
      rounds: number of rounds.
      deadline: `time.perf_counter` after which only the first three rounds start.
      least: total seconds up to which a call continues after the last round.
      most: total seconds after which a call takes only its first three turns.

    Returns:
      Seconds by name, one number for each of the first rounds.
    """
    seconds = {name: [] for name in calls}
    for i in itertools.count():
        total = {name: sum(taken) for name, taken in seconds.items()}
        turns = [
            name
            for name in calls
            if (i < rounds or total[name] < least) and (i < 3 or total[name] <= most)
        ]
        if not turns or (i >= 3 and time.perf_counter() > deadline):
            break
        for name in random.Random(i).sample(turns, len(turns)):
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_of(fn: Callable[..., float], *columns: Sequence[float]) -> float:
    """Computes the median of ``fn`` over the rounds that all columns have."""
    return statistics.median(fn(*row) for row in zip(*columns, strict=False))


def versions(*packages: str) -> dict[str, str]:
    """Returns versions of Python, JAX and packages; "absent" if not installed."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "numpy", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def planned_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns bytes of arguments, results and temporaries, as XLA plans them."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    kinds = ("argument", "output", "temp")
    total = sum(getattr(plan, f"{kind}_size_in_bytes") for kind in kinds)
    return total - plan.alias_size_in_bytes


def device_name() -> str:
    """Returns the kind of accelerator, or the processor and its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1] for line in lines if "model name" in line]
        model = names[0].strip() if names else model
    return f"{model}, {_usable_cores()} cores"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> str:
    """Returns the load of the machine for the caption."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Makes a Markdown table; None is a dash, numbers keep three digits."""
    texts = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    line = lambda cells: (
        "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"
    )
    rule = line(["-" * width for width in widths])
    return "\n".join([line(columns), rule, *map(line, texts)])


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def write_json(path: str | None, report: Mapping[str, object]) -> None:
    """Writes the report if there is a path."""
    if path is not None:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
