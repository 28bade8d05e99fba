"""Calls functions whose loops start from constants inside a checked shard_map.

Under ``jax.shard_map(check_vma=True)``, the type of an array says over which axes of
the mesh it varies.  A loop must return its carry with the type that it got, but the
loops of ott and optax start from constants such as zeros, which do not vary, and return
arrays that do.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.extend.core import jaxpr_as_fun

Tree = TypeVar("Tree")


def _varying(array):
    return jax.typeof(array).manual_axis_type.varying


def call_varying(fn: Callable[..., Tree], *arguments: Any) -> Tree:
    """Calls a function whose loops start from constants.

    Outside of a checked ``shard_map``, and for arrays that are equal on all devices,
    this is ``fn(*arguments)``.  Otherwise the function is traced on arrays whose types
    do not vary, becomes one call in the program, and its results are marked as varying.
    This is right for a function without collectives: types do not change what is
    computed on a device, and nothing differentiates the call.

    Args:
      fn: function of arrays, without collectives, which is not differentiated.
      *arguments: arrays, or trees of them.

    Returns:
      The function's result; it varies over the axes over which an argument varies.

    Examples:
      >>> import jax.numpy as jnp
      >>> total = lambda x: jax.lax.fori_loop(0, 3, lambda _, s: s + x, jnp.zeros(()))
      >>> call_varying(total, jnp.array(2.0))
      Array(6., dtype=float32)
    """
    leaves, structure = jax.tree.flatten(arguments)
    axes = frozenset().union(*(_varying(leaf) for leaf in leaves))
    if not axes:
        return fn(*arguments)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    one_call = jax.jit(lambda *leaves: fn(*jax.tree.unflatten(structure, leaves)))
    jaxpr, result = jax.make_jaxpr(one_call, return_shape=True)(*shapes)

    def mark(array):
        missing = tuple(axes - _varying(array))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    results = map(mark, jaxpr_as_fun(jaxpr)(*map(mark, leaves)))
    return jax.tree.unflatten(jax.tree.structure(result), results)
