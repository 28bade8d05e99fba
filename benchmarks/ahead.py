"""Predicts the cost of each distance on an accelerator, or compiles the step for one.

    python benchmarks/ahead.py                          # the share of a step, predicted
    pip install libtpu                                  # part of ".[tpu]"
    python benchmarks/ahead.py --target tpu-v5e
    pip install jax-cuda12-plugin jax-cuda12-pjrt       # part of ".[cuda]"
    python benchmarks/ahead.py --target h200 --batch-size 1024

Without a target, the script counts operations and bytes of each distance with its
gradient and of the step without a distance (`roofline`), and prints the least time of a
distance over that of the step.  On an accelerator, it also prints the measured share.

XLA's compilers for TPUs and GPUs run on any Linux machine, given a description of the
device.  The step is that of ``cifar.py`` with plain SGD, mapped by shard_map: ResNet34
to ResNet18, CIFAR stem, bfloat16, ten steps per dispatch.  The compiled program shows
whether each distance compiles, how much memory it takes, and what would make the device
wait, but not how long it takes.  The script asserts that the step compiles with every
distance that takes such features and fits the device's memory; that the whole state is
donated; that all convolutions are in the requested dtype; that a dispatch has no
callbacks, feeds or transfers to the host; and that KD2M's distances decompose no matrix
(except by QR, if the batch has more than twice as many samples as features).  On a GPU
it also counts open loops, whose length only the device knows, so the host reads before
each iteration whether to continue.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import inspect
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import roofline
from distances import class_cost, class_means, make_batch
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_step import TX, make_step, networks, none
from step import KD2M
from step import measure as measure_steps
from workload import CLASSES, Setting

from kddm_jax import DISTANCES, Term, distill_loss, resnet, train_step

IMAGES = 50_000  # as CIFAR-10

# XLA's description of a GPU (stream_executor::GpuTargetConfigProto) with the numbers of
# a Hopper, memory and bandwidth from NVIDIA's data sheets, and libraries as JAX needs.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""


class Target(NamedTuple):
    """Describes an accelerator.

    Attributes:
      platform: JAX's name of the platform.
      memory: memory of a device in bytes.
      options: options of ``topologies.get_topology_desc``.
    """

    platform: str
    memory: float
    options: dict[str, str]


def _hopper(name: str, memory: float, bandwidth: float) -> Target:
    config = HOPPER.format(name=name, memory=int(memory), bandwidth=int(bandwidth))
    options = {"topology_name": name, "topology": "1x1x8", "target_config": config}
    return Target("cuda", memory, options)


TARGETS = {
    "tpu-v5e": Target("tpu", 16e9, {"topology_name": "v5e:2x4"}),
    "tpu-v6e": Target("tpu", 32e9, {"topology_name": "v6e:2x4"}),
    "h100": _hopper("NVIDIA H100 80GB HBM3", 80e9, 3.35e12),
    "h200": _hopper("NVIDIA H200", 141e9, 4.8e12),
}
# Patterns in a compiled program: loops of unknown length; callbacks, feeds and
# transfers; and decompositions, by the names of the traced functions.
OPEN_LOOP = re.compile(r" while\((?!.*known_trip_count).*")
HOST = re.compile(r" (?:in|out)feed\(|is_host_transfer=true|callback")
DECOMPOSED = re.compile(r"[(/](svd|eigh|qr|cholesky|lu)[)/\"]")
CONVOLUTION = re.compile(r"stablehlo\.convolution\(.*\) -> tensor<\d[\dx]*x(\w+)>")
SHORT = {"bf16": "bfloat16", "f32": "float32"}


def term_of(name: str, *models: resnet.ResNet) -> Term:
    """Makes the Term of a distance for these networks, with its layers and options."""
    if name == "none":
        return Term(none, weight=0.0, name=name)
    row = DISTANCES[name]
    last = tuple(f"stage{len(m.blocks)}_block{m.blocks[-1]}" for m in models)
    return Term(
        row,
        layers=last if "maps" in row.inputs else None,
        name=name,
    )


def teacher_data(width: int) -> dict[str, jax.Array]:
    """Makes the arrays of a teacher that distances need in addition to outputs."""
    return {
        "class_cost": class_cost(CLASSES),
        "class_means": class_means(CLASSES, 8 * width),
    }


def described(student: resnet.ResNet, teacher: resnet.ResNet):
    """Describes the state of the step and the teacher's variables, without arrays."""
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = [
        jax.eval_shape(model.init, jax.random.key(0), image)
        for model in (student, teacher)
    ]
    state = jax.eval_shape(lambda v: train_step.create_state(v, TX), variables[0])
    return state, variables[1]


def lower(name: str, devices: Sequence[jax.Device], args: argparse.Namespace):
    """Returns the lowered program of the steps, and the bytes of its state."""
    setting = Setting("cifar", args.width, args.batch_size, args.dtype)
    student, teacher = networks(setting)
    term = term_of(name, student, teacher)
    step = make_step(setting, student, teacher, distance=[term])
    program = train_step.parallel(
        train_step.scan_steps(step),
        in_axes=(None, None, None, None, 0, None),
        donate=(0,),
        devices=devices,
        how="shard_map",
    )
    mesh = Mesh(np.array(devices), (train_step.AXIS,))

    def abstract(tree, *spec):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        of = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
        return jax.tree.map(of, tree)

    state, variables = described(student, teacher)
    own = (len(devices), args.steps, args.batch_size // len(devices))
    data = jax.eval_shape(partial(teacher_data, args.width))
    lowered = program.lower(
        abstract(state),
        abstract(variables),
        abstract(jax.ShapeDtypeStruct((IMAGES, 32, 32, 3), jnp.uint8)),
        abstract(jax.ShapeDtypeStruct((IMAGES,), jnp.int32)),
        abstract(jax.ShapeDtypeStruct(own, jnp.int32), train_step.AXIS),
        abstract(data),
    )
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    return lowered, size


def measure(name: str, devices: Sequence[jax.Device], args) -> dict[str, object]:
    """Makes the row of a distance, with a note if nothing can be compiled."""
    try:
        lowered, state = lower(name, devices, args)
    except ImportError as error:
        return {"distance": name, "note": harness.missing_package(error)}
    except ValueError as error:  # for example, too few samples
        return {"distance": name, "note": str(error).partition(";")[0]}
    dtypes = [SHORT.get(d, d) for d in CONVOLUTION.findall(lowered.as_text())]
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except RuntimeError as error:  # XLA's errors, such as too little memory
        first = str(error).partition("\n")[0]
        return {"distance": name, "failed": True, "note": f"fails: {first[:100]}"}
    seconds = time.perf_counter() - start
    plan, text = compiled.memory_analysis(), compiled.as_text()
    of_gpu = devices[0].platform in ("gpu", "cuda")
    return {
        "distance": name,
        "compile_s": seconds,
        "memory_gb": harness.planned_bytes(compiled) / 1e9,
        "temporary_gb": plan.temp_size_in_bytes / 1e9,
        "state_mb": state / 1e6,
        "donated_mb": plan.alias_size_in_bytes / 1e6,
        "convolutions": len(dtypes),
        "of_dtype": dtypes.count(args.dtype),
        "host": len(HOST.findall(text)),
        "open_loops": len(OPEN_LOOP.findall(text)) if of_gpu else None,
        "decomposed": sorted({*DECOMPOSED.findall(text)}),
        "all_reduces": len(re.findall(r" all-reduce(?:-start)?\(", text)),
        "all_gathers": len(re.findall(r" all-gather(?:-start)?\(", text)),
    }


def claims(rows: list[dict], memory: float, *, tall: bool) -> list[tuple]:
    """Returns ``(claim, measured, limit)`` of every row; measured <= limit must hold.

    Args:
      rows: from `measure`.
      memory: memory of the device in bytes.
      tall: whether a batch has more than twice as many samples as features.
    """
    found = []
    for row in rows:
        name = row["distance"]
        if "note" in row and "failed" not in row:
            continue
        found.append((f"{name}: errors of the compiler", int("failed" in row), 0))
        if "failed" in row:
            continue
        kept = row["state_mb"] - row["donated_mb"]
        other = row["convolutions"] - row["of_dtype"]
        found += [
            (f"{name}: memory, GB", row["memory_gb"], memory / 1e9),
            (f"{name}: state that is not donated, MB", kept, 0),
            (f"{name}: convolutions in another dtype", other, 0),
            (f"{name}: callbacks, feeds, transfers to the host", row["host"], 0),
        ]
        if name in KD2M:
            spared = {"qr"} if tall else set()
            slow = {*row["decomposed"]} - spared
            found.append((f"{name}: decompositions", len(slow), 0))
    return found


# ---------------------------------------------------------------------------
# The predicted share of a step.

GOAL = 0.05  # of the step without a distance
SIZES = (128, 1024, 4096)
DEVICES = 8  # of a batch that is split
# Options that make a distance cheaper, in addition to the default options.
CHEAPER = {
    "w2_gaussian/diag": {"covariance": "diag"},
    "cw2_gaussian/diag": {"covariance": "diag"},
    "wkd_logits/iterations": {"iterations": 10},
    "w2/entropic": {"solver": "entropic"},
    "cw2/entropic": {"solver": "entropic"},
    "jw2/entropic": {"solver": "entropic"},
}
ITERATIVE = ("w2", "cw2", "jw2", "wkd_logits")  # run to find the passes of the loop
# Nested loops of unknown length; with one pass of each, the shares are lower bounds.
AT_LEAST = ("gromov_w2",)


def options_of(name: str) -> tuple[str, dict[str, object]]:
    """Returns key and options; the method is that of accelerators, not of a CPU."""
    key, options = name.partition("/")[0], CHEAPER.get(name, {})
    if "method" in inspect.signature(DISTANCES[key].fn).parameters:
        options = {**options, "method": "newton_schulz"}
    return key, options


def passes_of(name: str, batch: int, width: int) -> float:
    """Runs a distance on random features to find the passes of its open loops.

    Returns:
      The larger number for an unrelated and an aligned student; 1 for distances that
      are not in `ITERATIVE`.
    """
    key, options = options_of(name)
    row, most = DISTANCES[key], 1.0
    if key not in ITERATIVE:
        return most
    options = {**dict(row.options), **options}
    iterations = jax.jit(lambda *a: row.diagnose(*a, **options)[1]["iterations"])
    for student in ("unrelated", "aligned"):
        arrays = make_batch(batch, 8 * width, student, CLASSES)
        found = iterations(*(array for kind in row.inputs for array in arrays[kind]))
        most = max(most, float(found))
    return most


def distance_program(name: str, batch: int, width: int):
    """Returns a loss of this distance with its gradient, and the arguments' shapes."""
    key, options = options_of(name)
    of = jax.ShapeDtypeStruct
    term = term_of(key, *networks(Setting("cifar", width, batch, "bfloat16")))
    term = replace(term, options=options)
    features = of((batch, 8 * width), jnp.float32)
    if term.layers:
        features = of((batch, 4, 4, 8 * width), jnp.bfloat16)
    own, guide = term.layers or ("features", "features")
    logits = of((batch, CLASSES), jnp.float32)

    def loss(student, teacher, labels, data, random):
        return distill_loss(
            {own: student[0]},
            {guide: teacher[0]},
            labels,
            student[1],
            teacher[1],
            distance=[term],
            weight=1.0,
            task_weight=0.0,
            teacher_data=data,
            key=random,
        )[0]

    return jax.value_and_grad(loss), (
        (features, logits),
        (features, logits),
        of((batch,), jnp.int32),
        jax.eval_shape(partial(teacher_data, width)),
        jax.eval_shape(lambda: jax.random.key(0)),
    )


def count_step(batch: int, width: int) -> roofline.Counts:
    """Counts one step without a distance."""
    setting = Setting("cifar", width, batch, "bfloat16")
    student, teacher = networks(setting)
    step = make_step(
        setting, student, teacher, distance=none, weight=0.0, axis_name=None
    )
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return roofline.count(step, *described(student, teacher), images, labels)


def count_distance(name: str, batch: int, width: int) -> dict[str, object]:
    """Counts a distance and its gradient, or gives a note."""
    found = {"distance": name, "batch": batch}
    try:
        fn, args = distance_program(name, batch, width)
        passes = passes_of(name, batch, width)
        counts = roofline.count(fn, *args, passes=passes)
    except ImportError as error:
        return {**found, "note": harness.missing_package(error)}
    except ValueError as error:  # linear_projection at n <= d + 1
        return {**found, "note": "n ≤ d + 1" if "n > d" in str(error) else str(error)}
    decomposed = roofline.decompositions(fn, *args)
    return {**found, "passes": passes, "decomposed": decomposed, "counts": counts}


def predicted(row: dict[str, object], step: roofline.Counts) -> dict[str, object]:
    """Adds the shares of a step to a counted distance."""
    if "note" in row:
        return row
    of = lambda share: {
        name: share(row["counts"], step, device)
        for name, device in roofline.DEVICES.items()
    }
    launched = of(roofline.share_with_launches)["H200"]
    return {**row, "shares": of(roofline.share), "launched": launched}


def joined(rows: list[dict], measured: list[dict]) -> list[dict]:
    """Adds measured shares to predicted ones.

    Args:
      rows: from `predicted`.
      measured: from `step.measure`, on the device.

    Returns:
      The rows; "measured" is the measured share, or None if there is none.
    """
    timed = {
        (row["distance"], row["batch"]): row
        for row in measured
        if row["framework"] == "JAX" and "note" not in row
    }

    def share(row):
        own = timed.get((row["distance"], row["batch"]))
        step = timed.get(("none", row["batch"]))
        if own is None or step is None:
            return None
        return own["distance_ms"] / step["ms_per_step"]

    return [{**row, "measured": share(row)} for row in rows]


def measure_shares(names: Sequence[str], args) -> list[dict]:
    """Measures the steps with these distances on the device, as `step.py` does."""
    options = argparse.Namespace(steps=50, least=0.0, compile=False)
    known = [name for name in names if name in DISTANCES]
    found = []
    for batch in args.batch_size:
        setting = Setting("cifar", args.width, batch, "bfloat16")
        deadline = time.perf_counter() + 60 * args.minutes
        found += measure_steps(setting, ["none", *known], None, options, deadline)
    return found


def over(row: Mapping[str, object]) -> list[str]:
    """Lists the devices on which a row exceeds the goal."""
    return [name for name, share in row.get("shares", {}).items() if share > GOAL]


def percent(share: float | None, at_least: bool = False) -> str | None:
    """Formats a share, in bold above the goal."""
    if share is None:
        return None
    number = f"{100 * share:,.0f}" if share >= 0.1 else f"{100 * share:.2g}"
    text = f"≥ {number} %" if at_least else f"{number} %"
    return f"**{text}**" if share > GOAL else text


def shares_table(rows: list[dict], sizes: Sequence[int]) -> str:
    """Makes the table of shares, with one line for each distance."""
    measured = any(row.get("measured") is not None for row in rows)
    columns = {f"{name}, ": lambda r, name=name: r["shares"][name]
               for name in roofline.DEVICES}  # fmt: skip
    columns["H200 with launches, "] = lambda row: row["launched"]
    if measured:
        columns["measured, "] = lambda row: row["measured"]
    lines = {}
    for row in rows:
        lines.setdefault(row["distance"], {})[row["batch"]] = row
    table = []
    for name, by_size in lines.items():
        cells = [
            row.get("note") or percent(column(row), name in AT_LEAST)
            for column in columns.values()
            for row in (by_size[size] for size in sizes)
        ]
        devices = sorted({device for row in by_size.values() for device in over(row)})
        largest = by_size[sizes[-1]]
        by = ", ".join(largest.get("decomposed", ())) or None
        table.append([name, *cells, by, ", ".join(devices) or None])
    head = [f"{column}{size:,}" for column in columns for size in sizes]
    return harness.markdown(["distance", *head, "decomposed by", "over 5 %"], table)


def split(rows: Sequence[dict], args) -> list[dict]:
    """Predicts shares of a step whose largest batch is split over `DEVICES` devices.

    Args:
      rows: from `count_distance`.
      args: the command line.

    Returns:
      Two rows for each distance that exceeds the goal and compares whole batches: with
      the whole batch on every device, and with that of the device (``group_size=1``).
    """
    largest = max(args.batch_size)
    own = largest // DEVICES
    exceeding = {row["distance"] for row in rows if over(row)}
    step, found = count_step(own, args.width), []
    for row in rows:
        name = row["distance"]
        averaged = DISTANCES[name.partition("/")[0]].per_sample
        if row["batch"] == largest and name in exceeding and not averaged:
            for of in (row, count_distance(name, own, args.width)):
                found.append(predicted(of, step))
    return found


def split_table(rows: Sequence[dict]) -> str:
    """Makes the table of rows from `split`."""
    lines = []
    for pair in zip(rows[::2], rows[1::2], strict=True):
        name = pair[0]["distance"]
        cells = [
            row.get("note") or percent(row["shares"][device], name in AT_LEAST)
            for device in roofline.DEVICES
            for row in pair
        ]
        lines.append([name, *cells])
    head = [
        f"{device}, {kind}"
        for device in roofline.DEVICES
        for kind in ("whole batch", "group_size=1")
    ]
    return harness.markdown(["distance", *head], lines)


def predict(args: argparse.Namespace) -> None:
    """Counts, prints the shares and, on an accelerator, measures them."""
    start = time.perf_counter()
    names = [name for name in args.distances if name != "none"]
    names += [name for name in CHEAPER if name.partition("/")[0] in names]
    steps = {}
    for batch in args.batch_size:
        steps[batch] = count_step(batch, args.width)
        print(f"step, batch {batch}: {time.perf_counter() - start:.0f} s", flush=True)
    rows = []
    for name in names:
        for batch in args.batch_size:
            row = count_distance(name, batch, args.width)
            rows.append(predicted(row, steps[batch]))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    if jax.default_backend() != "cpu":
        rows = joined(rows, measure_shares(names, args))
    groups = split(rows, args)
    plain = lambda rows: [
        {**row, "counts": row["counts"]._asdict()} if "counts" in row else row
        for row in rows
    ]
    report = {
        "device": harness.device_name(),
        "versions": harness.versions("optax", "ott-jax"),
        "steps": {batch: counts._asdict() for batch, counts in steps.items()},
        "rows": plain(rows),
        "groups": plain(groups),
    }
    harness.write_json(args.json, report)
    lines = [
        [b, c.operations / 1e9, c.bytes / 1e9, c.kernels] for b, c in steps.items()
    ]
    columns = ["batch", "GFLOP of the step", "GB, on a CPU", "kernels, on a CPU"]
    print("\n" + harness.markdown(columns, lines))
    print("\n" + shares_table(rows, args.batch_size))
    largest = max(args.batch_size)
    print(
        f"\nBatch {largest:,}, split over {DEVICES} devices:\n\n{split_table(groups)}"
    )
    installed = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    print(f"\nPredicted, not measured, unless a column says so; {installed}")


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ["none", *DISTANCES]
    add = parser.add_argument
    add("--target", choices=list(TARGETS), help="compile for it; default: predict")
    add("--devices", type=int, default=1, help="devices of one program, up to 8")
    add("--distances", nargs="+", choices=every, default=every)
    add("--batch-size", type=int, nargs="+", help="images on all devices")
    add("--width", type=int, default=64)
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--steps", type=int, default=10, help="steps of a dispatch")
    add("--no-assert", action="store_true", help="compile only")
    add("--minutes", type=float, default=9, help="limit to measure a batch size")
    add("--json", metavar="FILE", help="also write the rows to FILE")
    args = parser.parse_args()
    sizes = args.batch_size or (SIZES if args.target is None else SIZES[:1])
    for option, value in (
        ("batch-size", min(sizes)),
        ("width", args.width),
        ("steps", args.steps),
    ):
        if value < 1:
            parser.error(f"--{option} must be at least 1, got {value}")
    if args.target is None:
        if max(sizes) % DEVICES:
            parser.error(
                f"the largest --batch-size must be a multiple of {DEVICES}, over which "
                f"it is split, got {max(sizes)}"
            )
        args.batch_size = sorted({*sizes})
        return args
    if len(sizes) > 1:
        parser.error(f"--target takes one --batch-size, got {len(sizes)}")
    (args.batch_size,) = sizes
    if not 1 <= args.devices <= 8 or args.batch_size % args.devices:
        parser.error(
            f"--devices must be 1 to 8 and divide --batch-size, got {args.devices} "
            f"and {args.batch_size}"
        )
    return args


def find_devices(target: Target) -> list[jax.Device]:
    """Returns devices that are described but not present."""
    # The compilers need neither a device nor its driver.  Without these, libtpu would
    # ask Google Cloud for the machine's type; the described topology overrides it.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    module = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda12"}[target.platform]
    packages = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin jax-cuda12-pjrt"}
    try:
        import_module(module)
    except ImportError:
        raise SystemExit(
            f"no compiler for {target.platform}: pip install "
            f"{packages[target.platform]}, of JAX's own version"
        ) from None
    try:
        topology = topologies.get_topology_desc(
            platform=target.platform, **target.options
        )
    except Exception as error:  # a plugin may raise any error
        first = str(error).partition("\n")[0]
        raise SystemExit(
            f"the compiler for {target.platform} does not start: {first} (libtpu "
            "serves one process at a time)"
        ) from None
    return list(topology.devices)


def main() -> None:
    """Predicts shares, or compiles, prints the table and checks the claims."""
    args = parse_args()
    if args.target is None:
        predict(args)
        return
    target = TARGETS[args.target]
    devices = find_devices(target)[: args.devices]
    rows = []
    for name in args.distances:
        row = measure(name, devices, args)
        said = row.get("note") or f"compiled in {row['compile_s']:.0f} s"
        print(f"{name}: {said}", flush=True)
        rows.append(row)
    features = 8 * args.width
    tall = args.batch_size > 2 * features
    report = {
        "target": args.target,
        "device": devices[0].device_kind,
        "versions": harness.versions("optax", "ott-jax", "libtpu", "jax-cuda12-pjrt"),
        "args": vars(args),
        "rows": rows,
        "claims": claims(rows, target.memory, tall=tall),
    }
    harness.write_json(args.json, report)
    packages = ("jax", "libtpu" if target.platform == "tpu" else "jax-cuda12-pjrt")
    installed = ", ".join(f"{name} {report['versions'][name]}" for name in packages)
    print(
        f"\nCompiled for {args.devices} x {report['device']}, not run; {installed}; "
        f"ResNet34 to ResNet18, width {args.width}, CIFAR stem, batch "
        f"{args.batch_size}, {args.dtype}, {args.steps} steps a dispatch.\n"
    )
    names = ("memory_gb", "temporary_gb", "donated_mb", "host", "open_loops")
    columns = ["distance", "memory GB", "temporary GB", "donated MB", "to host"]
    columns += ["open loops", "decomposed by", "all-reduce", "all-gather"]
    lines = []
    for row in rows:
        cells = [row.get(name) for name in names]
        if "note" in row:
            cells[0] = row["note"]
        by = ", ".join(row.get("decomposed", ())) or None
        counts = (row.get("all_reduces"), row.get("all_gathers"))
        lines.append([row["distance"], *cells, by, *counts])
    print(harness.markdown(columns, lines))
    broken = [claim for claim in report["claims"] if claim[1] > claim[2]]
    assert args.no_assert or not broken, f"claims that failed: {broken}"
    count = len(report["claims"])
    print("\nNot asserted." if args.no_assert else f"\nAll {count} claims hold.")


if __name__ == "__main__":
    main()
