"""Compares accuracies: their spread, the difference to a student alone, and the gap.

A row of a table has one accuracy for each seed, that after the last epoch. Differences
are paired by seed: two students of one seed start from the same random key and see the
same images in the same order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Difference(NamedTuple):
    """Contains the mean difference of accuracy to the student alone, in points.

    Attributes:
      mean: the mean over the seeds that both have.
      interval: the confidence interval of the mean; None for one seed.
    """

    mean: float
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Formats the difference as in ``+3.1 [+2.4, +3.8]``.

        An end that is rounded to zero keeps its sign, so that ``[-0.0, +0.8]`` contains
        zero and ``[+0.0, +0.8]`` does not.
        """
        ends = ", ".join(f"{end:+.1f}" for end in self.interval or ())
        return f"{self.mean:+.1f}" + (f" [{ends}]" if ends else "")


def difference(
    accuracy: Mapping[int, float], student: Mapping[int, float]
) -> Difference | None:
    """Compares a distilled student with the student alone, paired by seed.

    With the differences d of the n seeds that both have, the interval is
    ``mean(d) ± t std(d) / sqrt(n)``, t being the quantile of Student's distribution
    with n - 1 degrees of freedom.

    Args:
      accuracy: accuracies of the distilled student by seed, in percent.
      student: accuracies of the student alone by seed.

    Returns:
      The difference, or None if no seed is common.
    """
    pairs = [(accuracy[seed], student[seed]) for seed in accuracy if seed in student]
    if not pairs:
        return None
    found = np.array([one - other for one, other in pairs])
    mean, count = float(found.mean()), len(found)
    if count == 1:
        return Difference(mean)
    from scipy.special import stdtrit  # slow to import

    quantile = stdtrit(count - 1, (1 + CONFIDENCE) / 2)
    half = float(quantile * found.std(ddof=1) / math.sqrt(count))
    return Difference(mean, (mean - half, mean + half))


def _standard_error(accuracies, images):
    """Computes the error of a mean accuracy, over seeds or binomial for one run."""
    mean = float(np.mean(accuracies))
    if len(accuracies) > 1:
        return float(np.std(accuracies, ddof=1)) / math.sqrt(len(accuracies))
    return math.sqrt(max(mean * (100 - mean), 0.0) / images)


def gap_closed(
    accuracy: float,
    student: Sequence[float],
    teacher: float,
    images: int,
) -> float | None:
    """Computes the share of the gap from student to teacher, in percent.

    Args:
      accuracy: accuracy of the distilled student, in percent.
      student: accuracies of the student alone, one per seed.
      teacher: accuracy of the teacher.
      images: number of images that the accuracies were measured on.

    Returns:
      ``100 (accuracy - student) / (teacher - student)``, or None if the gap is not
      larger than two standard errors, because a share of it would mean nothing.
    """
    gap = teacher - float(np.mean(student))
    error = math.hypot(
        _standard_error(student, images), _standard_error([teacher], images)
    )
    if gap <= 2 * error:
        return None
    return 100 * (accuracy - float(np.mean(student))) / gap


def spread(values: Sequence[float]) -> str:
    """Formats the mean of some numbers, with their standard deviation if several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
