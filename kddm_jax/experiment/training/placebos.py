"""Replaces the teacher's outputs by placebos, which are controls for what is learned.

A placebo keeps some properties of the teacher's outputs on the fixed views and removes
the rest. If a student learns as much from it, the removed properties do not matter.

  pairs     Each image has the outputs of another image of its class. The distribution
            in each class stays; the outputs of the image itself are lost.
  labels    Each image has the outputs of another image of any class. The distribution
            over all images stays; the relation to labels is lost, too.
  gaussian  Each view has features drawn from the Gaussian with the mean and covariance
            of its class. Everything but these moments is lost.

The placebo is drawn once for a data set and is the same for all seeds. Arrays that are
computed from the teacher before (WKD-L's cost between classes, the layers of
feature_only) stay those of the teacher.
"""

from typing import Any

import numpy as np

from kddm_jax import adapters
from kddm_jax.distances import get_distance
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import Settings
from kddm_jax.experiment.training import methods
from kddm_jax.terms import as_terms

SEED = 0


def check(settings: Settings, name: str, method: methods.Method | None) -> None:
    """Raises if a method compares more than the features that a placebo replaces.

    Args:
      settings: the settings of the run.
      name: name of the method.
      method: the method; None for a method that chooses among the teacher's maps.

    Raises:
      UserError: the placebo is Gaussian and the method compares predictions or maps.
    """
    if settings.method.placebo != "gaussian":
        return
    terms = as_terms(method.distance) if method else ()
    compared = {kind for t in terms for kind in get_distance(t.distance).inputs}
    if method is None or methods.teacher_layers(method):
        compared.add("maps")
    if refused := sorted({"logits", "maps"} & compared):
        raise UserError(
            f"--placebo gaussian draws pooled features only, but {name} compares "
            f"{' and '.join(refused)}; leave {name} out, or use --placebo pairs or "
            "labels"
        )


def partners(kind: str, labels: np.ndarray) -> np.ndarray:
    """Draws another image for each image: one of its class, or one of any class.

    Args:
      kind: "pairs" or "labels".
      labels: class of each image, int ``[n]``.

    Returns:
      Indices of the other images, int ``[n]``, a permutation without fixed points.

    Raises:
      UserError: there is no other image.
    """
    rng, found = np.random.default_rng(SEED), np.arange(len(labels))
    groups = labels if kind == "pairs" else np.zeros_like(labels)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        if len(members) < 2:
            of = f"class {group}" if kind == "pairs" else "the data set"
            raise UserError(
                f"--placebo {kind}: students see a single image of {of}, so that it "
                "has no other to be exchanged with; raise --student-images"
            )
        found[members] = np.roll(members, 1)  # one random cycle
    return found


def gaussian(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draws Gaussian features with the mean and covariance of each class.

    Args:
      features: the teacher's features, ``[n, d]``.
      labels: class of each row, int ``[n]``.

    Returns:
      One draw for each row, float32 ``[n, d]``.
    """
    drawn = np.empty(features.shape, np.float32)
    for label in np.unique(labels):
        own = features[labels == label].astype(np.float64)
        mean = own.mean(0)
        values, vectors = np.linalg.eigh((own - mean).T @ (own - mean) / len(own))
        # The symmetric root is unique, so that other hosts draw the same features.
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        noise = np.random.default_rng((SEED, int(label))).standard_normal(own.shape)
        drawn[labels == label] = mean + noise @ root
    return drawn


def replace(kind: str, outputs: adapters.Outputs, labels: np.ndarray, views: int):
    """Replaces the teacher's outputs on all views.

    View v of an image has the outputs of view v of the other image.

    Args:
      kind: "pairs", "labels" or "gaussian".
      outputs: the teacher's outputs, arrays ``[n views, ...]`` on the host; view v of
        image i is at ``i views + v``.
      labels: class of each image, int ``[n]``.
      views: number of views of each image.

    Returns:
      The placebo's outputs; those of Gaussian features have no logits and maps.

    Raises:
      UserError: an image has no other to be exchanged with.
    """
    features: Any = outputs.features
    if kind == "gaussian":
        nothing: Any = None
        drawn: Any = gaussian(features, np.repeat(labels, views))
        return adapters.Outputs(nothing, drawn, {})
    others = partners(kind, labels)[:, None] * views + np.arange(views)
    order: Any = others.ravel()  # [n views]
    maps = {name: array[order] for name, array in outputs.maps.items()}
    return adapters.Outputs(outputs.logits[order], features[order], maps)
