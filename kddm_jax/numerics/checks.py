"""Checks the arguments of distances while they are traced.

Each check raises a ``ValueError`` that names the argument, says what was found and what
was expected, and suggests a fix.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kddm_jax.numerics.devices import unsharded

# Names of the student's and the teacher's logits in messages.
LOGITS = ("logits_x", "logits_y")
# Directions of a divergence; the released code uses the first.
DIRECTIONS = ("student||teacher", "teacher||student")


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Checks that the value of an option is one of its choices.

    Args:
      name: name of the argument, for the message.
      value: value that the caller passed.
      known: all choices.

    Raises:
      ValueError: the value is not one of the choices.
    """
    if not isinstance(value, str) or value not in known:
        choices = ", ".join(repr(k) for k in known)
        raise ValueError(f"{name} must be one of {choices}; got {value!r}")


def as_released(compat: str | None, **options: tuple[Any, Any, Any]) -> list[Any]:
    """Returns the given options, or those of the released code.

    Args:
      compat: None, or ``"released"`` for the options of the released code.
      **options: for each name, the given value, the default and the released value.

    Returns:
      The given values, or with ``"released"`` the released values, in the same order.

    Raises:
      ValueError: ``compat`` is unknown, or an option contradicts it.

    Examples:
      >>> as_released("released", reduction=("mean", "mean", "sum"))
      ['sum']
    """
    if compat not in (None, "released"):
        raise ValueError(f'compat must be None or "released", got {compat!r}')
    if compat is None:
        return [given for given, _, _ in options.values()]
    for name, (given, default, released) in options.items():
        known = isinstance(given, str | int) and given in (default, released)
        if given is not default and not known:
            raise ValueError(
                f'compat="released" means {name}={released!r}, got {name}={given!r}; '
                "leave out one of the two"
            )
    return [released for _, _, released in options.values()]


def check_number(
    name: str, value: float | jax.Array, *, positive: bool, hint: str = ""
) -> None:
    """Checks that a value is a single number, and its sign unless it is traced.

    Args:
      name: name of the argument, for the message.
      value: a number, or a scalar array.
      positive: True if zero is an error, too.
      hint: end of the message, with a fix.

    Raises:
      ValueError: the value is not a number, or it is negative, NaN, or zero if
        ``positive``.
    """
    if np.ndim(value) != 0:
        raise ValueError(
            f"{name} must be a number, got shape {list(np.shape(value))}{hint}"
        )
    if isinstance(value, Tracer):
        return
    number = np.asarray(value)  # inside a trace, jnp would stage the comparison
    wanted = "positive" if positive else "a number >= 0"
    if number.dtype.kind not in "biuf" and number.dtype != jnp.bfloat16:
        raise ValueError(f"{name} must be {wanted}, got {value!r}{hint}")
    if not (number > 0 if positive else number >= 0):
        raise ValueError(f"{name} must be {wanted}, got {value}{hint}")


def check_count(name: str, value: int) -> None:
    """Checks that a value is a whole number and at least 1.

    Args:
      name: name of the argument, for the message.
      value: value that the caller passed.

    Raises:
      ValueError: the value is not a whole number, or it is less than 1.
    """
    if not isinstance(value, int | np.integer):
        what = f"shape {list(np.shape(value))}" if np.ndim(value) else f"{value}"
        raise ValueError(f"{name} must be a whole number, got {what}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def as_float(name: str, x: jax.Array) -> jax.Array:
    """Casts a floating-point array to float32, or leaves it in float64.

    Args:
      name: name of the argument, for the message.
      x: array of any floating-point dtype.

    Returns:
      ``x`` in float32, or in float64 if it has that dtype.

    Raises:
      ValueError: ``x`` is not a floating-point array.
    """
    x = unsharded(jnp.asarray(x))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating, got {x.dtype}; cast it with .astype(jnp.float32)"
        )
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def check_samples(name: str, array: jax.Array) -> None:
    """Checks that a batch is not empty.

    Args:
      name: name of the argument, for the message.
      array: shape ``[n, ...]``.

    Raises:
      ValueError: n is zero.
    """
    if array.ndim and not len(array):
        raise ValueError(
            f"{name} must have at least one sample, got shape {list(array.shape)}; "
            "skip empty batches"
        )


def check_pair(
    x: jax.Array,
    y: jax.Array,
    *,
    names: tuple[str, str] = ("x", "y"),
    same_rows: bool = False,
    same_columns: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Checks the features of student and teacher and casts them to one float dtype.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``.
      names: names of the two arguments, for the messages.
      same_rows: True if ``n`` must equal ``m``.
      same_columns: True if the widths must be equal.

    Returns:
      Both arrays, as float32 or float64.

    Raises:
      ValueError: an array has a wrong rank, dtype or shape.
    """
    x, y = as_float(names[0], x), as_float(names[1], y)
    for name, array in zip(names, (x, y), strict=True):
        check_samples(name, array)
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(
                f"{name} must have shape [samples, features], got {list(array.shape)}; "
                "pool or flatten maps, add an axis to vectors"
            )
    if same_columns and x.shape[1] != y.shape[1] and names == LOGITS:
        raise ValueError(
            "logits_x and logits_y must be of the same classes, got "
            f"{x.shape[1]} and {y.shape[1]}; give both networks a head of as many "
            "classes, or compare their features"
        )
    if same_columns and x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same width, got "
            f"{x.shape[1]} and {y.shape[1]}; map the student to the teacher's width "
            "with kddm_jax.networks.projectors"
        )
    if same_rows and x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{names[0]} and {names[1]} must hold the same samples, got "
            f"{x.shape[0]} and {y.shape[0]} rows; pass both networks the same batch"
        )
    dtype = np.promote_types(x.dtype, y.dtype)
    return x.astype(dtype), y.astype(dtype)


def check_labels(
    labels: jax.Array,
    n: int,
    *,
    num_classes: int | None = None,
    name: str = "labels",
    rows_of: str = "the other arrays",
) -> jax.Array:
    """Checks class labels, and their values unless they are traced.

    Args:
      labels: int, shape ``[n]``; negative labels mean no label.
      n: number of samples.
      num_classes: number of classes, which all labels must be below; None checks no
        values.
      name: name of the argument, for the message.
      rows_of: name of the array with n rows, for the message.

    Returns:
      The labels.

    Raises:
      ValueError: the labels have a wrong shape, dtype or value.
    """
    labels = unsharded(jnp.asarray(labels))
    check_samples(name, labels)
    if labels.ndim == 1 and len(labels) != n:
        raise ValueError(
            f"{name} must have shape [n]=[{n}], got [{len(labels)}], because {rows_of} "
            f"have {n} rows; pass arrays of the same batch"
        )
    if labels.shape != (n,):
        # For a single column, argmax would make every label 0.
        column = labels.shape == (n, 1)
        fix = (
            f"{name}[:, 0]" if column else "argmax(one_hot, axis=-1) for one-hot labels"
        )
        raise ValueError(
            f"{name} must have shape [n]=[{n}], got {list(labels.shape)}; pass {fix}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers, got {labels.dtype}; cast with .astype(jnp.int32)"
        )
    if num_classes is None or isinstance(labels, Tracer):
        return labels
    largest = int(np.asarray(labels).max())  # inside a trace, jnp would stage it
    if largest >= num_classes:
        raise ValueError(
            f"{name} must lie below num_classes={num_classes}, got {largest}; "
            "correct the labels, or give the network a logit for each class"
        )
    return labels
