"""Gives tests two fake CPU devices, a cache of compiled programs, and JAX's modes."""

import gc
import importlib.metadata
import os
from collections import Counter
from pathlib import Path

# Tests spend almost all of their time on tracing and compiling. The programs are tiny,
# so compile them with few optimizations, and keep them for the next run.
CACHE = Path(__file__).resolve().parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")  # of expected errors; slow
# Tiny programs compile in three quarters of the time if they are not split. On jaxlib
# 0.10 they compile in half of it without fusion emitters; later versions always use
# these.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
flags = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*flags, *(f for f in FLAGS if f not in flags)])
# If there is a worker for each core, each is pinned to one core, and XLA starts threads
# for that core only.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
if hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) <= WORKERS:
    cores = sorted(os.sched_getaffinity(0))
    worker = os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")
    if worker.isdigit():
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})
gc.set_threshold(200_000, 20, 100)  # tracing makes many objects and few cycles
# Next to xdist's workers, OpenBLAS's own threads turn a 1 ms SVD into 800 ms.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

from kddm_jax.numerics.convolution import prefer_eigen

jax.config.update("jax_num_cpu_devices", 2)
prefer_eigen()  # as in the experiments, with whose results the tests compare


DEFAULT = "not slow and not bench"  # as in pyproject.toml
MOST_MAPS = 40_000
MAPS = Path("/proc/self/maps")  # exists on Linux only


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Drops compiled programs after a test file if there are many.

    XLA:CPU maps each program into memory in several pieces, and Linux allows a process
    65,530 maps. One program more would be a segmentation fault.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Enables float64 during a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """Forbids implicit promotion of ranks and dtypes; ott does not run in this mode."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


def pytest_terminal_summary(terminalreporter):
    """Prints one line with the number of skipped tests and the reasons."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in skipped
    )
    if reasons:
        listed = "; ".join(f"{count} {why}" for why, count in reasons.most_common())
        terminalreporter.write_line(f"{len(skipped)} skipped: {listed}")
    if terminalreporter.config.option.markexpr == DEFAULT:
        terminalreporter.write_line("not run: pytest -m slow, pytest -m bench")
