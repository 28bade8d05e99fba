"""Implements ``kddm outputs``, which stores a teacher's outputs or their statistics.

    kddm outputs -- --dataset cifar10 --teacher RUN --views 4 --out runs/outputs
    kddm outputs --statistics gaussian -- --dataset cifar10 --teacher RUN \
        --normalization unit --out runs/outputs

Settings of ``kddm distill`` follow after ``--``. The command trains the teacher, or
reads the one of ``--teacher``, and writes a file from which students are trained
without the teacher. ``kddm distill --teacher-outputs FILE`` reads outputs on fixed
views of the students' images. ``kddm distill --teacher-statistics FILE`` reads
statistics of the features of the teacher's training images (with ``--views``, of fixed
views of them).
"""

import argparse
import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from kddm_jax.experiment import study
from kddm_jax.experiment.checks import layer_pairs
from kddm_jax.experiment.machine import processes
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.machine.terminal import answer_errors, console
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.settings import Settings, change
from kddm_jax.experiment.training import methods, models, statistics, stored, views
from kddm_jax.experiment.training.outputs import outputs_of
from kddm_jax.experiment.training.problems import Problem
from kddm_jax.experiment.training.train import Teacher
from kddm_jax.numerics.normalization import normalize

SEED = 0
COUNT = 10  # default number of centroids or images of each class


def _seen(problem):
    """Returns the teacher's training images, or fixed views of them, and labels."""
    dataset, indices = problem.dataset, problem.parts.teacher
    if problem.settings.data.views is None:
        return dataset.train_images[indices], dataset.train_labels[indices]
    drawn = views.Views(
        problem.settings, dataset.train_images, dataset.train_labels, indices
    )
    return drawn.pair


def _centroids(rows, count):
    from sklearn.cluster import KMeans  # slow to import

    found: Any = KMeans(count, n_init="auto", random_state=SEED).fit(rows)
    sizes = np.bincount(found.labels_, minlength=count)
    return found.cluster_centers_, sizes / sizes.sum()


def _moments(kind, by_class):
    means = np.stack([rows.mean(0) for rows in by_class])
    found = {"means": means}
    if kind == "gaussian":
        found["covariances"] = np.stack([np.cov(z.T, bias=True) for z in by_class])
    if kind == "diagonal":
        found["covariances"] = np.stack([rows.var(0) for rows in by_class])
    return found


def _rows(kind, by_class, count):
    least = min(map(len, by_class))
    if least < count:
        raise UserError(
            f"--count {count}: a class has only {least} images of the teacher; lower "
            "it, or raise --train-images or --views"
        )
    if kind == "rows":
        rng = np.random.default_rng(SEED)
        chosen = [z[rng.choice(len(z), count, replace=False)] for z in by_class]
        shares = {}
    else:
        pairs = [_centroids(rows, count) for rows in by_class]
        chosen = [centroids for centroids, _ in pairs]
        shares = {"weights": np.concatenate([share for _, share in pairs])}
    labels = np.repeat(np.arange(len(by_class), dtype=np.int32), count)
    return {"features": np.concatenate(chosen), "labels": labels, **shares}


def _about(problem, teacher):
    """Returns what files of both kinds say about the data and the teacher."""
    settings = problem.settings.data
    return {
        "dataset": settings.dataset,
        "classes": [str(name) for name in problem.dataset.class_names],
        "views": settings.views,
        "held_out": settings.held_out,
        "teacher": teacher.digest,
        "model": models.name_of(teacher.model),
        "width": teacher.width,
        "accuracy": teacher.accuracy,
        "top5": teacher.top5,
        "eval_images": len(problem.parts.eval_labels),
    }


def compute(
    problem: Problem, teacher: Teacher, kind: str, count: int | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Computes statistics of the teacher's pooled features.

    Args:
      problem: the data, the devices and the settings.
      teacher: the trained teacher.
      kind: one of `KINDS`.
      count: number of centroids or images of each class; None for other kinds.

    Returns:
      The arrays of the file, and what it says about them.

    Raises:
      UserError: a class has too few images.
    """
    model = teacher.model
    if model is None:
        raise RuntimeError("statistics need a teacher; open the study without others")
    images, labels = _seen(problem)
    found = outputs_of(problem, model, teacher.variables, images).features
    normalization = problem.settings.method.normalization
    x = jnp.asarray(found)
    rows = np.asarray(normalize([x, x], [x, x], normalization)[1], np.float64)
    by_class = [rows[labels == c] for c in range(problem.num_classes)]
    if min(map(len, by_class)) < 2:
        raise UserError(
            "the teacher has seen fewer than two images of some class, which have no "
            "statistics; raise --train-images"
        )
    arrays = _rows(kind, by_class, count) if count else _moments(kind, by_class)
    about = {
        "kind": kind,
        "count": count,
        "normalization": normalization,
        "images": len(problem.parts.teacher),
        "pixels": hashlib.sha256(images.ravel().data).hexdigest(),
        "dtype": problem.settings.networks.dtype,
        **_about(problem, teacher),
    }
    floats = {
        name: array.astype(np.float32) if array.dtype.kind == "f" else array
        for name, array in arrays.items()
    }
    return floats, about


def _exists(path, about):
    """Returns whether the file exists; raises if it has other content."""
    if not path.exists():
        return False
    try:
        with np.load(path) as file:
            known = json.loads(str(file["about"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        known = {}
    known.setdefault("top5", None)  # files of version 0.2 have none
    for name in {"pixels", "dtype"} & {*about}:  # nor have statistics of that version
        known.setdefault(name, about[name])
    if known != about:
        raise UserError(
            f"{path} is damaged, or was made from another teacher or with other "
            "settings; choose another --out, or delete it"
        )
    return True


def _write(path, arrays, about):
    if not _exists(path, about):
        statistics.write(path, arrays, about)


def _open(settings, console, check: Callable[[Problem], None] = lambda problem: None):
    """Opens a study that has a teacher and no students."""
    networks = settings.networks
    for option, file in (
        ("--teacher-statistics", networks.teacher_statistics),
        ("--teacher-outputs", networks.teacher_outputs),
    ):
        if file is not None:
            raise UserError(
                "kddm outputs makes a file from a teacher; pass --teacher instead of "
                f"{option} {file}"
            )
    settings = change(settings, distances=(), placebo=None)
    plan = lambda problem, digest: ()
    return study.open(settings, console, suffix="-outputs", plan=plan, check=check)


def store(settings: Settings, kind: str, count: int | None, console: Console) -> Path:
    """Computes statistics of a teacher and writes them to a file.

    Args:
      settings: settings of ``kddm distill``; those of students are ignored.
      kind: one of `statistics.KINDS`.
      count: number of centroids or images of each class; None for other kinds.
      console: console that prints the lines.

    Returns:
      The file, ``statistics-<kind>[-<count>]-<normalization>.npz`` in the folder of
      results; without normalization, that word is "raw".

    Raises:
      UserError: as in `study.open`; the normalization needs a batch of the teacher; or
        a class has too few images.
    """
    _check(settings, kind, count)
    with _open(settings, console) as opened:
        problem = opened.problem
        arrays, about = compute(problem, opened.teacher, kind, count)
        words = [kind, *([str(count)] if count else [])]
        words.append(about["normalization"] or "raw")
        path = problem.out / f"statistics-{'-'.join(words)}.npz"
        processes.first(lambda: _write(path, arrays, about))
    console.print(str(path))
    return path


def _check(settings, kind, count):
    if count is not None and kind not in statistics.COUNTED:
        raise UserError(
            f"--count is for --statistics {' and '.join(statistics.COUNTED)}, not "
            f"{kind}; leave it out"
        )
    if count is not None and count < 1:
        raise UserError(f"--count must be at least 1, got {count}")
    if settings.method.normalization == "teacher":
        raise UserError(
            "--normalization teacher divides the student's features by the teacher's "
            "deviation, which statistics do not hold; pass None, unit, centered or "
            "standardized"
        )


def _maps(settings):
    """Returns the teacher's maps that ``--layers`` names."""
    named = {layer for _, layer, _ in layer_pairs(settings)}
    return tuple(sorted(named - {"features", "logits"}))


def _check_outputs(settings, half, top):
    """Checks what can be checked without data; returns the check that needs it."""
    if settings.data.views is None:
        raise UserError(
            "kddm outputs stores outputs on fixed views; add --views, such as --views "
            "4, after --, or pass --statistics"
        )
    if top is not None and top < 1:
        raise UserError(f"--top must be at least 1, got {top}")

    def check(problem):
        for name in _maps(settings):
            methods.check_layer("--layers", "teacher", name, problem.shapes[1])
        if top is not None and top >= problem.num_classes:
            raise UserError(
                f"--top {top}: the teacher has {problem.num_classes} logits; lower it, "
                "or leave it out to store all"
            )

    return check


def _about_outputs(problem, teacher, half, top):
    views, settings = problem.views, problem.settings
    maps = problem.shapes[1]["maps"]
    return {
        **_about(problem, teacher),
        "images": len(views.indices),
        "source": views.source,
        "augmentation": asdict(settings.augmentation),
        "drawn": views.drawn,
        "dtype": settings.networks.dtype,
        "stored": [*_maps(settings)],
        "layers": {name: [*shape.shape[1:]] for name, shape in maps.items()},
        "half": half,
        "top": top,
    }


def store_outputs(
    settings: Settings, half: bool, top: int | None, console: Console
) -> Path:
    """Computes a teacher's outputs on fixed views and writes them to a file.

    Args:
      settings: settings of ``kddm distill``, of which the data, the augmentation, the
        teacher and ``--layers`` are used.
      half: whether to store float16.
      top: number of the largest logits that are stored; None stores all.
      console: console that prints the lines.

    Returns:
      The file, ``outputs-<V>-views[-half][-top<K>].npz`` in the folder of results.

    Raises:
      UserError: as in `study.open`; there are no views, or too few classes; the
        teacher has no such layer; or a number is too large for float16.
    """
    check = _check_outputs(settings, half, top)
    with _open(settings, console, check) as opened:
        problem, teacher = opened.problem, opened.teacher
        views: Any = problem.views
        about = _about_outputs(problem, teacher, half, top)
        words = [f"outputs-{about['views']}-views", *["half"] * half]
        words += [f"top{top}"] if top else []
        path = problem.out / f"{'-'.join(words)}.npz"

        def make():
            if not _exists(path, about):
                outputs = views.compute(problem, teacher, _maps(settings))
                arrays = stored.pack(outputs, half=half, top=top)
                arrays["indices"] = views.indices
                statistics.write(path, arrays, about)

        processes.first(make)
    console.print(str(path))
    return path


def _parser(prog: str) -> argparse.ArgumentParser:
    """Makes the parser of the command's own options."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Stores a teacher's outputs on fixed views, or statistics of its "
        "features, from which students can learn without the teacher.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--statistics",
        choices=statistics.KINDS,
        help="store statistics of features instead of outputs; gaussian: mean and "
        "covariance of each class; diagonal: mean and variances; means; centroids: "
        "k-means in each class; rows: features of images",
    )
    parser.add_argument(
        "--count",
        type=int,
        help=f"number of centroids or rows of each class (default: {COUNT})",
    )
    parser.add_argument(
        "--half", action="store_true", help="store outputs as float16, not float32"
    )
    parser.add_argument(
        "--top",
        type=int,
        metavar="K",
        help="store only the K largest logits of each image; students then spread the "
        "remaining probability evenly over the other classes. The K probabilities are "
        "exact at temperature 1, not at that of kd, which is 4 by default",
    )
    parser.add_argument(
        "settings", nargs="*", help="settings of kddm distill, after --"
    )
    return parser


def _check_options(given):
    """Refuses options of the other kind of file."""
    if given.statistics is None and given.count is not None:
        raise UserError(f"--count {given.count} is for --statistics; leave it out")
    if given.statistics is not None and (given.half or given.top is not None):
        option = "--half" if given.half else f"--top {given.top}"
        raise UserError(
            f"{option} is for outputs; leave out either it or --statistics "
            f"{given.statistics}"
        )


def main(arguments: list[str], prog: str = "kddm outputs") -> int:
    """Runs the command and returns its exit status."""
    given = _parser(prog).parse_args(arguments)
    kind, count = given.statistics, given.count
    if kind in statistics.COUNTED and count is None:
        count = COUNT

    def work():
        _check_options(given)
        settings = parse(given.settings, prog)
        run = settings.run
        processes.start(run.coordinator, run.processes, run.process)
        if kind is None:
            store_outputs(settings, given.half, given.top, console())
        else:
            store(settings, kind, count, console())

    return answer_errors(work)
