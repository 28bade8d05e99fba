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
      terms: a function of the student's and the teacher's shapes. It returns the Terms,
        each with the kind of the projector of its student's layer, or None.
    """

    title: str
    distances: tuple[str, ...]
    terms: Callable[[Shapes, Shapes], Terms]


def _maps(title, who, shapes):
    own = [layer for layer in shapes["maps"] if layer != "stem"]
    if not own:
        raise UserError(
            f"{title} compares maps, but the {who} has none; choose a distance of "
            "features, or return maps"
        )
    return own


def _middle(title, who, shapes):
    """Returns the last layer of the second stage, or one at half the depth."""
    own = _maps(title, who, shapes)
    second = [layer for layer in own if layer.startswith("stage2_")]
    return second[-1] if second else own[(len(own) - 1) // 2]


def _last(title, who, shapes):
    return _maps(title, who, shapes)[-1]


def _both(place, title, student, teacher):
    return place(title, "student", student), place(title, "teacher", teacher)


def _fitnet(student, teacher):
    """100 times the mean squared difference of maps, of all elements.

    Weight and layer are those of RepDistiller, which trains with labels from the start.
    """
    layers = _both(_middle, "fitnet", student, teacher)
    width = teacher["maps"][layers[1]].shape[-1]  # "l2" sums over channels
    term = Term("l2", weight=100 / width, layers=layers, positions="each", name="hint")
    yield term, "conv"


def _wkd(student, teacher):
    """The released settings for ResNet34 to ResNet18 on ImageNet."""
    layers = _both(_last, "wkd", student, teacher)
    yield Term("wkd_logits", options={"gamma": 10.0}), None
    yield Term("wkd_features", layers=layers), "conv3"


def _kdpp(student, teacher):
    """The released weights for ResNet34 to ResNet18 on ImageNet."""
    yield Term("kd", weight=2.5), None
    same = student["features"].shape[-1] == teacher["features"].shape[-1]
    layers = ("features", "features")
    yield Term("kdpp", layers=layers), None if same else "dense"


PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "fitnet": Published("FitNet", ("l2",), _fitnet),
        "wkd": Published("WKD", ("wkd_logits", "wkd_features"), _wkd),
        "kd++": Published("KD++", ("kd", "kdpp"), _kdpp),
    }
)
