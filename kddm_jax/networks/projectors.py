"""Projects the student's layers to the teacher's width.

Most distances need features of one width.  A projector maps a layer of the student to
the teacher's width.  Its parameters are in the student's tree under "projectors", so
that one optimizer trains both; `without_projectors` removes them for evaluation and
deployment.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kddm_jax.adapters import Outputs
from kddm_jax.numerics.batches import layers_of
from kddm_jax.numerics.checks import as_float
from kddm_jax.numerics.pooling import average_pool

NAME = "projectors"
Variables = Mapping[str, Any]  # nested by module, which Python's types cannot express


class DenseProjector(nn.Module):
    """Maps pooled features linearly, without bias.

    Attributes:
      features: the teacher's width.

    Examples:
      >>> x, projector = jnp.ones((4, 8)), DenseProjector(features=16)
      >>> variables = projector.init(jax.random.key(0), x)
      >>> projector.apply(variables, x).shape
      (4, 16)
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps ``[..., d_student]`` to ``[..., features]``."""
        dense = nn.Dense(self.features, use_bias=False, name="dense")
        return dense(as_float("x", x))


def _conv(features, kernel, name):
    return nn.Conv(features, (kernel, kernel), use_bias=False, name=name)


def _on_grid(maps, grid):
    """Averages maps along the sides that are longer than those of the grid."""
    maps = as_float("maps", maps)
    if grid is None:
        return maps
    _, height, width, _ = maps.shape
    return average_pool(maps, (min(height, grid[0]), min(width, grid[1])))


class ConvProjector(nn.Module):
    """Convolves maps by a 1x1 kernel without bias, a linear map of each position.

    Attributes:
      features: the teacher's width.
      grid: height and width that larger maps are first averaged down to, such as those
        of the teacher's maps; None keeps the size of the maps.

    Examples:
      >>> maps, projector = jnp.ones((4, 2, 2, 8)), ConvProjector(features=16)
      >>> variables = projector.init(jax.random.key(0), maps)
      >>> projector.apply(variables, maps).shape
      (4, 2, 2, 16)
    """

    features: int
    grid: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, maps: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps ``[b, h, w, c_student]`` to ``[b, *grid, features]``."""
        return _conv(self.features, 1, "conv")(_on_grid(maps, self.grid))


class ThreeLayerProjector(nn.Module):
    """Convolves maps three times, with BatchNorm and ReLU in between.

    The kernels are 1x1 to twice the width, 3x3, and 1x1 to the width.

    Attributes:
      features: the teacher's width.
      grid: as in `ConvProjector`.
      axis_name: mapped axis over which BatchNorm averages its statistics in training.

    References:
      Chen et al., Cross-layer distillation with semantic calibration (SemCKD), 2021
      (arXiv 2012.03236).

    Examples:
      >>> maps, projector = jnp.ones((4, 2, 2, 8)), ThreeLayerProjector(features=16)
      >>> variables = jax.eval_shape(projector.init, jax.random.key(0), maps)
      >>> sorted(variables["params"])
      ['bn1', 'bn2', 'conv1', 'conv2', 'conv3']
    """

    features: int
    grid: tuple[int, int] | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, maps: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps ``[b, h, w, c_student]`` to ``[b, *grid, features]``."""
        x = _on_grid(maps, self.grid)
        for i, kernel in ((1, 1), (2, 3)):
            x = _conv(2 * self.features, kernel, f"conv{i}")(x)
            norm = nn.BatchNorm(
                not train, momentum=0.9, axis_name=self.axis_name, name=f"bn{i}"
            )
            x = nn.relu(norm(x))
        return _conv(self.features, 1, "conv3")(x)


PROJECTORS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"dense": DenseProjector, "conv": ConvProjector, "conv3": ThreeLayerProjector}
)


def _find(layers, name):
    if name not in layers:
        raise ValueError(
            f"a projector is for layer {name!r}, the network has {', '.join(layers)}"
        )
    return layers[name]


def init_projectors(
    key: jax.Array, projectors: Mapping[str, nn.Module], layers: Mapping[str, jax.Array]
) -> dict[str, dict[str, Any]]:
    """Initializes the projectors' variables.

    Args:
      key: random key.
      projectors: a module for each student layer that is projected.
      layers: the student's layers by name, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      ``{"params": {layer: ...}, "batch_stats": {layer: ...}}``, for `add_projectors`.
      ``batch_stats`` has only the layers whose projector has statistics.

    Raises:
      ValueError: the network does not have a layer of ``projectors``.
    """
    made: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for i, (name, projector) in enumerate(sorted(projectors.items())):
        layer = _find(layers, name)
        zeros = jnp.zeros((1, *layer.shape[1:]), layer.dtype)
        variables = projector.init(jax.random.fold_in(key, i), zeros)
        for kind, tree in variables.items():
            made[kind][name] = tree
    return made


def add_projectors(variables: Variables, projectors: Variables) -> dict[str, Any]:
    """Adds the projectors' variables to the student's.

    Args:
      variables: the student's variables, ``{"params": ..., "batch_stats": ...}``.
      projectors: the projectors' variables, from `init_projectors`.

    Returns:
      Variables for the function that `projected_apply` returns.
    """
    kinds = ("params", "batch_stats")
    return {
        kind: {**variables.get(kind, {}), NAME: projectors.get(kind, {})}
        for kind in kinds
    }


def without_projectors(variables: Variables) -> dict[str, Any]:
    """Removes the projectors' variables from the student's.

    Args:
      variables: ``{"params": ..., "batch_stats": ...}``, with or without projectors.

    Returns:
      The network's own variables, for evaluation, export and deployment.

    Examples:
      >>> tree = {"params": {"fc": 1, "projectors": {"features": 2}}}
      >>> without_projectors(tree)
      {'params': {'fc': 1}}
    """
    return {
        kind: {name: value for name, value in tree.items() if name != NAME}
        for kind, tree in variables.items()
    }


def projected_apply(
    apply: Callable[..., tuple[Any, Variables]],
    projectors: Mapping[str, nn.Module],
) -> Callable[..., tuple[Outputs, Variables]]:
    """Makes an apply function of the student that returns projected layers.

    Args:
      apply: the student's function ``apply(variables, images, *, train, rngs) ->
        (outputs, batch_stats)``; ``rngs`` may be missing.
      projectors: a module for each layer that is projected.

    Returns:
      An apply function that takes variables from `add_projectors` and returns
      `adapters.Outputs`, in which layers that have a projector are projected.

    Raises:
      ValueError: the network does not have a layer of ``projectors`` (when called).
    """

    @functools.wraps(apply)  # keeps its signature, in which rngs may be missing
    def projected(variables, images, *, train, **rngs):
        own = without_projectors(variables)
        outputs, stats = apply(own, images, train=train, **rngs)
        layers, learned = layers_of(outputs), {}
        own = {kind: tree.get(NAME, {}) for kind, tree in variables.items()}
        for name, projector in projectors.items():
            mine = {kind: tree[name] for kind, tree in own.items() if name in tree}
            layers[name], updated = projector.apply(
                mine, _find(layers, name), train=train, mutable=["batch_stats"]
            )
            if "batch_stats" in updated:
                learned[name] = updated["batch_stats"]
        features: Any = layers.pop("features", None)
        new = learned if train else own.get("batch_stats", {})
        return (
            Outputs(outputs.logits, features, layers),
            {**stats, NAME: new},
        )

    return projected
