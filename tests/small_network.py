"""A network that compiles in a second, for runs whose network does not matter.

The experiment takes it as ``--student-model small_network:Small``.
"""

import jax.numpy as jnp
from flax import linen as nn

from kddm_jax.adapters import Outputs


class Small(nn.Module):
    """Two dense layers with BatchNorm over all devices between them."""

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
