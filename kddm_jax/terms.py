"""The terms of a loss: one distance between one pair of layers each, and their weights.

`losses.distill_loss` takes one distance, one `Term` or a sequence of them as
``distance``; here it becomes a tuple of Terms, its lambda and its options are checked.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from kddm_jax.distances import (
    DISTANCES,
    Distance,
    Options,
    callable_name,
    get_distance,
    hashable_options,
)
from kddm_jax.numerics.checks import check_choice, check_number
from kddm_jax.numerics.normalization import check_normalization
from kddm_jax.numerics.positions import POSITIONS

# Keyword arguments that a distance with labels gets with a bank.
OF_BANK = ("labels_y", "weights_y", "num_classes")


def _pair_of_layers(layers):
    """Returns the names of two layers, or None."""
    if layers is None:
        return None
    pair = tuple(layers) if isinstance(layers, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(name, str) for name in pair):
        raise ValueError(
            f"layers must be (student_layer, teacher_layer), got {layers!r}; pass two "
            "names"
        )
    return pair


@dataclass(frozen=True)
class Term:
    """Describes one distance in the loss, between a student and a teacher layer.

    Terms are hashable.

    Attributes:
      distance: a key of `DISTANCES`, a `Distance`, or a callable of ``(x, y)``.
      weight: number ``>= 0`` that multiplies this distance; lambda then multiplies the
        sum of all terms.  A Term does not take the catalogue's default lambda.
      layers: ``(student_layer, teacher_layer)``, the layers to compare if features are
        mappings from layer name to array.  None compares ``"features"`` of both
        networks.  ``"logits"`` is the layer of the logits, unless another layer has
        that name.  Distances of predictions do not need layers.
      options: keyword arguments of the distance, as a mapping; stored as sorted pairs.
      name: name of this term in the dict that `distill_loss` returns.  None uses the
        key of the distance or the function's name, and with ``layers`` appends ``@``
        and the student's layer, such as ``"gram@block3"``.
      positions: how a distance of features treats maps ``[n, h, w, c]`` or tokens ``[n,
        t, c]``.  ``"pool"`` averages them over positions.  ``"each"`` makes every
        position a sample with the label of its image; the larger map is first
        average-pooled to the grid of the smaller one.  Tokens that the loss's ``mask``
        leaves out are neither averaged nor samples.
      normalization: normalization for this term only, as in `distill_loss`; None uses
        the one given to `distill_loss`.
      bank: name of a `Bank` in the loss's ``teacher_data`` that replaces the teacher's
        features of the batch; the normalization then transforms the student's features
        only.  None compares with the batch.

    Raises:
      ValueError: the weight is not a number ``>= 0``, an option is an array, a choice
        is unknown, the distance does not have an option, layers are not two names, or
        normalization, positions or layers do not apply to the distance.

    Examples:
      >>> Term("w2", weight=0.5, options={"solver": "exact"}).options
      (('solver', 'exact'),)
    """

    distance: str | Distance | Callable[..., jax.Array]
    _: KW_ONLY
    weight: float = 1.0
    layers: tuple[str, str] | None = None
    options: Options = ()
    name: str | None = None
    positions: str = "pool"
    normalization: str | None = None
    bank: str | None = None

    def __post_init__(self):
        """Checks everything that does not depend on arrays."""
        object.__setattr__(self, "options", hashable_options(self.options))
        object.__setattr__(self, "layers", _pair_of_layers(self.layers))
        name = term_name(self)
        if isinstance(self.weight, Tracer):
            raise ValueError(
                f"weight of {name} is traced, but a Term is a constant of the program; "
                "pass a number, and trace lambda: distill_loss(..., weight=...)"
            )
        check_number(f"weight of {name}", self.weight, positive=False)
        object.__setattr__(self, "weight", float(self.weight))
        check_choice("positions", self.positions, POSITIONS)
        check_normalization(self.normalization)
        row = get_distance(self.distance)
        for option, value, default, able in (
            ("normalization", self.normalization, None, {"features"}),
            ("positions", self.positions, "pool", {"features"}),
            ("layers", self.layers, None, {"features", "maps"}),
        ):
            if value != default and able.isdisjoint(row.inputs):
                raise ValueError(
                    f"{option}={value!r} is for distances of "
                    f"{' or '.join(sorted(able))}, but {name} compares "
                    f"{row.inputs[0]}; leave it out"
                )
        if self.bank is not None:
            check_bank(name, row)
        check_names(name, row, dict(self.options))


def check_bank(name: str, row: Distance) -> None:
    """Raises a ``ValueError`` if a distance cannot compare a batch with a bank.

    Args:
      name: name of the term, for the message.
      row: the distance; one of your own may be any function of features.
    """
    known = row in DISTANCES.values()
    if known and "sizes" in row.promises:
        return
    if known or not {"features"} <= set(row.inputs) <= {"features", "labels", "key"}:
        able = [key for key, other in DISTANCES.items() if "sizes" in other.promises]
        raise ValueError(
            f"{name} cannot compare a batch with features of other images, so it takes "
            f"no bank; take {', '.join(able)}, or leave bank out"
        )
    options = inspect.signature(row.fn).parameters
    if "labels" in row.inputs and not options.keys() >= {*OF_BANK}:
        raise ValueError(
            f"{name} takes labels and has a bank, so it needs the keyword arguments "
            f"{', '.join(OF_BANK)}; add them, or leave bank out"
        )


def check_arguments(name: str, row: Distance, passed: Iterable[str]) -> None:
    """Raises a ``ValueError`` if an argument of a distance would have no value.

    Args:
      name: name of the term, for the message.
      row: the distance.
      passed: names of the keyword arguments that the function gets.
    """
    known = inspect.signature(row.fn).parameters.values()
    needed = [p for p in known if p.default is p.empty and p.name not in passed]
    if row.inputs == ("features",) and "labels" in [p.name for p in needed]:
        raise ValueError(
            f"distance {name!r} needs labels; wrap it in Distance(fn, "
            "inputs=('features', 'labels'))"
        )
    if missing := [p.name for p in needed if p.kind is p.KEYWORD_ONLY]:
        raise ValueError(
            f"distance {name!r} needs the option {', '.join(missing)}; "
            "pass it as a keyword, or in Term(..., options={...})"
        )


def term_name(term: Term) -> str:
    """Returns the name of a term in the results of the loss."""
    if term.name is not None:
        return term.name
    if isinstance(term.distance, str):
        name = term.distance
    else:
        fn = term.distance.fn if isinstance(term.distance, Distance) else term.distance
        name = callable_name(fn)
    return name if term.layers is None else f"{name}@{term.layers[0]}"


# Keyword arguments that the loss passes.
_OF_LOSS = ("mask", "labels_y", "weights_y")


def check_names(name: str, row: Distance, options: Mapping[str, Any]) -> None:
    """Checks that a distance has options of these names.

    Args:
      name: name of the term, for the message.
      row: the distance.
      options: the options by name.

    Raises:
      ValueError: the distance's function does not take an option.
    """
    if not options:
        return
    known = inspect.signature(row.fn).parameters
    wrong = [key for key in options if key not in known and key not in row.inputs]
    if not wrong or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    able = [
        p.name
        for p in known.values()
        if p.kind is p.KEYWORD_ONLY or p.default is not p.empty
    ]
    able = ", ".join(key for key in able if key not in _OF_LOSS)
    has = f"its options are {able}" if able else "it has no options"
    raise ValueError(f"distance {name!r} has no option {wrong[0]!r}; {has}")


def is_one(distance: object) -> bool:
    """Returns whether this is a single distance rather than Terms."""
    return isinstance(distance, str | Distance) or callable(distance)


def as_terms(distance: Any) -> tuple[Term, ...]:
    """Turns one distance, one Term or a sequence of Terms into a tuple of Terms."""
    if isinstance(distance, Term):
        terms = (distance,)
    elif isinstance(distance, Sequence) and not isinstance(distance, str):
        terms = tuple(distance)
    else:
        terms = (Term(distance),)
    for term in terms:
        if not isinstance(term, Term):
            raise ValueError(
                "a sequence of distances must hold Terms, got "
                f"{type(term).__name__}; write Term({term!r}, weight=...)"
            )
    names = [term_name(term) for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"terms must have different names, got {', '.join(names)}")
    for name in names:
        if name == "task" or "/" in name:
            raise ValueError(
                f'a term cannot be named {name!r}: "task" is the cross-entropy and '
                '"/" marks diagnostics; give it another name'
            )
    return terms


def lambda_of(weight: Any, distance: Any, normalization: str | None) -> Any:
    """Returns lambda, by default 1 for Terms or the catalogue's for one distance."""
    if weight is not None:
        check_number("weight", weight, positive=False)
        return weight
    if not is_one(distance):
        return 1.0
    row = get_distance(distance)
    if normalization not in row.weights:
        known = [f"normalization={name!r}" for name in row.weights]
        raise ValueError(
            f"weight is None, but {row.title or callable_name(row.fn)} has no default "
            f"weight with normalization={normalization!r}"
            + (f", only with {', '.join(known)}" if known else "")
            + "; pass a number, weight=..."
        )
    return row.weights[normalization]


def check_options(distance: object, options: Mapping[str, Any]) -> None:
    """Rejects options given together with Terms, unknown ones, and arrays."""
    if options and not is_one(distance):
        raise ValueError(
            f"got the option {', '.join(options)}, but Terms have options of their "
            "own; write Term(..., options={...})"
        )
    hashable_options({name: o for name, o in options.items() if np.ndim(o)})
    if options:
        (term,) = as_terms(distance)
        check_names(term_name(term), get_distance(term.distance), options)
