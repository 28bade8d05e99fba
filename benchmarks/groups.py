"""What a distance costs a device when features are gathered within groups of devices.

    python benchmarks/groups.py                    # global batches of 1,024 and 4,096
    python benchmarks/groups.py --n 8192 --groups 1 8 64 --distances w2

Every device computes value and gradient of its group's problem, ``[n / groups, d]``;
one group is the whole batch.  Milliseconds and memory are those of that problem alone,
on one device, without the gathering.  "value" is the mean over groups, as a share of
the whole batch's distance: groups are another loss.  Asserts, on a CPU, that with four
groups no distance takes more than half of its time without (RATIO).
"""

import os

# Before the first import of NumPy or JAX, see distances.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import statistics
import time
from collections.abc import Mapping

import distances
import harness
import jax

DEFAULT = ("w2", "cw2", "w2_gaussian", "mmd_rbf")
RATIO, GROUPS = 0.5, 4  # what is claimed of four groups


def split(arrays: list[jax.Array], kinds: list[str], groups: int) -> list[list]:
    """The arguments of every group; keys are those of all."""
    parts = [
        [array] * groups if kind == "key" else list(array.reshape(groups, -1, *rest))
        for kind, array in zip(kinds, arrays, strict=True)
        for rest in [array.shape[1:]]
    ]
    return [list(group) for group in zip(*parts, strict=True)]


def measure(n: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """A record of every distance and number of groups of one global batch."""
    batch = distances.make_batch(n, args.d, "unrelated", args.classes)
    calls, rows = {}, []
    for name in args.distances:
        programs = distances.Programs(name)
        kinds = [k for k in programs.row.inputs for _ in batch[k]]
        whole = None
        for groups in args.groups:
            parts = split(programs.arrays(batch), kinds, groups)
            made = programs.compile(parts[0], args.classes)
            value = statistics.fmean(float(made["value"](*part)) for part in parts)
            whole = value if whole is None else whole
            rows.append(
                {
                    "distance": name,
                    "n": n,
                    "groups": groups,
                    "images": n // groups,
                    "memory": made["memory"],
                    "value": value / whole,
                }
            )
            calls[name, groups] = lambda f=made["gradient"], a=parts[0]: (
                jax.block_until_ready(f(*a))
            )
    deadline = time.perf_counter() + 60 * args.minutes
    seconds = harness.interleaved(calls, args.rounds, deadline, most=10)
    for row in rows:
        taken = seconds[row["distance"], row["groups"]]
        row["ms"] = statistics.median(taken) * 1e3
    return rows


def claims(rows: list[Mapping[str, object]]) -> list[tuple[str, float, float]]:
    """``(claim, measured, limit)`` of four groups against the whole batch."""
    ms = {(row["distance"], row["n"], row["groups"]): row["ms"] for row in rows}
    return [
        (f"{name}, n={n}, {GROUPS} groups / whole", taken / ms[name, n, 1], RATIO)
        for (name, n, groups), taken in ms.items()
        if groups == GROUPS and (name, n, 1) in ms
    ]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--n", type=int, nargs="+", default=[1024, 4096], help="global batches")
    add("--d", type=int, default=512, help="features")
    add("--groups", type=int, nargs="+", default=[1, 4, 16], help="the whole first")
    add("--classes", type=int, default=100)
    add("--rounds", type=int, default=5)
    add("--minutes", type=float, default=5, help="then three rounds of a size at most")
    add("--distances", nargs="+", default=DEFAULT, help='keys, or "key/choice"')
    add("--json", metavar="FILE", help="write the rows there too")
    add("--no-assert", action="store_true", help="measure only")
    args = parser.parse_args()
    for n in args.n:
        for groups in args.groups:
            if n % groups:
                parser.error(f"--groups {groups} does not divide --n {n}")
    return args


def main() -> None:
    """Measures, prints the table, checks the claim."""
    args = parse_args()
    rows = [row for n in args.n for row in measure(n, args)]
    report = {
        "device": harness.device_name(),
        "versions": harness.versions("ott-jax"),
        "load_average": harness.load_average(),
        "rows": rows,
        "claims": claims(rows),
    }
    harness.write_json(args.json, report)
    installed = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    print(f"float32, d={args.d}; {report['device']}")
    print(f"{installed}; load average {report['load_average']}\n")
    columns = [
        "distance",
        "n",
        "groups",
        "images of a group",
        "ms",
        "memory MB",
        "value",
    ]
    cells = [
        [row[k] for k in ("distance", "n", "groups", "images", "ms")]
        + [row["memory"] and row["memory"] / 1e6, row["value"]]
        for row in rows
    ]
    print(harness.markdown(columns, cells))
    print("\n" + harness.markdown(["claim", "measured", "limit"], report["claims"]))
    asserted = jax.default_backend() == "cpu" and not args.no_assert
    broken = [claim for claim in report["claims"] if claim[1] > claim[2]]
    assert not (asserted and broken), f"claims that failed: {broken}"
    print("\nAll claims hold." if asserted else "\nTimes not asserted.")


if __name__ == "__main__":
    main()
