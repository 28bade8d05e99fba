"""Tests distances with a solver: their value and statistics have one signature."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import pytest

from kddm_jax import DISTANCES
from kddm_jax.numerics.solver import Stats, solver_distance

SOLVED = {row.fn.__name__: row.fn for row in DISTANCES.values() if row.diagnose}


@solver_distance
def halved(x: jax.Array, *, by: float = 2.0) -> tuple[jax.Array, Stats]:
    """Divides by a number."""
    one = jnp.ones(())
    return x / by, Stats(one, 3 * one, 0 * one)


def test_value_and_statistics():
    x = jnp.array(6.0)
    assert halved(x) == 3
    assert jax.grad(halved)(x) == 0.5
    value, stats = halved.diagnose(x, by=3.0)
    assert value == 2
    assert stats == {"converged": 1, "iterations": 3, "marginal_error": 0}


def test_signatures_are_the_public_ones():
    for function, result in [
        (halved, jax.Array),
        (halved.diagnose, tuple[jax.Array, dict[str, jax.Array]]),
    ]:
        signature = inspect.signature(function)
        x, by = signature.parameters.values()
        assert (x.name, x.annotation, x.default) == ("x", jax.Array, x.empty)
        assert (by.name, by.annotation, by.default) == ("by", float, 2.0)
        assert by.kind is by.KEYWORD_ONLY
        assert signature.return_annotation == result
        assert function.__annotations__["return"] == result
        assert inspect.getdoc(function) == "Divides by a number."
    assert (halved.__name__, halved.diagnose.__name__) == ("halved", "diagnose")


def test_distances_with_a_solver():
    assert set(SOLVED) == {
        "wasserstein",
        "class_wasserstein",
        "joint_wasserstein",
        "gromov_wasserstein",
        "wkd_logits",
    }


@pytest.mark.parametrize("name", SOLVED)
def test_pickles_by_name(name):
    function = SOLVED[name]
    assert pickle.loads(pickle.dumps(function)) is function
    assert pickle.loads(pickle.dumps(function.diagnose)) is function.diagnose
