"""Milliseconds of value and gradient of every distance of the catalogue.

    python benchmarks/distances.py

Features are ReLU outputs ``[n, d]`` like a network's: of a student unrelated to the
teacher (the first steps) and of one aligned with it (the last).  Class rows are
measured at 10 and 100 classes.  All calls take turns in one process; numbers are
medians over the rounds.  On a CPU at the default size it asserts

- exact W2 in 3 ms at most, full Gaussian W2 in 5 ms at most;
- class-conditional in 1.3 times its unconditional twin at most (median over rounds of
  the ratio), at 10 and 100 classes: CW2 (exact, Sinkhorn) and Gaussian CW2.
"""

import os

# Before the first import of NumPy or JAX: OpenBLAS's own threads turn the 1 ms SVD
# of the Gaussian distances into 800 ms when another job keeps a core busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import inspect
import statistics
from collections.abc import Callable, Mapping

import harness
import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.distances import DISTANCES

SIZE = {"n": 128, "d": 512}  # for which the claims are made
LIMITS_MS = {"w2/exact": 3.0, "w2_gaussian": 5.0}
RATIO = 1.3
TWINS = {
    "cw2": "w2",
    "cw2/exact": "w2/exact",
    "cw2/sinkhorn": "w2/sinkhorn",
    "cw2_gaussian": "w2_gaussian",
}
VARIANTS = {  # in place of the row's default
    "w2": ("w2/exact", "w2/sinkhorn", "w2/entropic"),
    "cw2": ("cw2/exact", "cw2/sinkhorn", "cw2/entropic"),
    "w2_gaussian": ("w2_gaussian", "w2_gaussian/newton_schulz", "w2_gaussian/diag"),
}
STUDENTS = ("unrelated", "aligned")
CLASSES = (10, 100)


def make_batch(n: int, d: int, student: str, classes: int) -> dict[str, list]:
    """The arrays that `Distance.inputs` names, student's first."""
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
    }


def required_options(fn: Callable, classes: int) -> dict[str, object]:
    """Options without a default, which a row cannot do without."""
    made = {
        "class_cost": 1 - jnp.eye(classes, dtype=jnp.float32),
        "temperature": 2.0,
    }
    parameters = inspect.signature(fn).parameters.values()
    return {p.name: made[p.name] for p in parameters if p.name in made}


def make_call(name: str, batch: Mapping[str, list], classes: int):
    """The compiled value and gradient, and the iterations of its solver."""
    row, options = harness.parse_distance(name)
    needed = required_options(row.fn, classes)
    options = {**needed, **row.options, **options}
    arrays = [array for kind in row.inputs for array in batch[kind]]
    fn = jax.jit(jax.value_and_grad(lambda *a: row.fn(*a, **options)))
    value, gradient = jax.block_until_ready(fn(*arrays))
    assert np.isfinite(value), f"{name} is not finite"
    assert np.isfinite(gradient).all(), f"the gradient of {name} is not finite"
    iterations = None
    if row.diagnose is not None and options.get("solver") != "exact":
        _, stats = jax.jit(lambda *a: row.diagnose(*a, **options))(*arrays)
        iterations = int(stats["iterations"])
    return lambda: jax.block_until_ready(fn(*arrays)), iterations


def cases(names: list[str]) -> list[tuple[str, int | None]]:
    """``(name, classes)``; classes is None where labels have no part.

    A class-conditional case stands right behind its twin, so that both meet the same
    load in every round.
    """
    result = []
    for name in names:
        labelled = "labels" in harness.parse_distance(name)[0].inputs
        if name in TWINS.values() and not labelled:
            result.append((name, None))
            for conditional, twin in TWINS.items():
                if twin == name and conditional in names:
                    result += [(conditional, classes) for classes in CLASSES]
        elif name not in TWINS:
            result += [(name, k) for k in (CLASSES if labelled else (None,))]
    # A class row whose twin was not asked for.
    alone = [n for n in names if n in TWINS and TWINS[n] not in names]
    return result + [(name, classes) for name in alone for classes in CLASSES]


def claims(seconds: Mapping[tuple, list[float]]) -> list[tuple[str, float, float]]:
    """``(claim, measured, limit)`` of every claim that was measured."""
    found = []
    for (name, classes, student), taken in seconds.items():
        if name in LIMITS_MS:
            measured = statistics.median(taken) * 1e3
            found.append((f"{name}, {student}, ms", measured, LIMITS_MS[name]))
        twin = seconds.get((TWINS.get(name), None, student))
        if twin is not None:
            ratio = harness.median_of(lambda a, b: a / b, taken, twin)
            claim = f"{name} / {TWINS[name]}, {classes} classes, {student}"
            found.append((claim, ratio, RATIO))
    return found


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--n", type=int, default=SIZE["n"], help="samples")
    add("--d", type=int, default=SIZE["d"], help="features")
    add("--rounds", type=int, default=100)
    add("--distances", nargs="+", help='keys, or "key/choice" such as w2/exact')
    add("--json", metavar="FILE", help="write the rows there too")
    add("--no-assert", action="store_true", help="measure only")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table, checks the claims."""
    args = parse_args()
    names = args.distances or [v for k in DISTANCES for v in VARIANTS.get(k, (k,))]
    calls, iterations, notes = {}, {}, {}
    for name, classes in cases(names):
        for student in STUDENTS:
            batch = make_batch(args.n, args.d, student, classes or CLASSES[0])
            case = (name, classes, student)
            try:
                calls[case], iterations[case] = make_call(
                    name, batch, classes or CLASSES[0]
                )
            except ImportError as error:
                notes[case] = harness.missing_package(error)
    # Twins take turns: of every student, not student after student.
    order = sorted(calls, key=lambda case: STUDENTS.index(case[2]))
    seconds = harness.interleaved({case: calls[case] for case in order}, args.rounds)

    rows, lines = [], []
    for name, classes in cases(names):
        line = [name, harness.parse_distance(name)[0].title, classes]
        for student in STUDENTS:
            case = (name, classes, student)
            ms = statistics.median(seconds[case]) * 1e3 if case in seconds else None
            line += [notes.get(case, ms), iterations.get(case)]
            row = dict(zip(("distance", "classes", "student"), case, strict=True))
            rows.append({**row, "ms": ms, "iterations": iterations.get(case)})
        lines.append(line)
    columns = ["distance", "title", "classes"]
    for student in STUDENTS:
        columns += [f"{student} ms", "iterations"]
    report = {
        "device": harness.device_name(),
        "versions": harness.versions("optax", "ott-jax"),
        "n": args.n,
        "d": args.d,
        "rounds": args.rounds,
        "load_average": harness.load_average(),
        "rows": rows,
        "claims": claims(seconds),
    }
    harness.write_json(args.json, report)
    installed = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    print(f"n={args.n}, d={args.d}, float32, value and gradient; {report['device']}")
    print(f"{installed}; load average {report['load_average']}\n")
    print(harness.markdown(columns, lines))
    if report["claims"]:
        print("\n" + harness.markdown(["claim", "measured", "limit"], report["claims"]))
    made_for_it = {"n": args.n, "d": args.d} == SIZE and jax.default_backend() == "cpu"
    if args.no_assert or not made_for_it:
        print("\nClaims not asserted: --no-assert, another size, or no CPU.")
        return
    broken = [claim for claim in report["claims"] if claim[1] > claim[2]]
    assert not broken, f"claims that failed: {broken}"
    print("\nAll claims hold.")


if __name__ == "__main__":
    main()
