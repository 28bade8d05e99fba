"""Makes two-dimensional examples on which the distances differ visibly.

In the first, the student's two classes are rotated against the teacher's: W2 pairs
samples across classes, CW2 does not.  In the second, two sets of samples have the same
mean and covariance but different shapes: the Gaussian W2 cannot distinguish them, the
empirical W2 can, and samples that follow the gradient of either end accordingly.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax import gaussian_wasserstein, wasserstein
from kddm_jax.numerics.classes import classes
from kddm_jax.numerics.linalg import squared_distances
from kddm_jax.numerics.transport import Costs, transport_plan


def optimal_plan(
    x: jax.Array, y: jax.Array, labels: jax.Array | None = None
) -> jax.Array:
    """Finds the exact plan of W2, or of CW2 if there are labels.

    Args:
      x: shape ``[n, d]``.
      y: shape ``[n, d]``.
      labels: labels of both, int, shape ``[n]``; None allows all pairs.

    Returns:
      Plan of mass 1, shape ``[n, n]``, with one entry in every row.
    """
    n = len(x)
    one = jnp.zeros(n, int) if labels is None else labels
    groups = classes(one, reduction="weighted", dtype=x.dtype)
    weights = groups.weights
    cost = squared_distances(x, y)
    costs = Costs(cost, None, None, weights, weights, groups.same)
    return transport_plan(costs, solver="exact")


def crossing(plan: jax.Array, labels: jax.Array) -> float:
    """Computes the share of a plan's mass between different classes."""
    return float(jnp.sum(jnp.where(labels[:, None] != labels[None, :], plan, 0)))


class Pairing(NamedTuple):
    """Holds two classes of student and teacher.

    Attributes:
      x: student's samples, shape ``[n, 2]``.
      y: teacher's samples, shape ``[n, 2]``.
      labels: int, shape ``[n]``.
      plans: plans of "W2 (E)" and "CW2 (E)", each ``[n, n]``.
    """

    x: jax.Array
    y: jax.Array
    labels: jax.Array
    plans: dict[str, jax.Array]


def two_classes(seed: int = 0, count: int = 20) -> Pairing:
    """Makes samples that W2 pairs across classes.

    The student's samples are arranged as the teacher's, rotated by 120 degrees and
    moved, so that its class 0 is close to the teacher's class 1.

    Args:
      seed: seed of the samples.
      count: number of samples of each class.

    Returns:
      The samples and both plans.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], count)
    centres = np.array([[-2.0, 0.0], [2.0, 0.0]])
    draw = lambda: centres[labels] + rng.normal(scale=0.6, size=(2 * count, 2))
    angle = 2 * np.pi / 3
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    x, y = draw() @ turn + [0.0, 4.5], draw()
    x, y = (jnp.asarray(z, jnp.float32) for z in (x, y))
    labels = jnp.asarray(labels)
    plans = {
        "W2 (E)": optimal_plan(x, y),
        "CW2 (E)": optimal_plan(x, y, labels),
    }
    return Pairing(x, y, labels, plans)


def _standard(points):
    """Transforms points to mean zero and covariance one, exactly."""
    centred = points - points.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(points))
    return centred @ (vectors / np.sqrt(values)) @ vectors.T


def flow(
    distance: Callable,
    x: jax.Array,
    y: jax.Array,
    *,
    steps: int = 80,
    rate: float = 0.1,
) -> jax.Array:
    """Moves samples down the gradient of a distance.

    Args:
      distance: a distance of ``(x, y)``, such as `wasserstein`.
      x: start, shape ``[n, d]``.
      y: target, shape ``[m, d]``.
      steps: number of steps.
      rate: share of the way to its partner in the optimal plan that a sample moves in
        a step. The gradient of a squared distance is 2 / n times this way.

    Returns:
      The samples before and after every step, shape ``[steps + 1, n, d]``.
    """
    gradient = jax.grad(distance)

    def step(x, _):
        new = x - rate * len(x) / 2 * gradient(x, y)
        return new, new

    path = jax.jit(lambda x: jax.lax.scan(step, x, length=steps)[1])(x)
    return jnp.concatenate([x[None], path])


DISTANCES = {
    "W2 (G)": gaussian_wasserstein,
    "W2 (E)": lambda x, y: wasserstein(x, y, solver="exact"),
}


class Shapes(NamedTuple):
    """Holds samples of one mean and covariance, and flows to one of them.

    Attributes:
      x: Gaussian samples, shape ``[n, 2]``.
      y: samples in the shape of a banana, ``[n, 2]``.
      flows: by distance, from x moved and stretched to y, ``[steps + 1, n, 2]``.
    """

    x: jax.Array
    y: jax.Array
    flows: dict[str, jax.Array]


def two_shapes(seed: int = 0, count: int = 80) -> Shapes:
    """Makes samples that W2 (G) cannot distinguish, and flows of either distance.

    Args:
      seed: seed of the samples.
      count: number of samples of each shape.

    Returns:
      The samples and the flows.
    """
    rng = np.random.default_rng(seed)
    gauss, along = rng.normal(size=(count, 2)), rng.uniform(-1.8, 1.8, count)
    banana = np.stack([along, along**2 + rng.normal(scale=0.15, size=count)], 1)
    x, y = (jnp.asarray(_standard(z), jnp.float32) for z in (gauss, banana))
    start = x * jnp.array([0.5, 1.6]) + jnp.array([5.0, 1.0])
    flows = {title: flow(fn, start, y) for title, fn in DISTANCES.items()}
    return Shapes(x, y, flows)
