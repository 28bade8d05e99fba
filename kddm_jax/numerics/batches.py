"""Augments batches, and checks them and outputs of networks while a step is traced.

Images are one array, or a mapping of arrays, whose leading axis counts the samples.  A
network's apply function returns its outputs and its state.  Outputs have ``logits``;
only distances that compare ``features`` or ``maps`` need them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kddm_jax.numerics.axes import check_axis
from kddm_jax.numerics.checks import check_samples
from kddm_jax.numerics.devices import shard_rows, unsharded


def count_samples(images: Any) -> int:
    """Returns the length of the leading axis of images.

    Args:
      images: an array, or a mapping of arrays, ``[n, ...]``.

    Raises:
      ValueError: images are not arrays, arrays have different numbers of images, or
        there are no images.
    """
    if isinstance(images, list | tuple):
        raise ValueError(
            "images must be an array or a mapping of arrays, got "
            f"{type(images).__name__}; pass np.stack(images), or name the parts in a "
            "mapping"
        )
    arrays = jax.tree.leaves(images)
    if not arrays:
        raise ValueError("images hold no array; pass an array [n, ...] or a mapping")
    if any(array.ndim == 0 for array in arrays):
        raise ValueError("images must have a leading axis of samples, got a scalar")
    counts = sorted({array.shape[0] for array in arrays})
    if len(counts) > 1:
        raise ValueError(
            f"images must be as many in all arrays of the mapping, got {counts}; the "
            "leading axis of each counts the samples"
        )
    check_samples("images", arrays[0])
    return counts[0]


def augment_batch(
    augment: Callable[[jax.Array, Any], Any],
    key: jax.Array,
    images: Any,
    axis_name: str | None,
) -> Any:
    """Augments images with keys that do not depend on the number of devices.

    Args:
      augment: function ``(key, image) -> image``.
      key: key of the step.
      images: this device's share, as in `count_samples`.
      axis_name: name of the mapped axis, or None.

    Returns:
      The augmented images, ``[n, ...]``; on an explicit mesh, every device augments
      all images, and gets its rows of the result.

    Raises:
      ValueError: no surrounding function maps the axis.
    """
    check_axis(axis_name)
    n = count_samples(images)
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * n
    fold = lambda position: jax.random.fold_in(key, position)
    keys = jax.vmap(fold)(start + jnp.arange(n))
    whole = jax.tree.map(unsharded, images)
    return shard_rows(jax.vmap(augment)(keys, whole), jax.tree.leaves(images)[0])


def check_leaf(array: Any) -> None:
    """Checks that a leaf of a batch is an array with a leading axis of samples.

    Args:
      array: a leaf of a tree.  The leaves of a list of labels are numbers.

    Raises:
      ValueError: the leaf is a number, or an array without axes.
    """
    if not getattr(array, "ndim", 0):
        raise ValueError(
            "a batch must be a tree of arrays with a leading axis of samples, got "
            f"{type(array).__name__}; pass np.asarray(labels) for a list of labels"
        )


def call(
    apply: Callable[..., Any], variables: Any, images: Any, **options: Any
) -> tuple[Any, Mapping[str, Any]]:
    """Calls an apply function and checks its result.

    Args:
      apply: the apply function of a network.
      variables: the network's variables.
      images: images, as in `count_samples`.
      **options: other arguments, ``train`` and ``rngs``.

    Returns:
      The outputs and the new state.

    Raises:
      ValueError: the function does not return a pair of outputs and state, or the
        outputs have no logits.
    """
    returned = apply(variables, images, **options)
    # A NamedTuple of two arrays is a tuple of length two, too, but has logits.
    is_pair = isinstance(returned, tuple) and not hasattr(returned, "logits")
    if not is_pair or len(returned) != 2:
        raise ValueError(
            "an apply function must return a pair (outputs, state), got "
            f"{type(returned).__name__}; return (outputs, {{}}) for a network without "
            "state"
        )
    outputs, state = returned
    if not hasattr(outputs, "logits"):
        raise ValueError(
            "the outputs of an apply function must have the attribute logits, got "
            f"{type(outputs).__name__}; return kddm_jax.adapters.Outputs(logits, "
            "features, maps)"
        )
    return outputs, state


def layers_of(outputs: Any) -> dict[str, jax.Array]:
    """Returns a network's features and maps by name, or ``{}`` if it has none.

    Args:
      outputs: the outputs of a network.

    Raises:
      ValueError: ``maps`` is not a mapping.
    """
    features = getattr(outputs, "features", None)
    maps = getattr(outputs, "maps", None)
    if maps is not None and not isinstance(maps, Mapping):
        raise ValueError(
            "maps must be a mapping from the name of a layer to its array, got "
            f"{type(maps).__name__}; return maps={{'layer1': ..., ...}}"
        )
    return {**({} if features is None else {"features": features}), **(maps or {})}
