"""Replaces the teacher's outputs by placebos, which are controls for what is learned.

A placebo keeps some properties of the teacher's outputs on the fixed views and removes
the rest. If a student learns as much from it, the removed properties do not matter.

  pairs     Each image has the outputs of another image of its class. The distribution
            in each class stays; the outputs of the image itself are lost.
  labels    Each image has the outputs of another image of any class. The distribution
            over all images stays; the relation to labels is lost, too.
  views     Each view has the outputs of another view of its image. Only the relation to
            the augmentation of the view is lost.
  gaussian  Each view has features drawn from the Gaussian with the mean and covariance
            of its class. Everything but these moments is lost.

Of pairs and labels there are broken halves and quarters, too: only a share of each
class is exchanged, and the other images keep their outputs.

The placebo is drawn once for a data set and is the same for all seeds. Arrays that are
computed from the teacher before (WKD-L's cost between classes, KD++'s class means, the
layers of feature_only) stay those of the teacher.
"""

from typing import Any

import numpy as np

from kddm_jax import adapters
from kddm_jax.data.sampling import ranks
from kddm_jax.distances import get_distance
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import Settings
from kddm_jax.experiment.training import methods
from kddm_jax.terms import as_terms

SEED = 0
OF_OTHERS = ("pairs", "labels")  # placebos that exchange images


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
    if any(t.layers and t.layers[1] == "logits" for t in terms):
        compared.add("logits")
    if refused := sorted({"logits", "maps"} & compared):
        raise UserError(
            f"--placebo gaussian draws pooled features only, but {name} compares "
            f"{' and '.join(refused)}; leave {name} out, or use --placebo pairs or "
            "labels"
        )


def _exchanged(members, labels, share):
    """Returns the first of the members of each class, a share of the class."""
    own = labels[members]
    _, class_of, counts = np.unique(own, return_inverse=True, return_counts=True)
    wanted = np.floor(share * counts + 0.5)  # to the nearest integer, halves up
    return members[ranks(own, np.arange(len(own))) < wanted[class_of]]


def partners(kind: str, labels: np.ndarray, share: float = 1.0) -> np.ndarray:
    """Draws another image for each image: one of its class, or one of any class.

    With a ``share`` less than 1, only that share of each class, rounded to the nearest
    number of images, is exchanged. The images of a smaller share are among those of a
    larger one.

    Args:
      kind: "pairs" or "labels".
      labels: class of each image, int ``[n]``.
      share: share of the images of each class that have another one, in (0, 1].

    Returns:
      Indices of the other images, int ``[n]``, a permutation. Its fixed points are the
      images that keep their own outputs; there are none with a share of 1.

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
        count, members = len(members), _exchanged(members, labels, share)
        if len(members) < 2:
            of = f" of class {group}" if kind == "pairs" else ""
            raise UserError(
                f"--placebo-share {share} exchanges {len(members)} of {count} images"
                f"{of}, which needs at least two; raise it, or --student-images"
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


def _sources(kind, labels, views, share):
    """Returns the view whose outputs each view has, ``[n views]``."""
    own, view = np.arange(len(labels)), np.arange(views)
    if kind == "views":
        return (own[:, None] * views + np.roll(view, -1)).ravel()
    return (partners(kind, labels, share)[:, None] * views + view).ravel()


def replace(
    kind: str,
    outputs: adapters.Outputs,
    labels: np.ndarray,
    views: int,
    share: float = 1.0,
) -> adapters.Outputs:
    """Replaces the teacher's outputs on all views.

    View v of an image has the outputs of view v of the other image, or with "views"
    those of its own view v + 1, the last those of the first.

    Args:
      kind: "pairs", "labels", "views" or "gaussian".
      outputs: the teacher's outputs, arrays ``[n views, ...]`` on the host; view v of
        image i is at ``i views + v``.
      labels: class of each image, int ``[n]``.
      views: number of views of each image.
      share: share of the images that are exchanged, as in `partners`.

    Returns:
      The placebo's outputs. Gaussian features have no maps. Their logits are the
      teacher's, and are used only to predict the classes of unlabelled images.

    Raises:
      UserError: an image has no other to be exchanged with.
    """
    features: Any = outputs.features
    if kind == "gaussian":
        drawn: Any = gaussian(features, np.repeat(labels, views))
        return adapters.Outputs(outputs.logits, drawn, {})
    order: Any = _sources(kind, labels, views, share)
    maps = {name: array[order] for name, array in outputs.maps.items()}
    return adapters.Outputs(outputs.logits[order], features[order], maps)
