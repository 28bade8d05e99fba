"""Computes the teacher's arrays that distances need, before a student trains.

With ``--layers released`` a feature-only student learns from the teacher's last layer
and its others of highest quality. (The released code of arXiv 2511.14981 has lists of
layers; here they are chosen for each teacher.) WKD-L moves probability between classes
at a cost that is computed from the teacher's features, and KD++ compares features with
the mean of their class.
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
from kddm_jax.experiment.settings import FEATURE_ONLY, by_quality
from kddm_jax.experiment.training import methods, runs
from kddm_jax.experiment.training.outputs import features_of, outputs_of
from kddm_jax.experiment.training.problems import Problem
from kddm_jax.experiment.training.train import Teacher
from kddm_jax.families.wkd import class_cost_cka
from kddm_jax.probe import probe_accuracy
from kddm_jax.quality import knowledge_quality, layer_similarity, select_layers

COST_IMAGES = 50  # images of each class for the cost between classes
SIMILARITY_IMAGES = 1000  # images on which copies among the layers are found
MOST_SIMILAR = 0.98  # linear CKA of two layers that are not copies
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
    if FEATURE_ONLY in settings.method.distances and by_quality(settings):
        quality = choose(problem, teacher, draw)
    of_all = map(methods.needed_arrays, settings.method.distances)
    for name in sorted({array for arrays in of_all for array in arrays}):
        compute = lambda make=MAKERS[name]: make(problem, teacher)
        problem.of_teacher[name] = processes.first(compute)
    return quality


def _quality_images(problem):
    """Returns the indices of the images on which the layers are measured."""
    labels, seen = problem.dataset.train_labels, problem.parts.teacher
    count = min(problem.settings.method.quality_images, len(seen))
    return np.sort(seen[data.balanced_subset(labels[seen], count, seed=0)])


def rate(problem: Problem, teacher: Teacher) -> dict[str, dict[str, float]]:
    """Measures every layer of the teacher, from first to last.

    Args:
      problem: the data, the devices and the settings.
      teacher: the trained teacher.

    Returns:
      For each layer the letters of `KnowledgeQuality`, and ``probe``, the accuracy of a
      linear probe of the pooled layer on held-out quality images, in percent.
    """
    chosen, found = _quality_images(problem), {}
    images, labels = problem.dataset.train_images, problem.dataset.train_labels[chosen]
    for layer, shape in methods.layers_of(problem.shapes[1]).items():
        features = features_of(problem, teacher, layer, images, chosen)
        seen = len(problem.parts.teacher)
        quality = knowledge_quality(features, labels, n_train=seen)
        channels = shape.shape[-1]
        pooled = features.reshape(len(features), -1, channels).mean(1)
        probe = 100 * probe_accuracy(pooled, labels)
        found[layer] = {**quality._asdict(), "probe": probe}
    return found


def _fit(problem, teacher):
    """Returns the teacher's accuracy on the quality images, in percent."""
    chosen, dataset = _quality_images(problem), problem.dataset
    images = dataset.train_images[chosen]
    logits = outputs_of(problem, teacher.model, teacher.variables, images).logits
    return 100 * float(np.mean(logits.argmax(1) == dataset.train_labels[chosen]))


def _select(problem, teacher, layers):
    """Chooses the last map and the best others, no two of them copies."""
    own = methods.student_layers(problem.settings, problem.shapes[0])
    quality = {name: layers[name]["Q"] for name in problem.shapes[1]["maps"]}
    chosen, images = _quality_images(problem), problem.dataset.train_images
    chosen = chosen[:: -(-len(chosen) // SIMILARITY_IMAGES)]
    similarity = layer_similarity(
        features_of(problem, teacher, name, images, chosen) for name in quality
    )
    best = select_layers(
        *(quality, len(own)),
        last=True,
        similarity=similarity,
        most_similar=MOST_SIMILAR,
    )
    return [f"{a}:{b}" for a, b in zip(own[-len(best) :], best, strict=True)]


def _rated(problem, teacher, draw) -> dict[str, Any]:
    """Reads the record of the layers' quality, or makes it if there is none."""
    settings, path = problem.settings, Path(problem.out) / "quality.json"
    asked = {
        "teacher": teacher.digest,
        "images": min(settings.method.quality_images, len(problem.parts.teacher)),
        "student": settings.networks.student_model,
        "most_similar": MOST_SIMILAR,  # records of earlier versions have none
    }
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # missing or damaged, so it is made again
        found = None
    record: dict[str, Any] = found if isinstance(found, dict) else {}
    if {name: record.get(name) for name in asked} != asked:
        layers = rate(problem, teacher)
        record = {
            **asked,
            "teacher_accuracy": _fit(problem, teacher),
            "layers": layers,
            "pairs": _select(problem, teacher, layers),
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


def class_means(problem: Problem, teacher: Teacher) -> np.ndarray:
    """Computes the mean of the teacher's pooled features in each class, ``[k, d]``.

    The images are all training images of the teacher, without augmentation.
    """
    chosen, classes = problem.parts.teacher, problem.num_classes
    images, labels = problem.dataset.train_images, problem.dataset.train_labels[chosen]
    features = features_of(problem, teacher, "features", images, chosen)
    counts = np.bincount(labels, minlength=classes)
    if not counts.min():
        raise UserError(
            "kdpp: the teacher has seen no image of some class, which has no mean; "
            "raise --train-images"
        )
    sums = np.zeros((classes, features.shape[1]))
    np.add.at(sums, labels, features)
    return sums / counts[:, None]


MAKERS = {"class_cost": class_cost, "class_means": class_means}
