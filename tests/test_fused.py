"""Tests the distances of experiments/fused.py, and how their prices change the plan."""

import fused
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.slow  # each compiles a program

LABELS = jnp.array([0, 0, 1, 1])
# Student 0 is where teacher 1 is, and so on, so that neighbours are swapped.
TEACHER = jnp.array([[0.0, 0], [3, 0], [9, 0], [12, 0]])
STUDENT = TEACHER[jnp.array([1, 0, 3, 2])]
DEVIATION = 22.5  # the mean of 36, 9, 9 and 36


def test_masses_of_a_plan_that_swaps_neighbours():
    value, masses = fused.W2_K0.diagnose(STUDENT, TEACHER, LABELS)
    assert value == pytest.approx(0, abs=1e-4)
    assert masses["diagonal"] == pytest.approx(0, abs=1e-3)
    assert masses["within_class"] == pytest.approx(1, abs=1e-3)


def test_masses_of_a_plan_across_classes():
    crossed = TEACHER[jnp.array([2, 3, 0, 1])]
    _, masses = fused.W2_K0.diagnose(crossed, TEACHER, LABELS)
    assert masses["within_class"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("kappa", "diagonal"),
    # Staying costs 9 per sample, moving to the neighbour kappa times 22.5.
    [(0.05, 0), (1.0, 1), (3.0, 1)],
)
def test_price_is_in_units_of_the_teachers_deviation(kappa, diagonal):
    row = fused.fused(kappa)
    value, masses = row.diagnose(STUDENT, TEACHER, LABELS)
    assert masses["diagonal"] == pytest.approx(diagonal, abs=1e-2)
    assert value == pytest.approx(9 if diagonal else kappa * DEVIATION, rel=1e-2)
    assert row.fn(STUDENT, TEACHER, LABELS) == pytest.approx(float(value), rel=1e-6)


def test_what_is_reported_has_no_part_in_the_gradient():
    row = fused.W2_K01
    grad = lambda fn: jax.jit(jax.grad(fn, has_aux=fn == row.diagnose))
    found, reported = grad(row.diagnose)(STUDENT + 0.3, TEACHER, LABELS)
    expected = grad(row.fn)(STUDENT + 0.3, TEACHER, LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert {"converged", "iterations", "diagonal"} <= set(reported)
