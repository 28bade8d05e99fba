"""Defines multi-layer perceptrons, the networks of KD2M's first benchmark, on MNIST.

The released code (eddardd/kddm) distils 784-512-256-128-128-128 into 784-512-256-128.
Features are the last hidden layer after its ReLU; it is 128 wide in both networks.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kddm_jax.adapters import Outputs


class MLP(nn.Module):
    """Applies dense layers with ReLU and a linear classifier.

    `TeacherMLP` and `StudentMLP` are the networks of the released code.

    Attributes:
      num_classes: number of logits.
      hidden: widths of the hidden layers.
      dtype: dtype of the computation; parameters, features and logits are float32 at
        least.
    """

    num_classes: int = 10
    hidden: tuple[int, ...] = (512, 256, 128)
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> Outputs:
        """Maps normalized images `[b, h, w, c]` to outputs.

        Args:
          images: normalized images, floating, shape `[b, h, w, c]`.
          train: ignored, because the network is the same in training.

        Returns:
          `Outputs` with features `[b, hidden[-1]]`; maps are the hidden layers,
          "hidden1", "hidden2", ..., each `[b, width]`.

        Raises:
          ValueError: `images` has another rank, or there is no hidden layer.
        """
        if images.ndim != 4:
            raise ValueError(
                f"images must have shape [b, h, w, c], got {list(images.shape)}"
            )
        if not self.hidden:
            raise ValueError("hidden must name at least one width: it is the features")
        x, maps = images.reshape(images.shape[0], -1).astype(self.dtype), {}
        for i, width in enumerate(self.hidden, start=1):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"hidden{i}")(x))
            maps[f"hidden{i}"] = x
        dtype = np.promote_types(self.dtype, jnp.float32)
        features = x.astype(dtype)
        logits = nn.Dense(self.num_classes, dtype=dtype, name="fc")(features)
        return Outputs(logits, features, maps)


class TeacherMLP(MLP):
    """Has the widths 784-512-256-128-128-128 and 600,458 parameters for 10 classes.

    Examples:
      >>> images = jnp.zeros((2, 28, 28, 1))
      >>> model = TeacherMLP()
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
      600458
    """

    hidden: tuple[int, ...] = (512, 256, 128, 128, 128)


class StudentMLP(MLP):
    """Has the widths 784-512-256-128 and 567,434 parameters for 10 classes."""

    hidden: tuple[int, ...] = (512, 256, 128)
