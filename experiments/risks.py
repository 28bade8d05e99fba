"""Measures |R_S(h) - R_T(h)| / L <= W1 <= W2 <= CW2 <= paired for two networks.

`theorem.py` defines each member and measures it epoch by epoch.
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

# Relative to the root mean squared norm of the features. Squares in float64 have a
# relative error of 1e-16, so roots near zero have one of 1e-8.
TOLERANCE = 1e-7


class Seen(NamedTuple):
    """Holds a network's outputs for the images, and its head.

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
        """Computes the head's logits of given features in float64."""
        wide = (np.asarray(z, np.float64) for z in (features, self.kernel, self.bias))
        features, kernel, bias = wide
        return features @ kernel + bias


def _difference(risks, constant):
    """Returns |R_S - R_T| / L and its parts; the ratio is 0 for a constant loss."""
    student, teacher = (float(np.mean(risk)) for risk in risks)
    normalised = abs(student - teacher) / constant if constant else 0.0
    return {
        "student": student,
        "teacher": teacher,
        "lipschitz": float(constant),
        "normalised": normalised,
    }


def heads_risk(student: Seen, teacher: Seen) -> dict[str, float]:
    """Measures the disagreement of the two heads, on the features of either network.

    Args:
      student: the student's outputs for the images.
      teacher: the teacher's outputs for the images.

    Returns:
      The mean loss on the features of each network, its Lipschitz constant, and the
      difference divided by this constant.
    """
    norms = 0.0
    for seen in (student, teacher):
        kernel = np.asarray(seen.kernel, np.float64)
        # softmax ignores a term common to all logits
        norms += np.linalg.norm(kernel - kernel.mean(1, keepdims=True), 2)
    apart = lambda z: np.linalg.norm(
        softmax(student.head(z), axis=1) - softmax(teacher.head(z), axis=1), axis=1
    )
    return _difference((apart(student.features), apart(teacher.features)), norms / 2)


def label_risk(
    head: Seen, student: Seen, teacher: Seen, labels: np.ndarray
) -> dict[str, float]:
    """Measures the cross-entropy of one head on the features of either network.

    Args:
      head: outputs of the network that has the head.
      student: the student's outputs for the images.
      teacher: the teacher's outputs for the images.
      labels: labels of the images, shape ``[n]``.

    Returns:
      The same as `heads_risk`.
    """
    columns = np.asarray(head.kernel, np.float64).T
    # The gradient is sum_k p_k (w_k - w_y).
    constant = cdist(columns, columns).max()
    rows = np.arange(len(labels))
    loss = lambda z: -log_softmax(head.head(z), axis=1)[rows, labels]
    return _difference((loss(student.features), loss(teacher.features)), constant)


@cache
def _compiled():
    """Compiles exact W1 of a cost, and exact squared W2, CW2, paired L2 of features."""

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
    """Computes exact distances of paired features in float64, unsquared.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[n, d]``.
      labels: labels, shape ``[n]``.

    Returns:
      ``w1``, ``w2``, ``cw2`` and ``paired``, and ``size``, the root mean squared norm.
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
    """Yields every inequality: name and value of the smaller, then of the larger."""
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
    """Lists the inequalities that fail by more than the tolerance, one per line."""
    return [
        f"{record['run']}, epoch {record['epoch']}: {small} {low:.9g} > "
        f"{large} {high:.9g}"
        for record in records
        for small, low, large, high in links(record)
        if not low <= high + TOLERANCE * record["size"]  # NaN fails
    ]


def measure(student: Seen, teacher: Seen, labels: np.ndarray) -> dict[str, object]:
    """Measures the chain for one pair of networks.

    Args:
      student: the student's outputs for the images.
      teacher: the teacher's outputs, with features of the same width.
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
