"""Looks up the distances of a command, and lambda of each.

A distance is a key of the catalogue or a user's own, as ``module:NAME``. Its lambda is
given by the command line, or is a default.
"""

from kddm_jax import DISTANCES, Distance
from kddm_jax.distances import get_distance
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.published import PUBLISHED
from kddm_jax.experiment.settings import (
    FEATURE_ONLY,
    Settings,
    by_quality,
    parts_of,
)
from kddm_jax.experiment.training import models

RELEASED_WEIGHT = 1e-4  # of every distance in the released code of KD2M
UNIT_WEIGHT = 10.0  # of feature_only, whose distance of unit features is at most 4


def find(name: str) -> Distance:
    """Finds a distance in the catalogue or in a module of the user.

    Args:
      name: a key of the catalogue, or ``module:NAME`` of a `Distance` or a function of
        ``(x, y)``.

    Returns:
      The distance.

    Raises:
      UserError: the distance does not exist.
    """
    if name in DISTANCES:
        return DISTANCES[name]
    module, _, attribute = name.partition(":")
    try:
        return get_distance(getattr(models.load_module(module), attribute))
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"distance {name!r}: {error}; the module is looked for in the working "
            "folder and among the installed packages"
        ) from error


def weight_of(settings: Settings, distance: str) -> float:
    """Returns lambda of a distance from --weights, --weight, or its default.

    It is 1 for a sum of distances, in which each has its own lambda.

    Args:
      settings: the settings of the command.
      distance: name of a distance or of a method.

    Raises:
      UserError: the distance has no default for the normalization, or does not exist.
    """
    method, normalization = settings.method, settings.method.normalization
    if len(parts_of(distance)) > 1:
        return 1.0
    if distance in (method.weights or {}):
        return (method.weights or {})[distance]
    if method.weight is not None:
        return method.weight
    if distance in PUBLISHED:
        return 1.0
    if distance == FEATURE_ONLY:
        unit = normalization == "unit" and not by_quality(settings)
        return UNIT_WEIGHT if unit else 1.0
    defaults = find(distance).weights
    plain = distance not in DISTANCES and not defaults  # such as a function
    of_paper = settings.run.recipe == "paper" and normalization is None
    if of_paper and (plain or distance in DISTANCES):
        return RELEASED_WEIGHT
    if plain:
        return 1.0
    if normalization not in defaults:
        fixed = settings.networks.teacher_statistics is not None  # by the file
        known = (
            f", or --normalization {name} (λ = {weight:g})"
            for name, weight in defaults.items()
            if not fixed
        )
        raise UserError(
            f"{distance} has no default weight with --normalization {normalization}; "
            f"pass --weights {distance} NUMBER{''.join(known)}"
        )
    return defaults[normalization]
