"""Each default of a distance against its alternatives, inside the distillation step.

    python benchmarks/choices.py                     # idle, then beside a busy process
    python benchmarks/choices.py --distances w2_gaussian --width 16

Solver, method, epsilon and iterations are measured where they matter: in the whole step
(ResNet34 to ResNet18, ImageNet stem), all choices of a run by turns, on the machine as
it is and beside a process that keeps a core busy.  Beside the time stands what a choice
is worth: the relative error of its gradient by the student's features (of
``wkd_logits``: logits), against `REFERENCES` in float64, on clouds that are unrelated
and on aligned ones.
Asserts that no alternative makes the step faster than the default does by more than a
twentieth (a tenth below the published width 64, where a millisecond is a twentieth of
the step), unless its gradient is further off or its solver does not converge.
"""

import os

# Before the first import of NumPy or JAX, see step.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import distances
import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax_step import JaxStep, make_models
from workload import CLASSES, Setting, make_data

from kddm_jax.distances import DISTANCES, Distance
from kddm_jax.linalg import constant, squared_distances

# A parent that is gone is noticed within a second.
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(10**7))"
WIDTH = 64  # of the published networks
FASTER, NARROW = 1.05, 1.1  # the default's step over an alternative's, there and below
DEFAULT = "default"


class Choice(NamedTuple):
    """Options of a row, and how the table calls them.

    Attributes:
      distance: key of the catalogue.
      text: in the table.
      options: of the distance.
      epsilon: in units of the mean cost, None for the row's own.
    """

    distance: str
    text: str
    options: dict[str, object]
    epsilon: float | None = None

    @property
    def name(self) -> tuple[str, str]:
        """Distance and choice."""
        return self.distance, self.text


def _of(distance: str, *options: dict[str, object], epsilons=()) -> list[Choice]:
    texts = (" ".join(f"{k}={v}" for k, v in given.items()) for given in options)
    return [
        Choice(distance, DEFAULT, {}),
        *(Choice(distance, text, o) for text, o in zip(texts, options, strict=True)),
        *(Choice(distance, f"epsilon {e:g} of mean", {}, e) for e in epsilons),
    ]


SOLVERS = ({"solver": "entropic"}, {"solver": "exact"})
# The method that "auto" does not take here.
METHOD = {"method": "newton_schulz" if jax.default_backend() == "cpu" else "svd"}
# What the choices of each distance approximate, in float64: transport without entropy,
# but for wkd_logits, whose entropy is part of it.
REFERENCES = {
    "w2": {"solver": "exact"},
    "cw2": {"solver": "exact"},
    "jw2": {"solver": "exact"},
    "w2_gaussian": {},
    "cw2_gaussian": {},
    "sliced_w2": {"num_projections": 16_384},
    "wkd_logits": {},
}
CHOICES = {
    "w2": _of(
        "w2",
        *SOLVERS,
        {"threshold": 1e-2},
        {"threshold": 1e-5},
        {"max_iterations": 10},
        epsilons=(0.005, 0.1),
    ),
    "cw2": _of("cw2", *SOLVERS),
    "jw2": _of("jw2", *SOLVERS),
    "w2_gaussian": _of("w2_gaussian", METHOD),
    "cw2_gaussian": _of("cw2_gaussian", METHOD),
    "sliced_w2": _of("sliced_w2", {"num_projections": 32}, {"num_projections": 512}),
    "wkd_logits": _of("wkd_logits", {"iterations": 10}, {"iterations": 100}),
}


def row_of(choice: Choice) -> Distance:
    """The catalogue's row with the options of a choice."""
    row = DISTANCES[choice.distance]
    needed = distances.required_options(row.fn, CLASSES)
    row = row._replace(options={**row.options, **needed, **choice.options})
    if choice.epsilon is None:
        return row

    def scaled(fn):
        def call(x, y, *rest, **options):
            epsilon = constant(choice.epsilon * jnp.mean(squared_distances(x, y)))
            return fn(x, y, *rest, epsilon=epsilon, **options)

        return call

    return row._replace(fn=scaled(row.fn), diagnose=scaled(row.diagnose))


def gradient(row: Distance, batch: dict[str, list], dtype: jnp.dtype) -> np.ndarray:
    """By the student's array, which is the row's first."""
    arrays = [array for kind in row.inputs for array in batch[kind]]
    floating = lambda array: jnp.issubdtype(array.dtype, jnp.floating)
    arrays = [a.astype(dtype) if floating(a) else a for a in arrays]
    options = {
        name: jnp.asarray(value, dtype) if isinstance(value, np.ndarray) else value
        for name, value in row.options.items()
    }
    fn = jax.jit(jax.grad(lambda *a: row.fn(*a, **options)))
    return np.asarray(fn(*arrays), np.float64)


def errors(choices: list[Choice], args: argparse.Namespace) -> dict[tuple, list]:
    """Of each choice's gradient, relative, on each kind of student."""
    found = {choice.name: [] for choice in choices}
    for student in distances.STUDENTS:
        batch = distances.make_batch(args.batch_size, args.d, student, CLASSES)
        exact = {}
        for name in {choice.distance for choice in choices}:
            with jax.enable_x64(True):
                best = row_of(Choice(name, "", REFERENCES[name]))
                exact[name] = gradient(best, batch, jnp.float64)
        for choice in choices:
            off = gradient(row_of(choice), batch, jnp.float32) - exact[choice.distance]
            size = np.linalg.norm(exact[choice.distance])
            found[choice.name].append(float(np.linalg.norm(off) / size))
    return found


@contextlib.contextmanager
def beside(processes: int) -> Iterator[None]:
    """Others that keep a core busy each."""
    command = [sys.executable, "-c", BUSY, str(os.getpid())]
    busy = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(choices: list[Choice], args: argparse.Namespace) -> list[dict]:
    """A row per choice: times by load, iterations, errors."""
    setting = Setting("imagenet", args.width, args.batch_size, args.dtype)
    steps = 1 if jax.default_backend() == "cpu" else 10
    data = make_data(args.batch_size, steps)
    models = make_models(setting, data.images)
    programs = {None: JaxStep(setting, "none", data, models)}
    for choice in choices:
        programs[choice.name] = JaxStep(setting, row_of(choice), data, models)
        print(*choice.name, "compiled", flush=True)
    off = errors(choices, args)
    seconds = {}
    for load in (0, args.busy):
        with beside(load):
            for program in programs.values():
                program()
            seconds[load] = harness.interleaved(programs, 3, least=args.seconds)
    rows = []
    for choice in choices:
        name = choice.name
        row = {"distance": choice.distance, "choice": choice.text}
        for load, word in ((0, "idle"), (args.busy, "busy")):
            taken = seconds[load]
            row[f"{word}_ms"] = 1e3 * statistics.median(taken[name]) / steps
            more = harness.median_of(lambda a, b: a - b, taken[name], taken[None])
            row[f"{word}_distance_ms"] = 1e3 * more / steps
            row[f"{word}_ratio"] = harness.median_of(
                lambda a, b: a / b, taken[choice.distance, DEFAULT], taken[name]
            )
        row["iterations"] = programs[name].iterations
        row["converged"] = programs[name].converged
        row["errors"] = off[name]
        rows.append(row)
    return rows


def claims(rows: list[dict], width: int) -> list[tuple[str, float, float]]:
    """``(claim, measured, limit)`` of every alternative that is as good."""
    limit = FASTER if width >= WIDTH else NARROW
    default = {row["distance"]: row for row in rows if row["choice"] == DEFAULT}
    found = []
    for row in rows:
        ours = default[row["distance"]]
        # as good: within a tenth, or where both are round-off
        as_good = all(
            theirs <= max(1.1 * own, 1e-3)
            for theirs, own in zip(row["errors"], ours["errors"], strict=True)
        )
        if row is not ours and as_good and row["converged"]:
            name = f"{row['distance']}: default / {row['choice']}"
            for word in ("idle", "busy"):
                found.append((f"{name}, {word}", row[f"{word}_ratio"], limit))
    return found


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cpu = jax.default_backend() == "cpu"
    add = parser.add_argument
    add("--distances", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    add("--width", type=int, default=WIDTH, help="of the networks")
    add("--batch-size", type=int, default=128)
    add("--d", type=int, default=512, help="features where errors are taken")
    add("--dtype", default="float32" if cpu else "bfloat16")
    add("--seconds", type=float, default=6.0, help="of every choice and load")
    add("--busy", type=int, default=1, help="processes beside it")
    add("--no-assert", action="store_true", help="measure only")
    add("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    if args.busy < 1:
        parser.error(f"--busy must be at least 1, got {args.busy}")
    return args


def main() -> None:
    """Measures, prints the table, checks the claims."""
    args = parse_args()
    choices = [choice for name in args.distances for choice in CHOICES[name]]
    load = harness.load_average()
    rows = measure(choices, args)
    report = {
        "device": harness.device_name(),
        "platform": jax.default_backend(),
        "versions": harness.versions("optax", "ott-jax"),
        "load_average": load,
        "args": vars(args),
        "rows": rows,
        "claims": claims(rows, args.width),
    }
    harness.write_json(args.json, report)
    print(
        f"\n{report['device']} ({report['platform']}); load average {load}; ResNets of "
        f"width {args.width}, ImageNet stem, batch {args.batch_size}, {args.dtype}.\n"
    )
    columns = ["distance", "choice", "ms/step", "distance ms", "busy: ms/step"]
    columns += ["busy: distance ms", "iterations"]
    columns += [f"error, {student}" for student in distances.STUDENTS]
    names = ("idle_ms", "idle_distance_ms", "busy_ms", "busy_distance_ms", "iterations")
    lines = [
        [row["distance"], row["choice"], *(row[n] for n in names), *row["errors"]]
        for row in rows
    ]
    for line, row in zip(lines, rows, strict=True):
        if not row["converged"]:
            line[6] = f"{line[6]:g}, not converged"
    print(harness.markdown(columns, lines))
    print("\n" + harness.markdown(["claim", "measured", "limit"], report["claims"]))
    broken = [claim for claim in report["claims"] if claim[1] > claim[2]]
    assert args.no_assert or not broken, f"claims that failed: {broken}"
    print("\nTimes not asserted." if args.no_assert else "\nAll claims hold.")


if __name__ == "__main__":
    main()
