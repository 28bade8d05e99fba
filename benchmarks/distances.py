"""Measures time and memory of every distance of the catalogue.

    python benchmarks/distances.py                                  # n = 128, d = 512
    python benchmarks/distances.py --n 64 256 1024 --d 128 512      # the whole grid

Features are ReLU outputs ``[n, d]`` as in a network.  The student is unrelated to the
teacher (as in the first steps) or aligned with it (as in the last).  Distances that
take labels are measured with 10, 100 and 1000 classes.  All calls of a size take turns
in one process; numbers are medians over the rounds.  For every size the script asserts

- that no array of a distance is larger than the largest of [n, n], [n, d], [d, d],
  [k, k], [n, k] and [n, directions]: none has axes n, n and d, or n, d and classes;

on a CPU also

- that class-conditional distances take the same time for 10 and 1000 classes, within
  30 %;

and on a CPU at the default size

- that exact W2 takes at most 3 ms and full Gaussian W2 at most 5 ms;
- that class-conditional distances take at most 1.3 times as long as their unconditional
  forms (median ratio over rounds): CW2 (exact, Sinkhorn) and Gaussian CW2.
"""

import os

# Before the first import of NumPy or JAX: OpenBLAS's own threads turn the 1 ms SVD
# of the Gaussian distances into 800 ms when another job keeps a core busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import inspect
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import roofline

from kddm_jax.distances import DISTANCES

SIZE = (128, 512)  # n and d of the limits in milliseconds
CLASSES = (10, 100, 1000)
LIMITS_MS = {"w2/exact": 3.0, "w2_gaussian": 5.0}
RATIO = 1.3
TWINS = {
    "cw2": "w2",
    "cw2/exact": "w2/exact",
    "cw2/sinkhorn": "w2/sinkhorn",
    "cw2_gaussian": "w2_gaussian",
}
# Distances whose time does not depend on a number of iterations.
FLAT = ("cw2/exact", "cw2_gaussian", "ckl_gaussian", "cmmd_rbf")
VARIANTS = {  # measured instead of the default
    "w2": ("w2/exact", "w2/sinkhorn", "w2/entropic"),
    "cw2": ("cw2/exact", "cw2/sinkhorn", "cw2/entropic"),
    "w2_gaussian": ("w2_gaussian", "w2_gaussian/newton_schulz", "w2_gaussian/diag"),
}
STUDENTS = ("unrelated", "aligned")
PARTS = ("value", "gradient")


class Case(NamedTuple):
    """Describes a measurement; classes is None for distances without labels."""

    name: str
    classes: int | None
    student: str
    part: str


def make_batch(n: int, d: int, student: str, classes: int) -> dict[str, list]:
    """Makes the arrays that `Distance.inputs` names, the student's first."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.3, 2.0, d)  # some features are larger than others
    labels = rng.integers(0, classes, n)
    noise = rng.normal(0, 0.05, (n, d))

    def features(centers):
        before = centers[labels] + rng.normal(0, 1, (n, d))
        return before, np.maximum(before, 0) * scale

    before, y = features(rng.normal(0, 0.5, (classes, d)))
    _, x = features(rng.normal(0, 0.5, (classes, d)))
    if student == "aligned":
        x = np.maximum(before + noise, 0) * scale
    side = 4 if d % 16 == 0 else 1
    logits = rng.normal(0, 2, (2, n, classes))
    if student == "aligned":
        logits[0] = logits[1] + rng.normal(0, 0.1, (n, classes))
    pair = [jnp.asarray(z, jnp.float32) for z in (x, y)]
    return {
        "features": pair,
        "maps": [z.reshape(n, side, side, -1) for z in pair],
        "logits": [jnp.asarray(z, jnp.float32) for z in logits],
        "labels": [jnp.asarray(labels, jnp.int32)],
        "key": [jax.random.key(0)],
        "class_cost": [class_cost(classes)],
        "class_means": [class_means(classes, d)],
    }


def class_cost(classes: int) -> jax.Array:
    """Makes a cost between classes like that of a teacher."""
    # 1 - CKA of the released teacher's classes is between .48 and .88 on CIFAR-100.
    distance = np.random.default_rng(1).uniform(0.48, 0.88, (classes, classes))
    distance = (distance + distance.T) / 2 * (1 - np.eye(classes))
    return 1 - jnp.exp(-jnp.asarray(distance, jnp.float32))


def class_means(classes: int, d: int) -> jax.Array:
    """Makes the mean features of a teacher's classes."""
    return jnp.asarray(np.random.default_rng(2).uniform(size=(classes, d)), jnp.float32)


# ---------------------------------------------------------------------------
# Programs.


def arrays_of(jaxpr) -> Iterator[int]:
    """Yields the sizes of all arrays of a program, including loops and calls."""
    for equation in roofline.equations(jaxpr):
        yield from (getattr(v.aval, "size", 0) for v in equation.outvars)


class Programs:
    """Compiles values and gradients, once for each shape."""

    def __init__(self, name: str):
        """Looks the distance up."""
        self.name = name
        self.row, self.options = harness.parse_distance(name)
        self._made = {}

    def arrays(self, batch: Mapping[str, list]) -> list[jax.Array]:
        """Returns the arguments of the distance."""
        return [array for kind in self.row.inputs for array in batch[kind]]

    def make(self, batch: Mapping[str, list]) -> dict[str, object]:
        """Makes both programs for a batch; measures memory, arrays and iterations."""
        arrays = self.arrays(batch)
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self._made:
            self._made[shapes] = self.compile(arrays)
        made = self._made[shapes]
        value, gradient = made["gradient"](*arrays)
        assert np.isfinite(value), f"{self.name} is not finite"
        assert np.isfinite(gradient).all(), f"gradient of {self.name} is not finite"
        stats = made["stats"](*arrays)
        return {**made, "iterations": stats and int(stats["iterations"])}

    def compile(self, arrays: list[jax.Array]) -> dict[str, object]:
        """Compiles both programs; returns them, their memory and largest array."""
        options = {**dict(self.row.options), **self.options}
        fn = lambda *a: self.row.fn(*a, **options)
        both = jax.value_and_grad(fn)
        gradient = jax.jit(both).lower(*arrays).compile()
        memory = gradient.memory_analysis()
        stats = lambda *a: None
        if self.row.diagnose is not None and options.get("solver") != "exact":
            stats = jax.jit(lambda *a: self.row.diagnose(*a, **options)[1])
        return {
            "value": jax.jit(fn).lower(*arrays).compile(),
            "gradient": gradient,
            "memory": getattr(memory, "temp_size_in_bytes", None),
            "largest": max(arrays_of(jax.make_jaxpr(both)(*arrays).jaxpr)),
            "stats": stats,
        }


def cases(names: list[str], classes: tuple[int, ...]) -> list[tuple[str, int | None]]:
    """Lists ``(name, classes)``, class-conditional cases after unconditional ones.

    Both then see the same load in every round.
    """
    result = []
    for name in names:
        labelled = "labels" in harness.parse_distance(name)[0].inputs
        if name in TWINS.values() and not labelled:
            result.append((name, None))
            for conditional, twin in TWINS.items():
                if twin == name and conditional in names:
                    result += [(conditional, k) for k in classes]
        elif name not in TWINS:
            result += [(name, k) for k in (classes if labelled else (None,))]
    # Class-conditional distances without their unconditional form.
    alone = [n for n in names if n in TWINS and TWINS[n] not in names]
    return result + [(name, k) for name in alone for k in classes]


# ---------------------------------------------------------------------------
# Measuring and claims.


def measure(
    names: list[str], n: int, d: int, args: argparse.Namespace, deadline: float
) -> tuple[dict, dict, dict]:
    """Measures every case; returns seconds, facts of programs and notes."""
    calls, facts, notes = {}, {}, {}
    made = {name: Programs(name) for name in names}
    for name, classes in cases(names, tuple(args.classes)):
        for student in STUDENTS:
            batch = make_batch(n, d, student, classes or args.classes[0])
            try:
                found = made[name].make(batch)
            except ImportError as error:
                notes[name] = harness.missing_package(error)
                continue
            except ValueError as error:  # linear_projection at n <= d + 1
                notes[name] = "needs n > d + 1" if "n > d" in str(error) else str(error)
                continue
            facts[name, classes, student] = found
            arrays = made[name].arrays(batch)
            for part in PARTS:
                call = lambda f=found[part], a=arrays: jax.block_until_ready(f(*a))
                calls[Case(name, classes, student, part)] = call
    # The two forms of a distance take turns for every student and part.
    order = sorted(calls, key=lambda c: (STUDENTS.index(c.student), c.part))
    calls = {case: calls[case] for case in order}
    return harness.interleaved(calls, args.rounds, deadline, most=3), facts, notes


def largest_allowed(n: int, d: int, classes: int) -> int:
    """Returns the number of elements of the largest allowed matrix."""
    directions = inspect.signature(DISTANCES["sliced_w2"].fn).parameters
    width = max(n, d, classes, directions["num_projections"].default)
    return max(n * width, d * d, classes * classes)


def claims_of_arrays(facts, n, d, classes) -> list[tuple[str, float, float]]:
    """Returns ``(claim, measured, limit)``: the largest array over the allowed one."""
    largest = {}
    for (name, k, _), found in facts.items():
        share = found["largest"] / largest_allowed(n, d, k or classes[0])
        largest[name] = max(largest.get(name, 0), share)
    if not largest:  # no distance can be computed at this size
        return []
    name = max(largest, key=largest.get)
    return [(f"largest array ({name}), n={n}, d={d}", largest[name], 1.0)]


def claims_of_time(
    seconds: Mapping[Case, list[float]], n: int, d: int, classes: tuple[int, ...]
) -> list[tuple[str, float, float]]:
    """Returns ``(claim, measured, limit)`` of every claim about time."""
    found = []
    for case, taken in seconds.items():
        if case.part != "gradient":
            continue
        where = f"{case.student}, n={n}, d={d}"
        if case.name in LIMITS_MS and (n, d) == SIZE:
            measured = statistics.median(taken) * 1e3
            found.append((f"{case.name}, ms, {where}", measured, LIMITS_MS[case.name]))
        twin = seconds.get(case._replace(name=TWINS.get(case.name), classes=None))
        if twin is not None and (n, d) == SIZE:
            ratio = harness.median_of(lambda a, b: a / b, taken, twin)
            claim = f"{case.name} / {TWINS[case.name]}, {case.classes} classes"
            found.append((f"{claim}, {where}", ratio, RATIO))
        few = seconds.get(case._replace(classes=classes[0]))
        if case.name in FLAT and case.classes == classes[-1] != classes[0]:
            ratio = harness.median_of(lambda a, b: a / b, taken, few)
            claim = f"{case.name}, {classes[-1]} / {classes[0]} classes"
            found.append((f"{claim}, {where}", ratio, RATIO))
    return found


def rows_of(seconds, facts, notes, names, n, d, classes) -> list[dict[str, object]]:
    """Makes a record for every distance, number of classes and student."""
    rows = []
    for name, k in cases(names, classes):
        for student in STUDENTS:
            fact = facts.get((name, k, student), {})
            row = {"distance": name, "n": n, "d": d, "classes": k, "student": student}
            for part in PARTS:
                taken = seconds.get(Case(name, k, student, part))
                row[f"{part}_ms"] = taken and statistics.median(taken) * 1e3
            row["note"] = notes.get(name)
            for key in ("iterations", "memory", "largest"):
                row[key] = fact.get(key)
            rows.append(row)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Makes the table, with one line per distance for both students."""
    columns = ["distance", "n", "d", "classes"]
    for student in STUDENTS:
        columns += [f"{student}: value ms", "and gradient ms", "iterations"]
    columns += ["memory MB"]
    lines = []
    for unrelated, aligned in zip(rows[::2], rows[1::2], strict=True):
        line = [unrelated[key] for key in ("distance", "n", "d", "classes")]
        for row in (unrelated, aligned):
            line += [row["note"] or row["value_ms"], row["gradient_ms"]]
            line += [row["iterations"]]
        memory = unrelated["memory"]
        lines.append([*line, None if memory is None else memory / 1e6])
    return harness.markdown(columns, lines)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--n", type=int, nargs="+", default=[SIZE[0]], help="samples")
    add("--d", type=int, nargs="+", default=[SIZE[1]], help="features")
    add("--classes", type=int, nargs="+", default=CLASSES, help="ascending")
    add("--rounds", type=int, default=30)
    add(
        "--minutes",
        type=float,
        default=10,
        help="then at most three rounds of a size",
    )
    add("--distances", nargs="+", help='keys, or "key/choice" such as w2/exact')
    add("--json", metavar="FILE", help="also write the rows to FILE")
    add("--no-assert", action="store_true", help="measure only")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table and checks the claims."""
    args = parse_args()
    names = args.distances or [v for k in DISTANCES for v in VARIANTS.get(k, (k,))]
    deadline = time.perf_counter() + 60 * args.minutes
    classes, rows, structural, timed = tuple(args.classes), [], [], []
    for n in args.n:
        for d in args.d:
            seconds, facts, notes = measure(names, n, d, args, deadline)
            rows += rows_of(seconds, facts, notes, names, n, d, classes)
            structural += claims_of_arrays(facts, n, d, classes)
            timed += claims_of_time(seconds, n, d, classes)
    report = {
        "device": harness.device_name(),
        "versions": harness.versions("optax", "ott-jax"),
        "rounds": args.rounds,
        "load_average": harness.load_average(),
        "rows": rows,
        "claims": structural + timed,
    }
    harness.write_json(args.json, report)
    installed = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    print(f"float32; {report['device']}")
    print(f"{installed}; load average {report['load_average']}\n")
    print(table(rows))
    print("\n" + harness.markdown(["claim", "measured", "limit"], report["claims"]))
    on_cpu = jax.default_backend() == "cpu" and not args.no_assert
    checked = structural + (timed if on_cpu else [])
    broken = [claim for claim in checked if claim[1] > claim[2]]
    assert not broken, f"claims that failed: {broken}"
    print("\nAll claims hold." if on_cpu else "\nTimes not asserted.")


if __name__ == "__main__":
    main()
