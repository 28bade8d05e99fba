"""grids.py: which values are scored, and which of them is the best."""

import math

import pytest

from kddm_jax.experiment.grids import (
    CLOSEST,
    EXTENSIONS,
    at_edge,
    best_of,
    climb,
    finer,
)

GRID = (0.1, 1.0, 10.0)


def peak(at):
    """A score whose best value is the given one, and all values that it was asked."""
    asked = []

    def score(value):
        asked.append(value)
        return 90 - abs(math.log10(value / at))

    return score, asked


# By name: the best value, and the values that are scored, in order.
CLIMBS = {
    "inside": (1.0, [0.1, 1, 10]),
    "low edge": (0.02, [0.1, 1, 10, 0.01, 0.001]),
    "high edge": (150.0, [0.1, 1, 10, 100, 1000]),
    "far below": (1e-9, [0.1, 1, 10, 0.01, 0.001, 1e-4, 1e-5]),
    "far above": (1e9, [0.1, 1, 10, 100, 1e3, 1e4, 1e5]),
}


@pytest.mark.parametrize("name", CLIMBS)
def test_a_grid_grows_while_its_best_value_is_at_an_edge(name):
    at, expected = CLIMBS[name]
    score, asked = peak(at)
    scores = climb(score, GRID[::-1])
    assert asked == expected
    assert list(scores) == sorted(expected)
    assert best_of(scores) == min(expected, key=lambda v: abs(math.log10(v / at)))
    assert at_edge(scores) == name.startswith("far")


@pytest.mark.parametrize("equal", [0.0, 10.0])
def test_smaller_values_are_added_if_all_are_equal(equal):
    """All runs diverged, or none learned anything."""
    scores = climb(lambda value: equal, GRID)
    assert list(scores) == [1e-5, 1e-4, 0.001, 0.01, *GRID]
    assert len(scores) == len(GRID) + EXTENSIONS
    assert (best_of(scores), at_edge(scores)) == (1e-5, True)


def test_smaller_values_may_converge_where_the_grid_diverged():
    scores = climb(lambda value: 80.0 if value < 0.05 else 0.0, GRID)
    assert best_of(scores) == 1e-5
    scores = climb({0.1: 0.0, 1: 0.0, 10: 0.0, 0.01: 80.0, 0.001: 70.0}.get, GRID)
    assert (best_of(scores), at_edge(scores)) == (0.01, False)


def test_of_equal_scores_the_smallest_value_is_best():
    assert best_of({10.0: 80.0, 1.0: 80.0, 0.1: 70.0}) == 1.0


def test_values_that_are_added_have_two_digits_and_the_factor_at_the_edge():
    score, asked = peak(1e9)
    climb(score, (0.03, 0.1, 0.3), more=2)
    assert asked == [0.03, 0.1, 0.3, 0.9, 2.7]
    score, asked = peak(1e-9)
    climb(score, (0.3, 1, 100), more=1)
    assert asked == [0.3, 1, 100, 0.09]


def test_nothing_is_added_if_two_digits_are_too_few():
    score, asked = peak(1e9)
    climb(score, (1.2, 1.21))
    assert asked == [1.2, 1.21]


def test_zero_may_be_best_and_is_no_edge():
    """A weight decay of zero."""
    scores = climb(lambda value: 90 - value, (0.0, 0.1, 1.0))
    assert list(scores) == [0, 0.1, 1]
    assert (best_of(scores), at_edge(scores)) == (0, False)
    scores = climb(lambda value: value, (0.0, 0.1, 1.0), more=1)
    assert list(scores) == [0, 0.1, 1, 10]


@pytest.mark.parametrize(
    ("grid", "best", "expected"),
    [
        (GRID, 1.0, (0.32, 1, 3.2)),
        (GRID, 0.1, (0.032, 0.1, 0.32)),
        (GRID, 10.0, (3.2, 10, 32)),
        # Neighbours at different distances; the best value is not rounded.
        ((0.125, 0.5, 50.0), 0.5, (0.25, 0.5, 5)),
        ((0.125, 0.5, 50.0), 0.125, (0.062, 0.125, 0.25)),
        ((0.125, 0.5, 50.0), 50.0, (5, 50, 500)),
    ],
)
def test_the_finer_grid_is_between_the_best_value_and_its_neighbours(
    grid, best, expected
):
    assert finer(grid[::-1], best) == expected


@pytest.mark.parametrize("best", [1.0, 1.04, 1.05, 1.14, 1.25, 9.5, 9.9])
def test_the_closest_grid_has_a_finer_one(best):
    low, same, high = finer((best / CLOSEST, best, best * CLOSEST), best)
    assert low < same < high
