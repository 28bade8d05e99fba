"""Lists published methods of several terms, with their weights, layers and projectors.

They are names for ``--distances``, next to the single distances of the catalogue.
``--weight`` multiplies all terms of a method; ``--layers``, ``--projector``,
``--positions`` and ``--normalization`` do not change it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kddm_jax import Term
from kddm_jax.experiment.machine.errors import UserError

Shapes = Mapping[str, Any]  # from models.shapes
Terms = Iterable[tuple[Term, str | None]]


@dataclass(frozen=True)
class Published:
    """Describes a method that was published as a sum of terms.

    Attributes:
      title: its name in tables.
      distances: the keys of the catalogue that it sums.
      version: changes with the terms, so that runs with older terms are others.
      terms: a function of the student's and the teacher's shapes. It returns the Terms,
        each with the kind of the projector of its student's layer, or None.
    """

    title: str
    distances: tuple[str, ...]
    version: str
    terms: Callable[[Shapes, Shapes], Terms]


def _maps(name, who, shapes):
    own = [
        layer
        for layer, maps in shapes["maps"].items()
        if layer != "stem" and len(maps.shape) == 4
    ]
    if not own:
        raise UserError(
            f"{name} compares maps [n, h, w, c], but the {who} has none; choose a "
            "distance of features, or return maps"
        )
    return own


def _middle(name, who, shapes):
    """Returns the last layer of the second stage, or one at half the depth."""
    own = _maps(name, who, shapes)
    second = [layer for layer in own if layer.startswith("stage2_")]
    return second[-1] if second else own[(len(own) - 1) // 2]


def _last(name, who, shapes):
    return _maps(name, who, shapes)[-1]


def _both(place, name, student, teacher):
    return place(name, "student", student), place(name, "teacher", teacher)


def _fitnet(student, teacher):
    """Returns 100 times the mean squared difference over all elements of the maps.

    Weight and layer are those of RepDistiller, which trains with labels from the start.
    """
    layers = _both(_middle, "fitnet", student, teacher)
    width = teacher["maps"][layers[1]].shape[-1]  # "l2" sums over channels
    term = Term("l2", weight=100 / width, layers=layers, positions="each", name="hint")
    yield term, "conv"


def _wkd(student, teacher):
    """Returns WKD-L and WKD-F, weighted as for ResNet34 to ResNet18 on ImageNet.

    Four cells along each side, or fewer if the maps are smaller.
    """
    layers = _both(_last, "wkd", student, teacher)
    pair = student["maps"][layers[0]], teacher["maps"][layers[1]]
    grid = min(4, *(side for maps in pair for side in maps.shape[1:3]))
    yield Term("wkd_logits", options={"gamma": 10.0}), None
    yield Term("wkd_features", layers=layers, options={"grid": grid}), "conv3"


def _kdpp(student, teacher):
    """Returns KD and ND, weighted as for ResNet34 to ResNet18 on ImageNet."""
    yield Term("kd", weight=2.5, options={"temperature": 1.0}), None
    same = student["features"].shape[-1] == teacher["features"].shape[-1]
    layers = ("features", "features")
    yield Term("kdpp", layers=layers), None if same else "dense"


PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "fitnet": Published("FitNet", ("l2",), "1", _fitnet),
        "wkd": Published("WKD", ("wkd_logits", "wkd_features"), "1", _wkd),
        "kd++": Published("KD++", ("kd", "kdpp"), "1", _kdpp),
    }
)
