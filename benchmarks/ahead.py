"""Compiles the distillation step for an accelerator that is not present.

    pip install libtpu                                  # part of ".[tpu]"
    python benchmarks/ahead.py --target tpu-v5e
    pip install jax-cuda12-plugin jax-cuda12-pjrt       # part of ".[cuda]"
    python benchmarks/ahead.py --target h200 --batch-size 1024

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

# The compilers need neither a device nor its driver.  Without these, libtpu would ask
# Google Cloud for the type of the machine; the described topology overrides the type.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import re
import time
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
from distances import class_cost, class_means
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_step import TX, make_step, networks, none
from step import KD2M
from workload import CLASSES, Setting

from kddm_jax import DISTANCES, Term, resnet, train_step

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

    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = [
        jax.eval_shape(model.init, jax.random.key(0), image)
        for model in (student, teacher)
    ]
    state = jax.eval_shape(lambda v: train_step.create_state(v, TX), variables[0])
    own = (len(devices), args.steps, args.batch_size // len(devices))
    data = jax.eval_shape(partial(teacher_data, args.width))
    lowered = program.lower(
        abstract(state),
        abstract(variables[1]),
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


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ["none", *DISTANCES]
    add = parser.add_argument
    add("--target", choices=list(TARGETS), default="h200")
    add("--devices", type=int, default=1, help="devices of one program, up to 8")
    add("--distances", nargs="+", choices=every, default=every)
    add("--batch-size", type=int, default=128, help="images on all devices")
    add("--width", type=int, default=64)
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--steps", type=int, default=10, help="steps of a dispatch")
    add("--no-assert", action="store_true", help="compile only")
    add("--json", metavar="FILE", help="also write the rows to FILE")
    args = parser.parse_args()
    for field in ("batch_size", "width", "steps"):
        if getattr(args, field) < 1:
            option = field.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {getattr(args, field)}")
    if not 1 <= args.devices <= 8 or args.batch_size % args.devices:
        parser.error(
            f"--devices must be 1 to 8 and divide --batch-size, got {args.devices} "
            f"and {args.batch_size}"
        )
    return args


def find_devices(target: Target) -> list[jax.Device]:
    """Returns devices that are described but not present."""
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
    """Compiles, prints the table and checks the claims."""
    args = parse_args()
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
