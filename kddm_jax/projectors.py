"""Projectors from the student's width to the teacher's.

Distances between clouds need one width.  The caller applies a projector to the
student's features; its parameters live in the student's tree, so that one optimiser
trains both, and are left out of what is deployed.
"""

import jax
from flax import linen as nn


class DenseProjector(nn.Module):
    """A linear map of pooled features, without bias.

    Attributes:
      features: the teacher's width.

    Examples:
      >>> import jax.numpy as jnp
      >>> x, projector = jnp.ones((4, 8)), DenseProjector(features=16)
      >>> variables = projector.init(jax.random.key(0), x)
      >>> projector.apply(variables, x).shape
      (4, 16)
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[n, d_student]`` to ``[n, features]``."""
        return nn.Dense(self.features, use_bias=False, name="dense")(x)
