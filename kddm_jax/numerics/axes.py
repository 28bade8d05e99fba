"""Checks the names of mapped axes, and the arguments of mapped functions.

A step that ignores the axis over which it is mapped would train each device on its own,
without an error.  Functions that `train_step` makes therefore carry the name of their
axis, which `train_step.parallel` compares with its own.
"""

from collections.abc import Callable
from typing import Any

import jax

_ATTRIBUTE = "kddm_axis_name"
_UNKNOWN = object()


def check_axis(axis_name: Any) -> None:
    """Checks that an axis is mapped by a surrounding pmap or shard_map.

    Args:
      axis_name: name of the axis, or several names, or None.

    Raises:
      ValueError: no surrounding function maps the axis.
    """
    if axis_name is None:
        return
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name={axis_name!r} is not the axis of a surrounding pmap or "
            "shard_map; pass the name of the mapped axis, or axis_name=None under "
            "plain jit"
        ) from None


def with_axis(fn: Callable, axis_name: Any) -> Callable:
    """Marks a per-device function with the name of its axis.

    Args:
      fn: the function.
      axis_name: what `axis_of` returns of it.

    Returns:
      The function.
    """
    setattr(fn, _ATTRIBUTE, axis_name)
    return fn


def axis_of(fn: Callable) -> Any:
    """Returns the name of a function's axis, or an unknown one if it has no mark."""
    return getattr(fn, _ATTRIBUTE, _UNKNOWN)


def check_mapped(fn: Callable, axis_name: str) -> None:
    """Checks that a function with a mark has the axis over which it is mapped.

    Args:
      fn: the function; one without a mark passes.
      axis_name: name of the axis.

    Raises:
      ValueError: the function was made with another ``axis_name``.
    """
    if axis_of(fn) not in (_UNKNOWN, axis_name):
        raise ValueError(
            f"parallel maps the axis {axis_name!r}, but the step was made with "
            f"axis_name={axis_of(fn)!r}; leave axis_name out when you make the step"
        )


def check_arguments(arguments: tuple, in_axes: tuple) -> None:
    """Checks that each argument of a mapped function has an axis.

    Args:
      arguments: positional arguments of the function.
      in_axes: the axis of each argument.

    Raises:
      ValueError: their numbers differ.
    """
    if len(arguments) != len(in_axes):
        raise ValueError(
            f"got {len(arguments)} arguments, but in_axes={in_axes} is for "
            f"{len(in_axes)}; give each argument an axis, and pass all of them"
        )
