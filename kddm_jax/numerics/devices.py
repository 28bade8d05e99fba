"""Combines the arrays and numbers of all devices of a mapped axis.

A distance between distributions is not an average over images, so it cannot be computed
per device and averaged: arrays are gathered first.  Only means over images are computed
per device.  Groups are lists of device indices, as ``axis_index_groups`` in JAX; None
means one group of all devices.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kddm_jax.numerics.axes import check_axis

Groups = list[list[int]] | None
Tree = TypeVar("Tree")  # any PyTree of arrays; the result has the same structure


def _checks_variance(axis_name):
    """Returns whether the axis belongs to a ``jax.shard_map(check_vma=True)``.

    Only then does the type of the device's index vary over the axis.
    """
    return bool(jax.typeof(jax.lax.axis_index(axis_name)).manual_axis_type.varying)


def unsharded(x: jax.Array) -> jax.Array:
    """Replicates an array that is sharded over an explicit mesh.

    On such a mesh most operations between arrays of different shardings are errors.
    Other arrays are returned unchanged, because the compiler decides on their sharding.
    """
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.reshard(x, NamedSharding(mesh, PartitionSpec()))


def shard_rows(tree: Tree, like: jax.Array) -> Tree:
    """Shards leading axes over an explicit mesh, as the leading axis of an array is.

    Args:
      tree: tree of arrays ``[n, ...]``, which are not sharded.
      like: array ``[n, ...]``; without an explicit mesh, the tree is returned as it is.
    """
    sharding = jax.typeof(like).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return tree
    rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    return jax.tree.map(lambda array: jax.reshard(array, rows), tree)


def groups_of(axis_name: str | None, group_size: int | None) -> Groups:
    """Makes the groups of ``group_size`` neighbours that gather from each other."""
    check_axis(axis_name)
    if group_size is None:
        return None
    if axis_name is None:
        raise ValueError(
            f"group_size={group_size} groups the devices of an axis, but axis_name is "
            "None; pass axis_name, or leave group_size out"
        )
    devices = jax.lax.axis_size(axis_name)
    if group_size < 1 or devices % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide the {devices} devices of axis "
            f"{axis_name!r}; choose a divisor of {devices}"
        )
    if group_size == devices:
        return None
    if _checks_variance(axis_name):
        raise ValueError(
            f"group_size={group_size} makes groups of axis {axis_name!r}, which is not "
            "available under jax.shard_map(check_vma=True), its default; leave "
            "group_size out, or pass check_vma=False to jax.shard_map and average the "
            "gradients with jax.lax.pmean"
        )
    return [
        list(range(start, start + group_size))
        for start in range(0, devices, group_size)
    ]


def _gather_alike(array, axis_name):
    """Concatenates arrays of all devices to one whose type does not vary over them.

    JAX sums the cotangents of arrays that do not vary, such as parameters, over
    devices.  The loss must therefore not vary, or the sum counts it once for each
    device.  The result of ``all_gather`` has a varying type, and that of ``psum`` has
    not.  Each device adds zeros outside its own share, so the sum is exact.
    """
    shape = (jax.lax.axis_size(axis_name), *array.shape)
    index = jax.lax.axis_index(axis_name)
    shares = jnp.zeros(shape, array.dtype).at[index].set(array)
    every = jax.lax.psum(shares, axis_name).reshape(-1, *array.shape[1:])
    return every.astype(array.dtype)  # psum counts booleans


def gather(tree: Tree, axis_name: str | None, groups: Groups = None) -> Tree:
    """Concatenates every array with those of the other devices of the group.

    Without an axis, arrays that are sharded over an explicit mesh are replicated.
    """
    if axis_name is None:
        return jax.tree.map(unsharded, tree)
    if _checks_variance(axis_name):
        return jax.tree.map(lambda a: _gather_alike(a, axis_name), tree)
    return jax.tree.map(
        lambda a: jax.lax.all_gather(
            a, axis_name, axis=0, tiled=True, axis_index_groups=groups
        ),
        tree,
    )


def mean_over_images(
    value: jax.Array, count: jax.Array, axis_name: Any, groups: Groups
) -> jax.Array:
    """Computes the mean over a group's images from each device's mean and count."""
    count = count.astype(value.dtype)
    value = jnp.where(count > 0, value, 0)  # a mean of no images may be NaN
    total, images = jax.lax.pmean(
        (count * value, count), axis_name, axis_index_groups=groups
    )
    return total / jnp.maximum(images, 1e-6)


def worst(stats: Mapping[str, jax.Array], axis_name: Any) -> dict[str, jax.Array]:
    """Returns the smallest "converged" and the largest value of other diagnostics."""
    # pmin and pmax have no derivative, not even for a constant
    extreme = lambda name: jnp.min if name == "converged" else jnp.max
    every = gather({n: jnp.reshape(s, 1) for n, s in stats.items()}, axis_name)
    return {name: extreme(name)(stat) for name, stat in every.items()}


def average_state(state: Tree, axis_name: Any) -> Tree:
    """Averages floating arrays over devices; counters are equal on all devices."""
    floating = lambda a: jnp.issubdtype(jnp.result_type(a), jnp.floating)
    mean = lambda a: jax.lax.pmean(a, axis_name) if floating(a) else a
    return jax.tree.map(mean, state)


def accuracy_of(logits: jax.Array, labels: jax.Array, axis_name: Any) -> jax.Array:
    """Computes the accuracy on the labelled images of all devices."""
    logits, labels = unsharded(logits), unsharded(labels)
    predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    hits = jnp.sum(predicted == labels.astype(jnp.int32))  # never for a negative label
    counts = jnp.stack([hits, jnp.sum(labels >= 0)]).astype(jnp.float32)
    if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)
    return counts[0] / jnp.maximum(counts[1], 1)
