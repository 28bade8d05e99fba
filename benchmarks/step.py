"""Measures images per second of the distillation step, compared with PyTorch.

    python benchmarks/step.py                 # sensible settings for this machine
    python benchmarks/step.py --width 64 --stem cifar --batch-size 1024 --dtype bfloat16

A step is crop, flip and normalisation of uint8 images that stay on the device, a
ResNet34 teacher in evaluation mode, a ResNet18 student forward and backward, the
distance and an SGD update with Nesterov momentum, on one device.  All programs of a
setting take turns; PyTorch has its own process.  Networks are random, and the teacher's
statistics are those of a batch.  Asserts that both frameworks run networks with the
same number of parameters, that every loss is finite, and, for the default settings of
this kind of machine, the times and shares of `LIMITS`.
"""

import os

# Before the first import of NumPy or JAX: OpenBLAS's own threads turn the 1 ms SVD
# of the Gaussian distances into 800 ms when another job keeps a core busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Otherwise JAX would reserve three quarters of a GPU's memory, and PyTorch needs some.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import math
import statistics
import time
from importlib.util import find_spec

import harness
import jax
from jax_step import JaxStep, count_parameters, make_models
from torch_process import TorchProcess, TorchProgram
from workload import Setting, default_settings, make_data, peak_tflops

from kddm_jax.adapters import STEMS

OUT_OF_TIME = "not run: out of time"
ENOUGH = 40.0  # most seconds of a program after three rounds
TRACED = 1.0  # seconds of a trace for gaps, or two dispatches
LEAST = 10.0  # least seconds of a program; medians of one second vary by a tenth
# Limits for the default settings of each platform. By stem: the step's time over
# PyTorch's. For the largest setting: the step's time with a distance of KD2M over that
# without, and the least share of the device's peak in bfloat16.
LIMITS = {
    "cpu": {"imagenet": 1.0, "cifar": 1.6, "distance": 1.05},
    "gpu": {"cifar": 1.0, "distance": 1.1, "peak": 0.3},
}
KD2M = ("w2", "cw2", "jw2", "w2_gaussian", "cw2_gaussian", "kl_gaussian")
SLOW = "w2_gaussian/svd"  # for comparison, on accelerators


def start_torch(args: argparse.Namespace) -> TorchProcess | None:
    """Starts PyTorch's process; returns None if it is absent or not wanted."""
    if args.no_torch or not (args.torch_python or find_spec("torch")):
        return None
    try:
        return TorchProcess(args.torch_python, args.torch_threads)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"PyTorch does not start: {error}") from None


def wanted_programs(distances, torch, args) -> list[tuple[str, str]]:
    """Lists ``(framework, distance)`` of every row; PyTorch has few distances."""
    wanted = [("JAX", distance) for distance in distances]
    if torch is None:
        return wanted
    frameworks = ["PyTorch eager"]
    if args.compile or torch.hello["cuda"]:
        frameworks.append("PyTorch compile")
    known = [distance for distance in distances if distance in torch.hello["distances"]]
    return wanted + [(framework, d) for framework in frameworks for d in known]


def make_programs(setting, data, wanted, torch, deadline):
    """Makes programs by ``(framework, distance)``, and notes on missing ones."""
    programs, notes = {}, {}
    models = None
    for framework, distance in wanted:
        if time.perf_counter() > deadline:
            notes[framework, distance] = OUT_OF_TIME
            continue
        try:
            models = models or make_models(setting, data.images)
            if framework == "JAX":
                program = JaxStep(setting, distance, data, models)
            else:
                weight = 0.0
                if distance != "none":
                    weight = harness.weight_of(harness.parse_distance(distance)[0])
                program = TorchProgram(
                    torch,
                    setting,
                    distance,
                    weight=weight,
                    steps=len(data.indices),
                    compiled=framework == "PyTorch compile",
                )
                ours = tuple(count_parameters(variables) for _, variables in models)
                theirs = program.parameters
                assert ours == theirs, f"parameters: JAX {ours}, PyTorch {theirs}"
        except ImportError as error:
            notes[framework, distance] = harness.missing_package(error)
        except ValueError as error:  # it needs maps or a cost, which this step lacks
            if distance == "none":
                raise
            notes[framework, distance] = str(error).partition(";")[0]
        except RuntimeError as error:  # such as too little memory
            if framework == "JAX" and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            notes[framework, distance] = f"failed: {type(error).__name__}"
            print(f"{framework}, {distance}: {error}", flush=True)
        else:
            programs[framework, distance] = program
            label = f"{framework} {distance}, {' '.join(map(str, setting))}"
            print(f"{label}: first step {program.first_s:.1f} s", flush=True)
    return programs, notes


def measure(setting, distances, torch, args, deadline) -> list[dict]:
    """Measures one setting; returns its rows."""
    # XLA:CPU is many times slower inside a loop, so a dispatch is one step there.
    steps = 1 if jax.default_backend() == "cpu" else min(10, args.steps)
    data = make_data(setting.batch, steps)
    wanted = wanted_programs(distances, torch, args)
    programs, notes = make_programs(setting, data, wanted, torch, deadline)
    rounds = math.ceil(args.steps / steps)
    seconds = harness.interleaved(
        programs, rounds, deadline, least=args.least, most=ENOUGH
    )
    base = programs.get(("JAX", "none"))
    flops = None if base is None else base.flops()
    peak = peak_tflops(jax.devices()[0].device_kind)
    rows = []
    for (framework, distance), program in programs.items():
        taken, plain = seconds[framework, distance], seconds.get((framework, "none"))
        per_step = statistics.median(taken) / steps
        extra = None
        if distance != "none" and plain is not None:
            extra = harness.median_of(lambda a, b: a - b, taken, plain) / steps * 1e3
        gap = None
        if framework == "JAX" and time.perf_counter() < deadline:
            fitting = int(TRACED / (per_step * steps))
            gap = program.gap_ms(min(max(fitting, 2), 20))
        share = flops and peak and flops / per_step / (peak * 1e12)
        rows.append(
            {
                **setting._asdict(),
                "framework": framework,
                "distance": distance,
                "images_per_s": setting.batch / per_step,
                "ms_per_step": per_step * 1e3,
                "distance_ms": extra,
                "gap_ms": gap,
                "tflops": flops and flops / per_step / 1e12,
                "share_of_peak": share,
                "first_step_s": program.first_s,
                "memory_gb": program.memory_gb(),
                "iterations": program.iterations,
                "loss": program.losses[-1],
                "finite": all(map(math.isfinite, program.losses)),
            }
        )
    common = setting._asdict()
    for (framework, distance), note in notes.items():
        rows.append(
            {**common, "framework": framework, "distance": distance, "note": note}
        )
    return rows


def claims(
    rows: list[dict], platform: str, *, same_device: bool
) -> list[tuple[str, float, float]]:
    """Compares the rows with `LIMITS`; returns ``(claim, measured, limit)``.

    Args:
      rows: from `measure`.
      platform: JAX's platform.
      same_device: whether PyTorch ran on the device that JAX ran on.

    Returns:
      An empty list for a platform without limits.
    """
    if platform not in LIMITS:
        return []
    limits, found, settings = LIMITS[platform], [], {}
    left_out = () if platform == "cpu" else (SLOW,)
    claimed = lambda name: name.partition("/")[0] in KD2M and name not in left_out
    for row in rows:
        if "note" not in row:
            setting = Setting(*(row[field] for field in Setting._fields))
            settings.setdefault(setting, {})[row["framework"], row["distance"]] = row
    known = default_settings(platform)
    largest = max(setting.batch for setting in known)
    for setting in known:
        programs = settings.get(setting, {})
        plain = programs.get(("JAX", "none"))
        if plain is None:
            continue
        stem, width, batch, dtype = setting
        name = f"{stem}, width {width}, batch {batch}, {dtype}"
        whole = (stem, width, batch) == ("cifar", 64, largest)
        for (framework, distance), row in programs.items():
            if framework != "JAX" and distance == "none" and same_device:
                ratio = plain["ms_per_step"] / row["ms_per_step"]
                found.append((f"{name}: JAX / {framework}", ratio, limits[stem]))
            elif framework == "JAX" and whole and claimed(distance):
                ratio = 1 + row["distance_ms"] / plain["ms_per_step"]
                found.append((f"{name}: {distance} / none", ratio, limits["distance"]))
        share = plain["share_of_peak"]
        if whole and share and "peak" in limits and dtype == "bfloat16":
            least = f"{limits['peak']:.0%} of the peak"
            found.append((f"{name}: {least} / ours", limits["peak"] / share, 1.0))
    return found


COLUMNS = {
    "stem": "stem",
    "width": "width",
    "batch": "batch",
    "dtype": "dtype",
    "framework": "framework",
    "distance": "distance",
    "images_per_s": "images/s",
    "ms_per_step": "ms/step",
    "distance_ms": "distance ms",
    "gap_ms": "gap ms",
    "tflops": "TFLOP/s",
    "share_of_peak": "of peak",
    "first_step_s": "first step s",
    "memory_gb": "memory GB",
}


def table(rows: list[dict]) -> str:
    """Makes the table, with notes in the column of images per second."""
    lines = []
    for row in rows:
        shown = dict(row)
        if "note" in row:
            shown["images_per_s"] = row["note"]
        if shown.get("share_of_peak") is not None:
            shown["share_of_peak"] = f"{shown['share_of_peak']:.1%}"
        elif "note" not in row:
            shown["share_of_peak"] = "unknown"
        lines.append([shown.get(key) for key in COLUMNS])
    return harness.markdown(list(COLUMNS.values()), lines)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--batch-size", type=int, nargs="+", help="default depends on the machine")
    add("--width", type=int, nargs="+", help="channels of the first stage")
    add("--stem", nargs="+", choices=list(STEMS))
    add("--dtype", nargs="+", choices=["float32", "bfloat16"])
    add("--distances", nargs="+", help='keys, or "key/choice" such as w2/exact')
    add(
        "--steps",
        type=int,
        help="timed steps of a row; default: 25 or 100, and ten seconds",
    )
    add("--json", metavar="FILE", help="also write the rows to FILE")
    add("--no-torch", action="store_true", help="leave PyTorch out")
    add("--torch-python", metavar="FILE", help="another Python that has PyTorch")
    add("--torch-threads", type=int, help="PyTorch's threads on a CPU; default: all")
    add("--compile", action="store_true", help="use torch.compile also without CUDA")
    add("--minutes", type=float, default=9, help="start no new row after these")
    add("--no-assert", action="store_true", help="measure only")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table and checks the claims."""
    args, start = parse_args(), time.perf_counter()
    backend = jax.default_backend()
    torch = start_torch(args)
    hello = torch and torch.hello
    args.least = 0.0 if args.steps else LEAST
    args.steps = args.steps or (25 if backend == "cpu" else 100)
    other = [] if backend == "cpu" else [SLOW]
    distances = args.distances or ["w2_gaussian", "cw2_gaussian", "w2", "cw2", *other]
    distances = ["none", *(d for d in distances if d != "none")]
    for distance in distances[1:]:
        harness.parse_distance(distance)  # finds typing errors before anything compiles

    settings = default_settings(backend)
    for field, values in zip(
        Setting._fields,
        (args.stem, args.width, args.batch_size, args.dtype),
        strict=True,
    ):
        if values:
            settings = [s._replace(**{field: v}) for s in settings for v in values]
    report = {
        "device": harness.device_name(),
        "platform": backend,
        "versions": harness.versions("optax", "ott-jax"),
        "load_average": harness.load_average(),
        "torch": hello,
        "rows": [],
    }
    for setting in dict.fromkeys(settings):
        deadline = start + 60 * args.minutes
        torch = torch or start_torch(args)
        report["rows"] += measure(setting, distances, torch, args, deadline)
        if torch is not None:  # also frees its memory
            torch.close()
            torch = None
        harness.write_json(args.json, report)
    same_device = bool(hello) and hello["cuda"] == (backend == "gpu")
    report["claims"] = claims(report["rows"], backend, same_device=same_device)
    harness.write_json(args.json, report)

    installed = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    if hello:
        installed += f", torch {hello['version']} ({hello['threads']} threads)"
    print(f"\n{report['device']} ({backend}); {installed}")
    print(f"Load average at the start: {report['load_average']}.\n")
    print(table(report["rows"]))
    print(
        "\nAll numbers are medians. Distance ms: step with the distance minus step "
        "without, over rounds. Gap ms: idle time of the device in a step, with "
        "dispatches queued as in training (profiler). TFLOP/s: multiply-adds of the "
        "step without a distance as XLA counts them, without padding. Peak: dense "
        "bfloat16, also for float32. Memory: XLA's plan, or PyTorch's allocations on "
        "CUDA. PyTorch computes float32 convolutions in TF32 on CUDA, as XLA does."
    )
    if not hello and not args.no_torch:
        print("\nPyTorch is not installed, so it has no rows.")
    infinite = [row for row in report["rows"] if not row.get("finite", True)]
    assert not infinite, f"losses that are not finite: {infinite}"
    if report["claims"]:
        columns = ["claim", "measured", "limit"]
        print("\n" + harness.markdown(columns, report["claims"]))
    broken = [claim for claim in report["claims"] if claim[1] > claim[2]]
    assert args.no_assert or not broken, f"claims that failed: {broken}"
    missing = [row for row in report["rows"] if "note" in row]
    if missing:
        print(f"\n{len(missing)} programs were not measured; their claims are open.")
    count = len(report["claims"])
    held = f"All {count} claims hold." if count else "No claim was checked."
    print("\nTimes not asserted." if args.no_assert else f"\n{held}")


if __name__ == "__main__":
    main()
