"""Computes the loss with no teacher, with one, or with several teachers by name.

Several teachers are a mapping from names to apply functions, with a mapping from the
same names to distances.  `distill_loss` is computed for each teacher with the same
lambda; the losses are added, and the task is counted once.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.losses import NOTHING, distill_loss
from kddm_jax.numerics import masks
from kddm_jax.numerics.batches import call, layers_of
from kddm_jax.numerics.tokens import (
    SAMPLES,
    Mask,
    read_masks,
    samples_of_tokens,
    tokens_of,
    without_tokens,
)
from kddm_jax.terms import Term

# Folded into a step's key, like the positions of images, which are smaller numbers.
DROPOUT = np.uint32(2**32 - 1)
Taught = tuple[Mapping[str, jax.Array], jax.Array | None]  # layers and logits


def rngs_for(apply: Callable, key: jax.Array | None, axis_name: Any) -> dict[str, Any]:
    """Makes the keyword argument ``rngs`` for an apply function that takes it.

    Args:
      apply: the apply function.
      key: key of the step; None for a network that draws no random numbers.
      axis_name: name of the mapped axis; each device gets its own key.

    Returns:
      ``rngs`` with the key of ``"dropout"``, or ``{}`` if the function does not take
      ``rngs``.
    """
    if "rngs" not in inspect.signature(apply).parameters:
        return {}
    if key is None:
        return {"rngs": {}}
    device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    key = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), device)
    return {"rngs": {"dropout": key}}


def check_teachers(teacher_apply: Any, distance: Any) -> None:
    """Checks teachers and distances before anything is traced.

    Args:
      teacher_apply: the teacher's apply function, a mapping of them, or None.
      distance: the distance to the teacher, or a mapping of them.

    Raises:
      ValueError: there is a distance but neither a teacher nor a bank, or distances
        and teachers have different names.
    """
    if not isinstance(teacher_apply, Mapping) and not isinstance(distance, Mapping):
        terms = [distance] if isinstance(distance, Term) else distance
        # No term needs a teacher if all compare with banks, or if there are none.
        alone = isinstance(terms, Sequence) and all(
            isinstance(term, Term) and term.bank is not None for term in terms
        )
        if teacher_apply is None and not alone:
            raise ValueError(
                f"teacher_apply is None, but distance is {distance!r}; "
                "pass the teacher's apply function, or distance=()"
            )
        return
    _check_names("teacher_apply", teacher_apply, "distance", distance)
    if not distance:
        raise ValueError("teacher_apply names no teacher; pass None, and distance=()")
    if wrong := [name for name in distance if ":" in name or "/" in name]:
        raise ValueError(
            f'a teacher cannot be named {wrong[0]!r}: ":" and "/" divide the names of '
            "terms; give it another name"
        )


def _check_names(one_name, one, other_name, other):
    """Checks that two arguments are mappings of the same names."""
    for name, given in ((one_name, one), (other_name, other)):
        if not isinstance(given, Mapping):
            raise ValueError(
                "several teachers are mappings by name in teacher_apply, distance and "
                f"teacher_variables, got {type(given).__name__} as {name}; pass a "
                "mapping from each teacher's name"
            )
    if set(one) != set(other):
        raise ValueError(
            f"{one_name} and {other_name} must name the same teachers, got "
            f"{', '.join(sorted(one)) or 'none'} and "
            f"{', '.join(sorted(other)) or 'none'}; pass one of each for every teacher"
        )


def teach(teacher_apply: Any, variables: Any, inputs: jax.Array) -> Any:
    """Runs the teachers in evaluation mode.

    Args:
      teacher_apply: the teacher's apply function, a mapping of them, or None.
      variables: the teacher's variables, or a mapping of them.
      inputs: the images that the student sees.

    Returns:
      ``(layers, logits)`` of the teacher, or a mapping from names to such pairs.
    """
    if isinstance(teacher_apply, Mapping):
        _check_names("teacher_apply", teacher_apply, "teacher_variables", variables)
        return {
            name: teach(apply, variables[name], inputs)
            for name, apply in teacher_apply.items()
        }
    if teacher_apply is None:
        return {}, None
    rngs = rngs_for(teacher_apply, None, None)
    outputs, _ = call(teacher_apply, variables, inputs, train=False, **rngs)
    return layers_of(outputs), outputs.logits


def seen(
    taught: Taught | Mapping[str, Taught],
    mask: Mask,
    shape: tuple[int, int] | None = None,
) -> list[jax.Array]:
    """Lists the features, if there are any, and the logits of all teachers.

    Args:
      taught: from `teach`.
      mask: as in `distill_loss`; where it is zero, the arrays are zero.
      shape: ``(n, t)`` if every token is a sample, with a mask ``[n t]``.
    """
    every = [*taught.values()] if isinstance(taught, Mapping) else [taught]
    if shape is not None:
        flat = [samples_of_tokens((logits, layers), shape) for layers, logits in every]
        of_tokens = lambda a: len(a) == shape[0] * shape[1]
        every = [
            ({name: a for name, a in layers.items() if of_tokens(a)}, logits)
            for logits, layers in flat
        ]
    read = read_masks(mask, len(jax.tree.leaves(every)[0]))
    arrays = []
    for layers, logits in every:
        if logits is not None:  # a logit of minus infinity leaves a class out
            arrays.append(jnp.where(logits == -jnp.inf, 0, logits))
        of_maps_alone = logits is None and "features" not in layers
        names = layers if of_maps_alone else {"features"} & {*layers}
        arrays += [
            without_tokens(layer, tokens_of(read.tokens, name, layer))
            for name, layer in ((name, layers[name]) for name in names)
        ]
    return masks.zeroed(read.samples, *arrays)


def loss_of(
    student: tuple[jax.Array, Mapping[str, jax.Array]],
    taught: Taught | Mapping[str, Taught],
    labels: jax.Array,
    *,
    distance: Any,
    teacher_data: Mapping[str, Any] = NOTHING,
    **options: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of one teacher, or the sum over several.

    Args:
      student: the student's logits and layers.
      taught: the teachers' layers and logits, from `teach`.
      labels: as in `distill_loss`.
      distance: as in `distill_loss`, or a mapping from the teachers' names.
      teacher_data: as in `distill_loss`, or a mapping from the teachers' names.
      **options: other arguments of `distill_loss`.

    Returns:
      The loss and its terms, as in `distill_loss`.  With several teachers, terms are
      called ``"teacher:term"``.
    """
    logits, layers = student
    if isinstance(taught, Mapping):
        return _sum(
            student,
            taught,
            labels,
            distance=distance,
            teacher_data=teacher_data,
            **options,
        )
    return distill_loss(
        *(layers, taught[0], labels, logits, taught[1]),
        distance=distance,
        teacher_data=teacher_data,
        **options,
    )


def _masks_of(mask, student, taught, name):
    """Leaves out the tokens of layers that only other teachers have."""
    if not isinstance(mask, Mapping):
        return mask
    own = {*student[1], *taught[name][0]}
    others = {layer for layers, _ in taught.values() for layer in layers} - own
    read = read_masks(mask, len(student[0]))
    kept = {layer: of for layer, of in read.tokens.items() if layer not in others}
    return kept if read.samples is None else {**kept, SAMPLES: read.samples}


def _sum(student, taught, labels, *, distance, teacher_data, mask=None, **options):
    if unknown := [name for name in teacher_data if name not in taught]:
        raise ValueError(
            f"teacher_data has {unknown[0]!r}, which is no teacher; the teachers are "
            f"{', '.join(taught)}, and each takes a mapping of its own"
        )
    losses, terms = [], {}
    for name, outputs in taught.items():
        loss, found = loss_of(
            *(student, outputs, labels),
            distance=distance[name],
            teacher_data=teacher_data.get(name, NOTHING),
            mask=_masks_of(mask, student, taught, name),
            **options,
        )
        terms["task"] = found.pop("task")
        terms |= {f"{name}:{term}": value for term, value in found.items()}
        losses.append(loss)
        options["task_weight"] = 0.0  # the task is counted with the first teacher only
    return sum(losses[1:], losses[0]), terms
