"""Computes features and logits of any number of images, in evaluation mode."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.experiment.training import models
from kddm_jax.experiment.training.problems import Problem

WIDEST = 262_144  # features of a sample; larger maps are max-pooled, as in the paper
BATCH = 250


def _pool(maps, shape):
    """Halves the sides of maps until a sample has at most `WIDEST` features."""
    while len(shape) == 3 and np.prod(shape) > WIDEST and min(shape[:2]) > 1:
        maps = -jax.lax.reduce_window(
            -maps, np.inf, jax.lax.min, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
        shape = maps.shape[1:]
    return maps


def program(problem: Problem, model: models.Network, pick: Callable) -> Callable:
    """Compiles a function ``pick`` of a network's outputs in evaluation mode."""
    apply = models.network_apply(model)

    def one(variables, images):
        normal = lambda image: problem.normalize(None, image)
        return pick(apply(variables, jax.vmap(normal)(images), train=False)[0])

    return jax.jit(one)


def compute(program: Callable, variables, images: np.ndarray):
    """Runs a program on images batch by batch, and returns arrays on the host."""
    variables, parts = jax.device_get(variables), []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        short = BATCH - len(batch)
        batch = np.pad(batch, ((0, short), (0, 0), (0, 0), (0, 0)))
        found = jax.device_get(program(variables, batch))
        parts.append(jax.tree.map(lambda a, short=short: a[: BATCH - short], found))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


class Network(NamedTuple):
    """Contains a network in the form that `features_of` takes."""

    model: models.Network
    variables: object


def features_of(problem: Problem, network, layer: str, images, chosen):
    """Computes a layer's features ``[n, d]`` of the chosen images, on the host."""

    def pick(outputs):
        found = {"features": outputs.features, **outputs.maps}[layer]
        pooled = _pool(found.astype(jnp.float32), found.shape[1:])
        return pooled.reshape(len(pooled), -1)

    key = ("features", network.model, layer)
    if key not in problem.programs:
        problem.programs[key] = program(problem, network.model, pick)
    return compute(problem.programs[key], network.variables, images[chosen])


class Outputs(NamedTuple):
    """Contains a network's outputs for some images.

    Attributes:
      features: features, float32 ``[n, d]``.
      logits: logits, float32 ``[n, k]``.
    """

    features: np.ndarray
    logits: np.ndarray


def outputs_of(
    problem: Problem, model: models.Network, variables, images: np.ndarray
) -> Outputs:
    """Computes features and logits in evaluation mode; compiles once per network."""
    key = ("features and logits", model)
    if key not in problem.programs:
        pick = lambda found: (
            found.features.astype(np.float32),
            found.logits.astype(np.float32),
        )
        problem.programs[key] = program(problem, model, pick)
    return Outputs(*compute(problem.programs[key], variables, images))
