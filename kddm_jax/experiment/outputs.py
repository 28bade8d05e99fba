"""Implements ``kddm outputs``, which stores statistics of a teacher's features.

    kddm outputs --statistics gaussian -- --dataset cifar10 --teacher RUN \
        --normalization unit --out runs/outputs

Settings of ``kddm distill`` follow after ``--``. The command trains the teacher, or
reads the one of ``--teacher``, computes its features of its training images (with
``--views``, of fixed views of them), and writes a file from which ``kddm distill
--teacher-statistics FILE`` trains students without the teacher.
"""

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from kddm_jax.experiment import study
from kddm_jax.experiment.machine import processes
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.machine.terminal import answer_errors, console
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.settings import Settings, change
from kddm_jax.experiment.training import models, statistics, views
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
    settings, dataset = problem.settings, problem.settings.data
    normalization = settings.method.normalization
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
        "dataset": dataset.dataset,
        "classes": [str(name) for name in problem.dataset.class_names],
        "images": len(problem.parts.teacher),
        "views": dataset.views,
        "held_out": dataset.held_out,
        "teacher": teacher.digest,
        "model": models.name_of(model),
        "width": teacher.width,
        "accuracy": teacher.accuracy,
        "eval_images": len(problem.parts.eval_labels),
    }
    floats = {
        name: array.astype(np.float32) if array.dtype.kind == "f" else array
        for name, array in arrays.items()
    }
    return floats, about


def _write(path, arrays, about):
    """Writes the file; refuses to replace statistics that are not the same."""
    if path.exists() and statistics.read(path).about != about:
        raise UserError(
            f"{path} has statistics of another teacher or other settings; choose "
            "another --out, or delete it"
        )
    statistics.write(path, arrays, about)


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
    settings = change(settings, distances=(), placebo=None)
    plan = lambda problem, digest: ()  # no students
    with study.open(settings, console, suffix="-outputs", plan=plan) as opened:
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
    if settings.networks.teacher_statistics is not None:
        raise UserError(
            "kddm outputs computes statistics from a teacher; pass --teacher instead "
            "of --teacher-statistics"
        )
    if settings.method.normalization == "teacher":
        raise UserError(
            "--normalization teacher divides the student's features by the teacher's "
            "deviation, which statistics do not hold; pass None, unit, centered or "
            "standardized"
        )


def _parser(prog: str) -> argparse.ArgumentParser:
    """Makes the parser of the command's own options."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Stores statistics of a teacher, from which students can learn.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--statistics",
        required=True,
        choices=statistics.KINDS,
        help="gaussian: mean and covariance of each class; diagonal: mean and "
        "variances; means; centroids: k-means in each class; rows: features of images",
    )
    parser.add_argument(
        "--count",
        type=int,
        help=f"number of centroids or rows of each class (default: {COUNT})",
    )
    parser.add_argument(
        "settings", nargs="*", help="settings of kddm distill, after --"
    )
    return parser


def main(arguments: list[str], prog: str = "kddm outputs") -> int:
    """Runs the command and returns its exit status."""
    given = _parser(prog).parse_args(arguments)
    counted = given.statistics in statistics.COUNTED
    count = COUNT if counted and given.count is None else given.count

    def work():
        settings = parse(given.settings, prog)
        run = settings.run
        processes.start(run.coordinator, run.processes, run.process)
        store(settings, given.statistics, count, console())

    return answer_errors(work)
