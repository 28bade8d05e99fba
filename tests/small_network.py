"""Defines networks that compile in a second, for tests that do not depend on it.

The command accepts ``--student-model small_network:Small``, or the NNX network with
dropout, ``small_network:SmallNNX``.
"""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from kddm_jax.adapters import Outputs


class Small(nn.Module):
    """Has two dense layers, with BatchNorm over all devices between them."""

    num_classes: int
    width: int = 4
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(images.shape[0], -1)
        x = nn.Dense(8 * self.width, use_bias=False)(x)
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name)(x)
        features = nn.relu(x)
        maps = {"map": jnp.reshape(features, (-1, 2, 2, 2 * self.width))}
        return Outputs(nn.Dense(self.num_classes, name="fc")(features), features, maps)


class SmallNNX(nnx.Module):
    """Is the same network for digits as an NNX module, with dropout."""

    def __init__(self, rngs, num_classes, width=4, axis_name=None):
        self.first = nnx.Linear(64, 8 * width, use_bias=False, rngs=rngs)
        options = {"momentum": 0.9, "axis_name": axis_name, "rngs": rngs}
        self.norm = nnx.BatchNorm(8 * width, **options)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.fc = nnx.Linear(8 * width, num_classes, rngs=rngs)

    def __call__(self, images):
        x = self.first(images.reshape(images.shape[0], -1))
        features = nnx.relu(self.norm(x))
        maps = {"map": features.reshape(len(features), 2, 2, -1)}
        return Outputs(self.fc(self.dropout(features)), features, maps)


class Dropped(nn.Module):
    """Is a Linen network with dropout and stochastic depth."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        features = nn.relu(nn.Dense(32)(images.reshape(images.shape[0], -1)))
        dropped = nn.Dropout(0.1, deterministic=not train)(features)
        path = nn.Dropout(0.1, (1,), not train, rng_collection="drop_path")
        dropped = dropped + path(nn.relu(nn.Dense(32)(dropped)))
        maps = {"map": features.reshape(-1, 2, 2, 8)}
        return Outputs(nn.Dense(self.num_classes, name="fc")(dropped), features, maps)
