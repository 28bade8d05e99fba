"""Runs the experiment command in tests, and reads the files that it writes."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax

import kddm_jax
from kddm_jax import checkpoint
from kddm_jax.experiment import distill

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
DISTANCE_NAMES = ("w2", "w2_gaussian")
# Teacher and student have the same shapes, so that they share their compiled step.
TINY = (
    *("--dataset", "digits", "--recipe", "laptop"),
    *("--teacher-model", "ResNet9", "--student-model", "ResNet9", "--width", "4"),
    *("--teacher-epochs", "2", "--epochs", "2", "--batch-size", "32"),
    *("--lr", "0.02"),  # small: rounding errors do not grow from step to step
    *("--train-images", "128", "--student-images", "128", "--test-images", "100"),
    *("--seeds", "1", "--distances", *DISTANCE_NAMES, "--no-equal-compute"),
    *("--normalization", "teacher", "--degrees", "0", "--eval-every", "1"),
    *("--unlabelled-images", "0"),
)
# For tests of runs whose results do not depend on the network.
NETWORK = "small_network:Small"
SMALL = (*TINY, "--teacher-model", NETWORK, "--student-model", NETWORK)


# ---------------------------------------------------------------------------
# Running the command.


# Tests and those subprocesses that name no cache share their compiled programs.
CACHE = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


# Flags of conftest.py and `prefer_eigen`. With them, subprocesses find cached programs.
COMPILER_FLAGS = (
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution",
)


def environ(**more):
    """Returns a subprocess's environment: plain terminal, one device, no user data."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "KDDM_")) or name in CACHE
    }
    for name in ("COLUMNS", "FORCE_COLOR"):
        kept.pop(name, None)
    package, tests = Path(kddm_jax.__file__).parents[1], Path(__file__).parent
    return {
        **kept,
        "PYTHONPATH": f"{package}{os.pathsep}{tests}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # halves the time of compilation
        "XLA_FLAGS": " ".join(f for f in COMPILER_FLAGS if f in kept["XLA_FLAGS"]),
        # If a killed run left a program incomplete in the cache, it is compiled again.
        "PYTHONWARNINGS": "ignore:Error reading persistent",
        **more,
    }


def command(*arguments, script=(str(EXPERIMENTS / "cifar.py"),), cwd, env=None):
    """Runs the command as a user does."""
    return subprocess.run(
        [sys.executable, *script, *map(str, arguments)],
        cwd=cwd,
        env=env or environ(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def call(*arguments):
    """Returns the command's exit status, run in this process; also when tyro exits."""
    try:
        return distill.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


# Subprocesses also keep their compiled programs for the next session.
KEEP = ("--compilation-cache", jax.config.jax_compilation_cache_dir)


def tiny(out):
    return (*SMALL, *KEEP, "--out", out)


# A program that ends as by `kill -9` after the first checkpoint of a distilled student.
KILL = """
import os, signal, sys
from kddm_jax import checkpoint
from kddm_jax.experiment import distill
save = checkpoint.save
def save_and_die(folder, *arguments, **options):
    path = save(folder, *arguments, **options)
    if "w2" in path.parts:
        os.kill(os.getpid(), signal.SIGKILL)
    return path
checkpoint.save = save_and_die
distill.main(sys.argv[1:])
"""


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def tree(folder):
    """Returns every path below a folder, with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def table_lines(stdout):
    return [line for line in stdout.splitlines() if "│" in line or "┃" in line]


def final_arrays(out, name, seed=1):
    path = checkpoint.latest(out / name / f"seed{seed}" / "checkpoints")
    arrays, _ = checkpoint.restore_arrays(path)
    return path.name, jax.tree_util.tree_leaves_with_path(arrays)


def assert_same_arrays(left, right):
    assert left[0] == right[0]
    assert [key for key, _ in left[1]] == [key for key, _ in right[1]]
    for (key, a), (_, b) in zip(left[1], right[1], strict=True):
        assert a.dtype == b.dtype, key
        assert a.tobytes() == b.tobytes(), key


def timeless(value):
    """Returns results without the values in which two equal runs may differ."""
    if isinstance(value, dict):
        skip = ("timing", "seconds", "environment", "out", "checkpoint_seconds")
        return {k: timeless(v) for k, v in value.items() if k not in skip}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def unwanted_training(*arguments, **options):
    raise AssertionError("something was trained")


def small_results(teacher=90.0, given=False):
    """Returns the results of a command with two seeds, as in ``results.json``."""

    def run(name, title, seed, accuracy, best, weight, seconds):
        history = [
            {"epoch": 1, "loss": 2.0, name: 4.0, "test_accuracy": best},
            {"epoch": 2, "loss": 1.0, name: 2.0, "test_accuracy": accuracy},
        ]
        return {
            "name": name,
            "title": title,
            "seed": seed,
            "accuracy": accuracy,
            "best_accuracy": best,
            "weight": weight,
            "history": history,
            "timing": {"seconds": seconds},
            "environment": environment,
        }

    environment = {
        "device_count": 2,
        "device": "Some GPU",
        "jax": "1.2.3",
        "commit": "abc1234",
    }
    return {
        "settings": {
            "dataset": "digits",
            "recipe": "laptop",
            "student_model": "ResNet9",
            "width": 16,
            "stem": "cifar",
            "seeds": [0, 1],
            "held_out": 0,
        },
        "eval_images": 100,
        "teacher": {
            "model": "ResNet18",
            "width": 32,
            "accuracy": teacher,
            "best_accuracy": None if given else 91.5,
            "timing": None if given else {"seconds": 61.4},
            "environment": None if given else environment,
        },
        "runs": [
            run("student", "student", 0, 80.0, 80.5, 0.0, 10.0),
            run("student", "student", 1, 82.0, 82.5, 0.0, 13.0),
            run("w2", "W2 (E)", 0, 84.0, 86.0, 1e-4, 20.0),
            run("w2", "W2 (E)", 1, 85.2, 85.2, 1e-4, 20.0),
        ],
        "environment": {
            **environment,
            "commit": "of-the-last-command",
            "command": "python experiments/cifar.py --out /home/me --seeds 0 1",
        },
    }
