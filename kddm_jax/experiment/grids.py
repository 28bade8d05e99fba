"""Searches for the best value of a setting on a grid that grows at its edges.

Neighbours in a grid differ by a factor, as in 0.1, 1, 10. `climb` scores the values and
adds others while the best one is at an edge, and `finer` returns the values around the
best one. Scores are accuracies, so larger ones are better.
"""

import math
from collections.abc import Callable, Mapping, Sequence

EXTENSIONS = 4  # number of values that are added to a grid at most
# Smallest factor between neighbours. The three values of the finer grid are rounded to
# two digits, and with a smaller factor they could be equal.
CLOSEST = 1.25


def _rounded(value):
    """Rounds to two digits, so that added values are short numbers."""
    return float(f"{value:.2g}")


def best_of(scores: Mapping[float, float]) -> float:
    """Returns the value of the highest score, the smallest of several."""
    return max(sorted(scores), key=lambda value: scores[value])


def at_edge(scores: Mapping[float, float]) -> bool:
    """Returns whether the best value is the smallest or the largest one.

    Values beyond it may then be better. There are none below zero, so zero is no edge.
    """
    best = best_of(scores)
    return best > 0 and best in (min(scores), max(scores))


def climb(
    score: Callable[[float], float], grid: Sequence[float], more: int = EXTENSIONS
) -> dict[float, float]:
    """Scores the values of a grid, and extends it while the best value is at an edge.

    The grid is extended by the factor between its two values at that edge. If all
    scores are equal, for instance because all runs diverged, smaller values are added.

    Args:
      score: function of a value; larger scores are better.
      grid: at least two positive values, and zero if it is to be tried.
      more: number of values that are added at most.

    Returns:
      The score of each value, in the order of the values.
    """
    scores = {value: score(value) for value in sorted(grid)}
    for _ in range(more):
        if not at_edge(scores):
            break
        low, *_, high = values = sorted(scores)
        best = best_of(scores)
        inner = values[1] if best == low else values[-2]
        new = _rounded(best * best / inner)
        if low <= new <= high:  # neighbours are too close to go on with two digits
            break
        scores[new] = score(new)
    return dict(sorted(scores.items()))


def finer(grid: Sequence[float], best: float) -> tuple[float, float, float]:
    """Returns a value between its geometric means with its two neighbours in a grid.

    Args:
      grid: at least two positive values.
      best: one of them; a value at an edge is as far from its missing neighbour as from
        the other one.

    Returns:
      Three rising values; the two means are rounded to two digits.
    """
    values = sorted(grid)
    i, last = values.index(best), len(values) - 1
    below = values[i - 1] if i > 0 else best * best / values[i + 1]
    above = values[i + 1] if i < last else best * best / values[i - 1]
    return _rounded(math.sqrt(below * best)), best, _rounded(math.sqrt(best * above))
