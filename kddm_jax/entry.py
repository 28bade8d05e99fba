"""Describes a distance: its function, the arrays that it takes, and its properties.

`distances.DISTANCES` is a mapping from keys to such descriptions.  Tests, benchmarks,
pages and commands read them, so that a new entry needs no other list.
"""

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType

import jax
import numpy as np

from kddm_jax.families.gaussian import gaussian_wasserstein
from kddm_jax.families.gaussian_kl import gaussian_kl
from kddm_jax.families.kernels import mmd
from kddm_jax.numerics.normalization import NORMALIZATIONS

Options = Mapping[str, object] | tuple[tuple[str, object], ...]


def _hashable(name, value):
    """Checks that an option can be hashed; turns a list into a tuple."""
    if isinstance(value, list | tuple):
        return tuple(_hashable(name, item) for item in value)
    if isinstance(value, np.ndarray | jax.Array):
        raise ValueError(
            f"option {name} is an array of shape {list(value.shape)}, but options "
            "are constants of the program; pass a Python number, or pass an array "
            f"that is computed from the teacher as teacher_data={{{name!r}: ...}}"
        )
    if not isinstance(value, Hashable):
        raise ValueError(
            f"option {name} is a {type(value).__name__}, which has no hash, but "
            "options are constants of the program; pass a number, a string or a tuple"
        )
    return value


def hashable_options(options: Options) -> tuple[tuple[str, object], ...]:
    """Sorts options into pairs, which can be hashed.

    Args:
      options: a mapping from names to values, or its pairs.

    Returns:
      The pairs, sorted by name; lists become tuples.

    Raises:
      ValueError: a value is an array, or has no hash.

    Examples:
      >>> hashable_options({"solver": "exact", "pairing": 1.0})
      (('pairing', 1.0), ('solver', 'exact'))
    """
    pairs = sorted(dict(options).items())
    return tuple((name, _hashable(name, value)) for name, value in pairs)


@dataclass(frozen=True)
class Distance:
    """Describes a distance: an entry of `DISTANCES`, or a distance of your own.

    Distances are hashable.

    Attributes:
      fn: function ``fn(*arrays, **options) -> scalar`` of the arrays in ``inputs``.  A
        distance that takes masks has an option ``mask``.
      inputs: names of the arrays: ``"features"``, ``"maps"``, ``"logits"`` (each a
        pair: student, teacher), ``"labels"``, ``"key"``; every other name is looked up
        in the loss's ``teacher_data``.
      options: fixed keyword arguments of the entry, as a mapping; stored as sorted
        pairs.
      title: name of the distance in tables.
      complexity: cost of value and gradient.
      promises: properties that the tests check: "zero" for identical samples,
        "symmetric", invariant to a common "translation" or "rotation", "squared":
        ``D(a x, a y) = a^2 D(x, y)``; different "widths"; different "sizes": x and y
        may be features of different images and differ in number, so that a `Term` can
        have a bank.
      per_sample: whether the distance is a mean over images, so that it can be
        averaged over devices without gathering arrays.
      diagnose: function of the same arguments as ``fn`` that returns ``(value, {name:
        scalar})``.  With several devices, the smallest "converged" and the largest
        values of the others are reported.
      weights: default of lambda for each ``normalization`` of `distill_loss` and of the
        command.  For a normalization without a default, the caller must pass a number;
        the command uses 1 for a distance of your own that has no defaults at all, or
        1e-4 in the paper's recipe.
    """

    fn: Callable[..., jax.Array]
    _: KW_ONLY
    inputs: tuple[str, ...] = ("features",)
    options: Options = ()
    title: str = ""
    complexity: str = ""
    promises: frozenset[str] = frozenset()
    per_sample: bool = False
    diagnose: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None
    weights: Mapping[str | None, float] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        """Makes all attributes immutable."""
        object.__setattr__(self, "options", hashable_options(self.options))
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "promises", frozenset(self.promises))
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    def check_normalization(
        self, name: str, normalization: str | None, options: Mapping[str, object]
    ) -> None:
        """Rejects a normalization with which the distance says nothing.

        Args:
          name: name of the term, for the error message.
          normalization: a key of `numerics.normalization.NORMALIZATIONS`.
          options: all keyword arguments of the distance.

        Raises:
          ValueError: the normalization makes equal all that the distance compares, or
            centres what is compared with class means that are not centred.
        """
        centres = normalization in ("centered", "standardized")
        if centres and "class_means" in self.inputs:
            raise ValueError(
                f"normalization={normalization!r} centres the features of {name}, but "
                'class_means are means of raw features; take "teacher" or "unit", or '
                "None in distill_loss, where other Terms can have their own"
            )
        for fn, option, value, compared, equal in _EQUALIZED:
            if self.fn is not fn or normalization not in equal:
                continue
            default = inspect.signature(fn).parameters[option].default
            if options.get(option, default) == value:
                others = [n for n in NORMALIZATIONS if n is not None and n not in equal]
                raise ValueError(
                    f"normalization={normalization!r} makes {name} zero: with "
                    f"{option}={value!r} it compares nothing but {compared}, which are "
                    f"then equal on both sides; take {', '.join(map(repr, others))} or "
                    "another distance"
                )


# Function, option and its value; all that the function then compares; and the
# normalizations that make that equal on both sides.
_MOMENTS = "each feature's mean and variance"
_EQUALIZED = (
    (mmd, "kernel", "linear", "means", ("centered", "standardized")),
    (gaussian_kl, "covariance", "diag", _MOMENTS, ("standardized",)),
    (gaussian_wasserstein, "covariance", "diag", _MOMENTS, ("standardized",)),
    (gaussian_wasserstein, "compat", "released", _MOMENTS, ("standardized",)),
)
