"""|R_S(h) - R_T(h)| / L <= W1 <= W2 <= CW2 <= paired, of two networks' features.

`theorem.py` says what each of them is, and measures them epoch by epoch.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, softmax

from kddm_jax import class_wasserstein, paired_l2, wasserstein
from kddm_jax.numerics.transport import Costs, transport_cost

# Of the root mean squared norm of the features: squares in float64 are exact to 1e-16
# of theirs, roots of what is left near zero to 1e-8.
TOLERANCE = 1e-7


class Seen(NamedTuple):
    """Outputs of a network for the images, and its head.

    Attributes:
      features: shape ``[n, d]``.
      logits: shape ``[n, k]``.
      kernel: kernel of the head, shape ``[d, k]``.
      bias: bias of the head, shape ``[k]``.
    """

    features: np.ndarray
    logits: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray

    def head(self, features: np.ndarray) -> np.ndarray:
        """The head's logits of any features, in float64."""
        wide = (np.asarray(z, np.float64) for z in (features, self.kernel, self.bias))
        features, kernel, bias = wide
        return features @ kernel + bias


def _difference(risks, constant):
    """|R_S - R_T| / L and its parts; a loss that is constant has no difference."""
    student, teacher = (float(np.mean(risk)) for risk in risks)
    normalised = abs(student - teacher) / constant if constant else 0.0
    return {
        "student": student,
        "teacher": teacher,
        "lipschitz": float(constant),
        "normalised": normalised,
    }


def heads_risk(student: Seen, teacher: Seen) -> dict[str, float]:
    """How far the two heads disagree, on the student's and on the teacher's features.

    Args:
      student: the student's outputs for the images.
      teacher: likewise.

    Returns:
      The mean loss on either's features, its Lipschitz constant, and the difference
      divided by that.
    """
    norms = 0.0
    for seen in (student, teacher):
        kernel = np.asarray(seen.kernel, np.float64)
        # softmax does not see what all logits share
        norms += np.linalg.norm(kernel - kernel.mean(1, keepdims=True), 2)
    apart = lambda z: np.linalg.norm(
        softmax(student.head(z), axis=1) - softmax(teacher.head(z), axis=1), axis=1
    )
    return _difference((apart(student.features), apart(teacher.features)), norms / 2)


def label_risk(
    head: Seen, student: Seen, teacher: Seen, labels: np.ndarray
) -> dict[str, float]:
    """The cross-entropy of one head on the student's and on the teacher's features.

    Args:
      head: whose.
      student: the student's outputs for the images.
      teacher: likewise.
      labels: labels of the images, shape ``[n]``.

    Returns:
      As `heads_risk`.
    """
    columns = np.asarray(head.kernel, np.float64).T
    # The gradient is sum_k p_k (w_k - w_y).
    constant = cdist(columns, columns).max()
    rows = np.arange(len(labels))
    loss = lambda z: -log_softmax(head.head(z), axis=1)[rows, labels]
    return _difference((loss(student.features), loss(teacher.features)), constant)


@cache
def _compiled():
    """Exact W1 of a cost; exact squared W2, CW2 and paired L2 of features."""

    def of_cost(cost):
        n = len(cost)
        weights = jnp.full(n, 1 / n, cost.dtype)
        costs = Costs(cost, None, None, weights, weights)
        return transport_cost(costs, solver="exact")[0]

    conditional = partial(class_wasserstein, reduction="weighted", solver="exact")
    squares = {
        "w2": lambda x, y, labels: wasserstein(x, y, solver="exact"),
        "cw2": conditional,
        "paired": lambda x, y, labels: paired_l2(x, y),
    }
    return jax.jit(of_cost), {name: jax.jit(fn) for name, fn in squares.items()}


def distances(x: np.ndarray, y: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Exact distances of paired features in float64, unsquared.

    Args:
      x: student, shape ``[n, d]``.
      y: teacher, shape ``[n, d]``.
      labels: shape ``[n]``.

    Returns:
      ``w1``, ``w2``, ``cw2`` and ``paired``; ``size``, the root mean squared norm.
    """
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    with jax.enable_x64(True):
        w1, squares = _compiled()
        arrays = jnp.asarray(x), jnp.asarray(y), jnp.asarray(labels)
        found = {"w1": float(w1(jnp.asarray(cdist(x, y))))}
        for name, fn in squares.items():
            found[name] = max(float(fn(*arrays)), 0.0) ** 0.5
    found["size"] = float((np.sum(x**2) + np.sum(y**2)) / len(x)) ** 0.5
    return found


def links(record: Mapping) -> Iterator[tuple[str, float, str, float]]:
    """Every inequality of the chain: the smaller's name and value, the larger's."""
    value = {
        **{name: record[name] for name in ("w1", "w2", "cw2", "paired")},
        **{name: risk["normalised"] for name, risk in record["risks"].items()},
    }
    for small, large in (
        *(("heads", "w1"), ("w1", "w2"), ("w2", "cw2"), ("cw2", "paired")),
        *(("labels, student's head", "cw2"), ("labels, teacher's head", "cw2")),
    ):
        yield small, value[small], large, value[large]


def violations(records: Sequence[Mapping]) -> list[str]:
    """The inequalities that fail by more than the tolerance, a line each."""
    return [
        f"{record['run']}, epoch {record['epoch']}: {small} {low:.9g} > "
        f"{large} {high:.9g}"
        for record in records
        for small, low, large, high in links(record)
        if not low <= high + TOLERANCE * record["size"]  # NaN fails
    ]


def measure(student: Seen, teacher: Seen, labels: np.ndarray) -> dict[str, object]:
    """The chain of one pair of networks.

    Args:
      student: the student's outputs for the images.
      teacher: likewise, features of the same width.
      labels: labels of the images, shape ``[n]``.

    Returns:
      `distances`, the risks by name, and the student's accuracy.
    """
    by_head = partial(label_risk, student=student, teacher=teacher, labels=labels)
    return {
        "accuracy": 100 * float(np.mean(np.argmax(student.logits, 1) == labels)),
        **distances(student.features, teacher.features, labels),
        "risks": {
            "heads": heads_risk(student, teacher),
            "labels, student's head": by_head(student),
            "labels, teacher's head": by_head(teacher),
        },
    }
