"""What is made of the teacher's layers before a student trains.

A feature-only student follows those of highest quality (the released code of arXiv
2511.14981 has lists of layers; here they are chosen by the teacher at hand), and WKD-L
moves probability between classes at a price that the teacher's last layer sets.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import methods
import numpy as np
import processes
import records
import report
import runs
from flax import linen as nn
from problems import Problem
from rich.console import Console
from settings import FEATURE_ONLY, UserError

from kddm_jax import data, resnet
from kddm_jax.logits import class_cost_cka
from kddm_jax.quality import KnowledgeQuality, knowledge_quality, select_layers

WIDEST = 262_144  # features of a sample; larger maps are max-pooled, as in the paper
BATCH = 250
COST_IMAGES = 50  # of each class, for the price between classes


def _pool(maps, shape):
    """Halves the sides until a sample has no more than the widest features."""
    while len(shape) == 3 and np.prod(shape) > WIDEST and min(shape[:2]) > 1:
        maps = -jax.lax.reduce_window(
            -maps, np.inf, jax.lax.min, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
        shape = maps.shape[1:]
    return maps


def program(problem: Problem, model: nn.Module, pick: Callable) -> Callable:
    """Compiles what ``pick`` takes of a network's outputs, in evaluation."""
    apply = resnet.linen_apply(model)

    def one(variables, images):
        normal = lambda image: problem.normalize(None, image)
        return pick(apply(variables, jax.vmap(normal)(images), train=False)[0])

    return jax.jit(one)


def compute(program: Callable, variables, images: np.ndarray):
    """What a program gives for any number of images, batch by batch; on the host."""
    variables, parts = jax.device_get(variables), []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        short = BATCH - len(batch)
        batch = np.pad(batch, ((0, short), (0, 0), (0, 0), (0, 0)))
        found = jax.device_get(program(variables, batch))
        parts.append(jax.tree.map(lambda a, short=short: a[: BATCH - short], found))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def features_of(problem: Problem, network, layer: str, images, chosen):
    """A layer's features of the chosen images (uint8), ``[n, d]``, on the host."""

    def pick(outputs):
        found = {"features": outputs.features, **outputs.maps}[layer]
        pooled = _pool(found.astype(jnp.float32), found.shape[1:])
        return pooled.reshape(len(pooled), -1)

    key = ("features", network.model, layer)
    if key not in problem.programs:
        problem.programs[key] = program(problem, network.model, pick)
    return compute(problem.programs[key], network.variables, images[chosen])


def rate(problem: Problem, teacher) -> dict[str, KnowledgeQuality]:
    """The quality of every layer of the teacher, from the first to the last."""
    labels = problem.dataset.train_labels
    count = min(problem.settings.quality_images, len(problem.parts.teacher))
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


def _rated(problem, teacher) -> dict[str, object]:
    """Layers and pairs, as they are written or, of another teacher, made anew."""
    settings, path = problem.settings, Path(problem.out) / "quality.json"
    asked = {
        "teacher": teacher.digest,
        "images": min(settings.quality_images, len(problem.parts.teacher)),
        "student": settings.student_model,
    }
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or damaged: it can be made again
        record = None
    known = isinstance(record, dict)
    if not known or {name: record.get(name) for name in asked} != asked:
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
        from curves import of_layers  # with Matplotlib, for which no command need wait

        of_layers(record, path.with_suffix(".png"))
        records.write_json(path, record)  # last: without it both are made again
    return record


def choose(problem: Problem, teacher, console: Console) -> None:
    """Rates the teacher's layers, prints, writes and draws it, and sets the pairs.

    What is written holds for the same teacher and images: a run that continues never
    follows other layers.
    """
    record = processes.first(lambda: _rated(problem, teacher))
    problem.chosen_layers = tuple(record["pairs"])
    report.show_quality(record, console)
    method = runs.method_of(problem, FEATURE_ONLY)
    methods.check(FEATURE_ONLY, method, *problem.shapes, problem.compared_images)


def prepare(problem: Problem, teacher, console: Console) -> None:
    """Makes of the teacher what the methods ask for, before a student trains."""
    settings = problem.settings
    if FEATURE_ONLY in settings.distances and not settings.layers:
        choose(problem, teacher, console)
    if any(methods.needs_class_cost(name) for name in settings.distances):
        problem.class_cost = processes.first(lambda: class_cost(problem, teacher))


def class_cost(problem: Problem, teacher) -> np.ndarray:
    """The price of moving probability from class to class, ``[k, k]``.

    Rows are every position of the teacher's last map, as WKD's released code has it on
    CIFAR, of as many images of each class.
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
