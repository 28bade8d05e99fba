"""Two-dimensional clouds on which the distances differ visibly.

Two classes that lie differently for teacher and student: W2 pairs them across classes,
CW2 does not.  Two clouds of one mean and covariance but different shapes: to the
Gaussian W2 they are one, to the empirical W2 they are not, and a cloud that flows down
either distance ends accordingly.
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
    """Finds the exact plan of W2, or of CW2 where there are labels.

    Args:
      x: shape ``[n, d]``.
      y: shape ``[n, d]``.
      labels: int, shape ``[n]``, of both clouds; None pairs freely.

    Returns:
      Plan, shape ``[n, n]``, of mass 1; every row has one entry.
    """
    n = len(x)
    one = jnp.zeros(n, int) if labels is None else labels
    groups = classes(one, reduction="weighted", dtype=x.dtype)
    weights = groups.weights
    cost = squared_distances(x, y)
    costs = Costs(cost, None, None, weights, weights, groups.same)
    return transport_plan(costs, solver="exact")


def crossing(plan: jax.Array, labels: jax.Array) -> float:
    """Share of a plan's mass that moves between samples of different classes."""
    return float(jnp.sum(jnp.where(labels[:, None] != labels[None, :], plan, 0)))


class Pairing(NamedTuple):
    """Two classes, as student and teacher have them.

    Attributes:
      x: student, shape ``[n, 2]``.
      y: teacher, shape ``[n, 2]``.
      labels: int, shape ``[n]``.
      plans: plans of "W2 (E)" and "CW2 (E)", each ``[n, n]``.
    """

    x: jax.Array
    y: jax.Array
    labels: jax.Array
    plans: dict[str, jax.Array]


def two_classes(seed: int = 0, count: int = 20) -> Pairing:
    """Makes clouds that W2 pairs across classes.

    The student has the teacher's arrangement, turned by 120 degrees and moved: its
    class 0 lies on the side of the teacher's class 1.

    Args:
      seed: seed of the draw.
      count: samples of each class.

    Returns:
      The clouds and both plans.
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
    """Mean zero and covariance one, exactly."""
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
    """Lets a cloud flow down a distance to another.

    Args:
      distance: a distance of ``(x, y)``, such as `wasserstein`.
      x: start, shape ``[n, d]``.
      y: target, shape ``[m, d]``.
      steps: number of them.
      rate: share of the way to its place in the optimal plan that a sample goes in a
        step: the gradient of a squared distance is 2 / n times that way.

    Returns:
      The cloud before and after every step, shape ``[steps + 1, n, d]``.
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
    """Clouds of one mean and covariance, and what flows to one of them.

    Attributes:
      x: Gaussian, shape ``[n, 2]``.
      y: a banana, shape ``[n, 2]``.
      flows: by distance, from x moved and stretched to y, ``[steps + 1, n, 2]``.
    """

    x: jax.Array
    y: jax.Array
    flows: dict[str, jax.Array]


def two_shapes(seed: int = 0, count: int = 80) -> Shapes:
    """Makes clouds that W2 (G) cannot tell apart, and flows under either distance.

    Args:
      seed: seed of the draw.
      count: samples of each cloud.

    Returns:
      The clouds and the flows.
    """
    rng = np.random.default_rng(seed)
    gauss, along = rng.normal(size=(count, 2)), rng.uniform(-1.8, 1.8, count)
    banana = np.stack([along, along**2 + rng.normal(scale=0.15, size=count)], 1)
    x, y = (jnp.asarray(_standard(z), jnp.float32) for z in (gauss, banana))
    start = x * jnp.array([0.5, 1.6]) + jnp.array([5.0, 1.0])
    flows = {title: flow(fn, start, y) for title, fn in DISTANCES.items()}
    return Shapes(x, y, flows)
