"""Brings the arrays and numbers of all devices of a mapped axis together.

A distance between distributions is not an average over images, so it cannot be computed
per device and averaged: arrays are gathered first.  Only means over images are computed
per device.  Groups are lists of device indices, ``axis_index_groups`` of JAX; None is
one group of all.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Groups = list[list[int]] | None
Tree = TypeVar("Tree")  # any PyTree of arrays, the same out as in


def check_axis(axis_name: str | None) -> None:
    """Refuses ``jax.shard_map(check_vma=True)``, whose gradients would be wrong.

    It replaces the transpose of a replicated argument by a sum over devices, so that
    gradients come out N times too large.  There, and only there, the index of the
    device has a type that varies over the axis.
    """
    if axis_name is None:
        return
    index = jax.typeof(jax.lax.axis_index(axis_name))
    if index.manual_axis_type.varying:
        raise ValueError(
            f"axis_name={axis_name!r} belongs to a jax.shard_map with check_vma=True "
            "(its default), under which gradients of this loss would be wrong; pass "
            "check_vma=False to jax.shard_map and average the gradients with "
            "jax.lax.pmean"
        )


def groups_of(axis_name: str | None, group_size: int | None) -> Groups:
    """Makes the groups of ``group_size`` neighbours that gather from each other."""
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
    return [
        list(range(start, start + group_size))
        for start in range(0, devices, group_size)
    ]


def gather(tree: Tree, axis_name: str | None, groups: Groups = None) -> Tree:
    """Concatenates every array with those of the other devices of the group."""
    if axis_name is None:
        return tree
    return jax.tree.map(
        lambda a: jax.lax.all_gather(
            a, axis_name, axis=0, tiled=True, axis_index_groups=groups
        ),
        tree,
    )


def mean_over_images(
    value: jax.Array, count: jax.Array, axis_name: Any, groups: Groups
) -> jax.Array:
    """Computes the mean over a group's images of means over each device's ``count``."""
    count = count.astype(value.dtype)
    total, images = jax.lax.pmean(
        (count * value, count), axis_name, axis_index_groups=groups
    )
    return total / jnp.maximum(images, 1e-6)


def worst(stats: Mapping[str, jax.Array], axis_name: Any) -> dict[str, jax.Array]:
    """Takes the least "converged" and the largest of all other diagnostics."""
    # neither has a derivative by axis, and diagnostics need none
    extreme = lambda name: jax.lax.pmin if name == "converged" else jax.lax.pmax
    stats = jax.lax.stop_gradient(stats)
    return {name: extreme(name)(stat, axis_name) for name, stat in stats.items()}


def average_state(state: Tree, axis_name: Any) -> Tree:
    """Averages floating arrays over devices; counters are alike on all."""
    floating = lambda a: jnp.issubdtype(jnp.result_type(a), jnp.floating)
    mean = lambda a: jax.lax.pmean(a, axis_name) if floating(a) else a
    return jax.tree.map(mean, state)


def accuracy_of(logits: jax.Array, labels: jax.Array, axis_name: Any) -> jax.Array:
    """Computes the share of all devices' labelled images with a right prediction."""
    hits = jnp.sum(jnp.argmax(logits, axis=-1) == labels)  # never of a negative label
    counts = jnp.stack([hits, jnp.sum(labels >= 0)]).astype(jnp.float32)
    if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)
    return counts[0] / jnp.maximum(counts[1], 1)
