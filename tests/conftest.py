"""Two fake CPU devices for every test, and the modes that tests ask for."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

# Beside xdist's workers OpenBLAS's own threads turn a 1 ms SVD into 800 ms.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Compiling is most of the tests' time.  The programs are tiny, so optimise them
# little; and share what is compiled between workers and eager calls.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="kddm-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

from kddm_jax.convolution import prefer_eigen

jax.config.update("jax_num_cpu_devices", 2)
prefer_eigen()  # as the experiments do, whose results are compared with these


MOST_MAPS = 25_000
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
