"""Computes the teacher's arrays that distances need, before a student trains.

A feature-only student learns from the teacher's layers of highest quality. (The
released code of arXiv 2511.14981 has lists of layers; here they are chosen for each
teacher.) WKD-L moves probability between classes at a cost that is computed from the
teacher's features.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kddm_jax import data
from kddm_jax.experiment.machine import processes, records
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import FEATURE_ONLY
from kddm_jax.experiment.training import methods, runs
from kddm_jax.experiment.training.outputs import features_of
from kddm_jax.experiment.training.problems import Problem
from kddm_jax.experiment.training.train import Teacher
from kddm_jax.families.wkd import class_cost_cka
from kddm_jax.quality import KnowledgeQuality, knowledge_quality, select_layers

COST_IMAGES = 50  # images of each class for the cost between classes
Draw = Callable[[Mapping[str, Any], Path], None]


def prepare(problem: Problem, teacher: Teacher, draw: Draw) -> dict | None:
    """Computes the arrays that the methods of a study take from the teacher.

    Args:
      problem: the data, the devices and the settings; the results are stored in it.
      teacher: the trained teacher.
      draw: function that draws the quality of the teacher's layers into a file.

    Returns:
      The record of the layers' quality, as in ``quality.json``; None if no method needs
      it.
    """
    settings, quality = problem.settings, None
    if FEATURE_ONLY in settings.method.distances and not settings.method.layers:
        quality = choose(problem, teacher, draw)
    if any(methods.needs_class_cost(name) for name in settings.method.distances):
        problem.class_cost = processes.first(lambda: class_cost(problem, teacher))
    return quality


def rate(problem: Problem, teacher: Teacher) -> dict[str, KnowledgeQuality]:
    """Measures the quality of every layer of the teacher, from first to last."""
    labels = problem.dataset.train_labels
    count = min(problem.settings.method.quality_images, len(problem.parts.teacher))
    seen = problem.parts.teacher
    chosen = np.sort(seen[data.balanced_subset(labels[seen], count, seed=0)])
    images = problem.dataset.train_images
    return {
        layer: knowledge_quality(
            features_of(problem, teacher, layer, images, chosen),
            labels[chosen],
            n_train=len(seen),
        )
        for layer in methods.layers_of(problem.shapes[1])
    }


def _rated(problem, teacher, draw) -> dict[str, Any]:
    """Reads the record of the layers' quality, or makes it if there is none."""
    settings, path = problem.settings, Path(problem.out) / "quality.json"
    asked = {
        "teacher": teacher.digest,
        "images": min(settings.method.quality_images, len(problem.parts.teacher)),
        "student": settings.networks.student_model,
    }
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # missing or damaged, so it is made again
        found = None
    record: dict[str, Any] = found if isinstance(found, dict) else {}
    if {name: record.get(name) for name in asked} != asked:
        quality = rate(problem, teacher)
        own = methods.student_layers(settings, problem.shapes[0])
        maps = {layer: q for layer, q in quality.items() if layer != "features"}
        best = select_layers(maps, len(own))
        record = {
            **asked,
            "layers": {layer: dict(q._asdict()) for layer, q in quality.items()},
            "pairs": [f"{a}:{b}" for a, b in zip(own, best, strict=True)],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(record, path.with_suffix(".png"))
        records.write_json(path, record)  # last: if it is missing, both are made again
    return record


def choose(problem: Problem, teacher: Teacher, draw: Draw) -> dict[str, Any]:
    """Rates the teacher's layers, writes and draws their quality, and sets the pairs.

    The record is reused for the same teacher and images, so that a resumed run always
    learns from the same layers.
    """
    record = processes.first(lambda: _rated(problem, teacher, draw))
    problem.chosen_layers = tuple(record["pairs"])
    method = runs.method_of(problem, FEATURE_ONLY)
    methods.check(FEATURE_ONLY, method, *problem.shapes, problem.compared_images)
    return record


def class_cost(problem: Problem, teacher: Teacher) -> np.ndarray:
    """Computes the cost of moving probability between classes, ``[k, k]``.

    The samples are all positions of the teacher's last map, as in WKD's released code
    for CIFAR, for the same number of images of each class.
    """
    labels, seen = problem.dataset.train_labels, problem.parts.teacher
    classes = problem.num_classes
    fewest = np.bincount(labels[seen], minlength=classes).min()
    each = min(COST_IMAGES, fewest)
    if not each:
        raise UserError(
            "wkd_logits: the teacher has seen no image of some class, so that it has "
            "no price; raise --train-images"
        )
    by_class = [seen[labels[seen] == c][:each] for c in range(classes)]
    maps = list(problem.shapes[1]["maps"].items())
    name, shape = maps[-1] if maps else ("features", problem.shapes[1]["features"])
    images = problem.dataset.train_images
    features = features_of(problem, teacher, name, images, np.concatenate(by_class))
    rows = features.reshape(classes, -1, shape.shape[-1])
    return np.asarray(class_cost_cka(jnp.asarray(rows)))
