"""Defines distances between W2 and paired L2, for which mismatched pairs cost more.

The cost ``||x_i - y_j||^2 + kappa [i != j]`` gives W2 for kappa 0 and paired L2 for a
large kappa.  Here kappa is in units of the teacher's mean squared deviation and means
the same for every network:

    python experiments/cifar.py --distances fused:W2_K01 ...

Each distance also reports the mass of its plan on the diagonal (images matched with
themselves) and within the class (images matched with images of the same label).
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from kddm_jax import DISTANCES, Distance, wasserstein
from kddm_jax.numerics.linalg import constant, squared_distances
from kddm_jax.numerics.transport import Costs, transport_plan


def _deviation(y):
    """Computes the teacher's mean squared deviation, the unit of squared distances."""
    return jnp.mean(jnp.sum((y - jnp.mean(y, axis=0)) ** 2, axis=1))


def plan_masses(x, y, labels, pairing):
    """Computes the mass of the plan on the diagonal and within the class.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same images, shape ``[n, d]``.
      labels: int, shape ``[n]``.
      pairing: kappa in units of the squared distance.

    Returns:
      Two scalars in [0, 1].
    """
    n = len(x)
    uniform = jnp.full(n, 1 / n, x.dtype)
    cost = squared_distances(x, y)
    costs = Costs(cost, None, None, uniform, uniform, pairing=pairing)
    plan = transport_plan(costs, solver="entropic")
    same = labels[:, None] == labels[None, :]
    return jnp.trace(plan), jnp.sum(plan * same)


def fused(kappa: float) -> Distance:
    """Makes W2 with the cost ``kappa`` on mismatched pairs."""

    def value(x, y, labels):
        del labels
        return wasserstein(x, y, pairing=kappa * constant(_deviation(y)))

    def diagnose(x, y, labels):
        pairing = kappa * constant(_deviation(y))
        found, stats = DISTANCES["w2"].diagnose(x, y, pairing=pairing)
        # For the report only: no derivative goes through this second solve.
        still = jax.lax.stop_gradient((x, y, pairing))
        diagonal, within = plan_masses(*still[:2], labels, still[2])
        return found, {**stats, "diagonal": diagonal, "within_class": within}

    return Distance(
        value,
        inputs=("features", "labels"),
        title=f"W2, κ = {kappa:g}",
        promises=frozenset({"squared"}),
        diagnose=diagnose,
    )


W2_K0 = fused(0.0)
W2_K01 = fused(0.1)
W2_K1 = fused(1.0)
W2_K3 = fused(3.0)

# Against a bank of many rows, in which the debiased solver would take most of the time.
CW2_ENTROPIC, W2_ENTROPIC = (
    replace(DISTANCES[key], options={"solver": "entropic"}, title=f"{title}, entropic")
    for key, title in (("cw2", "CW2"), ("w2", "W2"))
)
