"""Maps the features of teacher and students to the plane, for the page.

The features are pooled features of at most 1,000 evaluation images, from the last
checkpoint of the first seed of each distance. If a distance compares coordinates, its
student is shown on the teacher's axes, with the teacher behind it. Other students may
be rotated and have axes of their own. A repeated command reads the points from
``embedding.json``.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from kddm_jax import checkpoint, data
from kddm_jax.experiment.machine import records
from kddm_jax.experiment.published import PUBLISHED
from kddm_jax.experiment.settings import ALONE, FEATURE_ONLY, Settings
from kddm_jax.experiment.training import methods, models, runs
from kddm_jax.experiment.training.outputs import features_of
from kddm_jax.experiment.training.problems import Problem
from kddm_jax.experiment.training.teacher import Teacher, variables_of

IMAGES = 1000  # largest number of images
SEED = 42  # as in the released code
FEWEST = 5  # smallest number of images


def ties_axes(name: str, settings: Settings) -> bool:
    """Returns whether a method compares pooled features coordinate by coordinate.

    Args:
      name: name of the run.
      settings: the settings of the command.

    Returns:
      False for students alone, for distances of maps or predictions, for distances that
      take features of different widths, and if other layers or projected ones are
      compared. True for a sum with a distance that does.
    """
    if (
        name in (*ALONE, FEATURE_ONLY, *PUBLISHED)
        or settings.method.layers
        or settings.method.projector
    ):
        return False
    rows = methods.entries(name)
    return any("features" in r.inputs and "widths" not in r.promises for r in rows)


def tsne(points: np.ndarray) -> np.ndarray:
    """Maps points ``[n, d]`` to the plane by t-SNE, with a fixed seed."""
    perplexity = min(30.0, (len(points) - 1) / 3)
    made = TSNE(2, perplexity=perplexity, init="pca", random_state=SEED)
    return made.fit_transform(points)


def project(
    method: str, features: np.ndarray, teacher: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Maps features to the plane.

    Args:
      method: name of the method, "pca" or "tsne".
      features: features, ``[n, d]``.
      teacher: None, or the teacher's features ``[m, d]`` to show on the same axes.  PCA
        then uses the teacher's axes, and t-SNE maps both together.

    Returns:
      Points of the features ``[n, 2]``, and of the teacher ``[m, 2]`` or None.
    """
    both = features if teacher is None else np.concatenate([features, teacher])
    if method == "pca":
        axes = PCA(2, svd_solver="full").fit(features if teacher is None else teacher)
        points = axes.transform(both)
    else:
        points = tsne(both)
    n = len(features)
    return points[:n], None if teacher is None else points[n:]


def _as_json(points):
    """Rounds points to four digits."""
    return (
        points if points is None else [[float(f"{v:.4g}") for v in p] for p in points]
    )


class Network(NamedTuple):
    """Contains a network in the form that `features_of` takes."""

    model: models.Network
    variables: object


def _first_seeds(problem, teacher, results) -> Iterator[tuple[runs.Run, Mapping]]:
    """Yields the first run of each name, and its result."""
    seen = set()
    planned = runs.student_runs(problem, teacher.digest)
    for run, result in zip(planned, results, strict=True):
        if run.name not in seen:
            seen.add(run.name)
            yield run, result


def _networks(problem, teacher, results) -> Iterator[tuple[str, str, object]]:
    """Yields name, title and network of the teacher and of each first seed."""
    if teacher.model is not None:
        yield "teacher", "teacher", teacher
    model = problem.student
    for run, _ in _first_seeds(problem, teacher, results):
        try:
            path = checkpoint.find(run.folder(problem.out))
            if path is None:
                raise checkpoint.CheckpointError("its checkpoints are gone")
            network = Network(model, variables_of(problem, path, model))
        except checkpoint.CheckpointError as error:
            warnings.warn(f"no picture of {run.name}: {error}", stacklevel=2)
            continue
        yield run.name, run.title, network


def _compute(problem, teacher, results):
    """Computes the panels and describes them."""
    settings, parts = problem.settings, problem.parts
    count = min(IMAGES, len(parts.eval_labels))
    chosen = np.sort(data.balanced_subset(parts.eval_labels, count, seed=0))
    panels: list[dict[str, Any]] = []
    followed = np.zeros((0, 0))
    for name, title, network in _networks(problem, teacher, results):
        features = features_of(problem, network, "features", parts.eval_images, chosen)
        if name == "teacher":
            followed = features
        if min(features.shape) < 2 or len(features) < FEWEST:
            continue
        tied = ties_axes(name, settings) and features.shape == followed.shape
        if not np.isfinite(features).all():
            warnings.warn(f"no picture of {name}: its features overflow", stacklevel=2)
            continue
        points, behind = project(
            settings.run.embedding, features, followed if tied else None
        )
        panels.append(
            {
                "name": name,
                "title": title,
                "points": _as_json(points),
                "behind": _as_json(behind),
            }
        )
    return {
        "classes": list(problem.dataset.class_names),
        "labels": parts.eval_labels[chosen].tolist(),
        "panels": panels,
    }


def find(
    problem: Problem, teacher: Teacher, results: Sequence[Mapping]
) -> dict[str, Any] | None:
    """Reads the features in the plane from the folder, or computes and saves them.

    Args:
      problem: the data, the devices and the settings.
      teacher: the teacher.
      results: results of the students, in the order of `runs.student_runs`.

    Returns:
      A dictionary with ``classes`` and ``labels`` of the images, and ``panels``, each
      with ``name``, ``title``, ``points`` and ``behind`` (the teacher's points if the
      panel has the teacher's axes); None if the settings have no embedding.
    """
    method = problem.settings.run.embedding
    if method == "none":
        return None
    digest = lambda value: hashlib.sha256(
        json.dumps(value, sort_keys=True).encode()
    ).hexdigest()[:16]
    firsts = _first_seeds(problem, teacher, results)
    made_of = {
        "seed": SEED,
        "method": method,
        "teacher": teacher.digest,
        "runs": {run.name: digest(result) for run, result in firsts},
    }
    path = Path(problem.out) / "embedding.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # missing or damaged, so it is made again
        found = None
    if not isinstance(found, dict) or found.get("made_of") != made_of:
        found = {"made_of": made_of, **_compute(problem, teacher, results)}
        records.write_json(path, found)
    return found
