"""Two fake CPU devices for every test, a cache of compiled programs, and modes."""

import gc
import importlib.metadata
import os
from collections import Counter
from pathlib import Path

# Almost all of the tests' time is tracing and compiling.  Programs are tiny, so
# optimise them little, and keep them: the next run compiles nothing.
CACHE = Path(__file__).resolve().parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Tiny programs compile in three quarters of the time if they are not split, and on
# jaxlib 0.10 in half of it without fusion emitters, which later ones always have.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
flags = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*flags, *(f for f in FLAGS if f not in flags)])
gc.set_threshold(200_000, 20, 100)  # tracing makes many objects and few cycles
# Beside xdist's workers OpenBLAS's own threads turn a 1 ms SVD into 800 ms.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

from kddm_jax.numerics.convolution import prefer_eigen

jax.config.update("jax_num_cpu_devices", 2)
prefer_eigen()  # as the experiments do, whose results are compared with these


DEFAULT = "not slow and not bench"  # of pyproject.toml
MOST_MAPS = 40_000
MAPS = Path("/proc/self/maps")  # Linux alone


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Drops compiled programs, behind a file, when there are many.

    XLA:CPU maps each into memory in several pieces, and Linux lets a process have
    65,530 of them: the next program is a segmentation fault.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Float64 for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """Forbids implicit promotion of ranks and dtypes (ott does not run under it)."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


def pytest_terminal_summary(terminalreporter):
    """Says in one line how many tests were skipped, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in skipped
    )
    if reasons:
        listed = "; ".join(f"{count} {why}" for why, count in reasons.most_common())
        terminalreporter.write_line(f"{len(skipped)} skipped: {listed}")
    if terminalreporter.config.option.markexpr == DEFAULT:
        terminalreporter.write_line("not run: pytest -m slow, pytest -m bench")
