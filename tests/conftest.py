"""Two fake CPU devices for every test, and the modes that tests ask for."""

import os

# Beside xdist's workers OpenBLAS's own threads turn a 1 ms SVD into 800 ms.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)


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
