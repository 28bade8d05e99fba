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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from kddm_jax import checkpoint, data
from kddm_jax.experiment.machine import records
from kddm_jax.experiment.published import PUBLISHED
from kddm_jax.experiment.settings import ALONE, FEATURE_ONLY, Settings
from kddm_jax.experiment.training import methods, runs
from kddm_jax.experiment.training.outputs import Network, features_of
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


def chosen_images(problem: Problem) -> np.ndarray:
    """Returns the indices of the evaluation images whose features are shown."""
    labels = problem.parts.eval_labels
    count = min(IMAGES, len(labels))
    return np.sort(data.balanced_subset(labels, count, seed=0))


def panels_of(
    problem: Problem, networks: Iterable[tuple[str, str, np.ndarray]]
) -> dict[str, Any]:
    """Maps features of some networks to the plane, with a panel for each.

    Args:
      problem: the data, the devices and the settings.
      networks: name of the run, title, and features ``[n, d]`` of the chosen images;
        the teacher, if there is one, comes first. A network whose features are not
        finite or too few has no panel.

    Returns:
      A dictionary with ``classes``, ``labels`` and ``panels``, as in `find`.
    """
    settings, panels = problem.settings, []
    followed = np.zeros((0, 0))
    for name, title, features in networks:
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
        "labels": problem.parts.eval_labels[chosen_images(problem)].tolist(),
        "panels": panels,
    }


def _compute(problem, teacher, results):
    """Computes the panels of all networks of a study."""
    images, chosen = problem.parts.eval_images, chosen_images(problem)
    return panels_of(
        problem,
        (
            (name, title, features_of(problem, network, "features", images, chosen))
            for name, title, network in _networks(problem, teacher, results)
        ),
    )


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
