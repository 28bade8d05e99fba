"""Runs: a teacher, students alone, distilled students; what decides their results.

A run is a folder ``<out>/<name>/seed<k>`` with ``run.json`` (what decides its result),
``checkpoints/`` and, once finished, ``result.json``; one of a grid of lambdas lies in
``<out>/weight-<lambda>``.  A command that would give another result in an existing
folder is refused before anything starts.  ``training.py`` trains them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import methods
import models
import numpy as np
import pretrained
from flax import linen as nn
from problems import Problem
from settings import FEATURE_ONLY, UserError, as_json, weight_of

ALONE = ("teacher", "student")  # runs without a teacher
# What decides a teacher's result, and a student's beside the teacher itself.  Not
# on_nonfinite: a run that it stops has no result, and may go on by skipping.
SHARED_FIELDS = (
    *("dataset", "image_size"),
    *("train_images", "test_images", "held_out", "eval_every"),
    *("stem", "dtype", "padding", "flip", "degrees", "shift", "zoom", "batch_size"),
    *("lr", "lr_end", "schedule", "warmup", "momentum", "nesterov", "weight_decay"),
    "optimizer",
)
TEACHER_FIELDS = (*SHARED_FIELDS, "teacher_model", "teacher_epochs")
STUDENT_FIELDS = (
    *SHARED_FIELDS,
    *("student_model", "width", "epochs", "student_images", "views"),
)
DISTILLED_FIELDS = (
    *STUDENT_FIELDS,
    *("normalization", "weight_schedule", "layers", "projector", "positions"),
)
# Fields that folders of earlier versions do not have, and what these meant.
YOUNGER = {"weight_schedule": "constant"}
FEATURE_ONLY_FIELDS = (*DISTILLED_FIELDS, "head", "quality_images")


def check_distances(problem: Problem, teacher: nn.Module) -> None:
    """Traces every method on the shapes to come: its errors, before any training."""
    settings = problem.settings
    image = problem.dataset.train_images.shape[1:]
    student = problem.model(settings.student_model, settings.width)
    problem.shapes = tuple(
        models.shapes(name, model, image, problem.compared_images)
        for name, model in ((settings.student_model, student), ("teacher", teacher))
    )
    for name in settings.distances:
        if name == FEATURE_ONLY and not settings.layers:
            methods.check_choice_of_layers(settings, *problem.shapes)
            continue  # its layers are chosen once there is a teacher
        method = method_of(problem, name)
        methods.check(name, method, *problem.shapes, problem.compared_images)


def method_of(problem: Problem, name: str) -> methods.Method:
    """How the student of a name learns; alone, or with a teacher."""
    settings = problem.settings
    if name in ALONE:
        return methods.Method()
    if name == FEATURE_ONLY and not settings.layers:
        settings = replace(settings, layers=problem.chosen_layers)
    return methods.make(settings, name, *problem.shapes)


# ---------------------------------------------------------------------------
# One run.


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Where a run lives."""
    return out / name.replace(":", ".") / f"seed{seed}"


@dataclass(frozen=True, eq=False)
class Run:
    """A network to train and how.

    Attributes:
      name: "teacher", "student" or a method.
      seed: of initialisation, order and augmentation.
      weight: lambda.
      epochs: to train.
      indices: of the training images it sees.
      identity: what decides its result, as JSON values.
      start: weights of a file that it starts from, None for fresh ones.
      place: folder beneath that of the results; of a grid's runs, which say their
        lambda there.
    """

    name: str
    seed: int
    weight: float
    epochs: int
    indices: np.ndarray
    identity: dict[str, object]
    start: pretrained.Pretrained | None = None
    place: str = ""

    def folder(self, out: Path) -> Path:
        """Where it lives."""
        return folder_of(out / self.place, self.name, self.seed)

    @property
    def label(self) -> str:
        """Its name in messages."""
        if self.name == "teacher":
            return self.name
        lam = f" λ = {self.weight:g}" if self.place else ""
        return f"{self.name}{lam} seed {self.seed}"

    @property
    def title(self) -> str:
        """Its name in tables."""
        return self.name if self.name in ALONE else methods.title(self.name)


def _identity(problem, names, start, **more):
    values = as_json(problem.settings)
    identity = {name: values[name] for name in names}
    identity["data"] = problem.data_digest
    for model in ("teacher_model", "student_model"):
        if model in identity:
            identity[f"{model}_source"] = models.source_digest(identity[model])
    identity["pretrained"] = start.sha256 if start else None
    return json.loads(json.dumps({**identity, **more}))  # as it is read back


def teacher_run(problem: Problem) -> Run:
    """The teacher's run."""
    settings, start = problem.settings, problem.starts.get("teacher")
    width = settings.teacher_width or settings.width
    return Run(
        name="teacher",
        seed=0,
        weight=0.0,
        epochs=settings.teacher_epochs,
        indices=problem.parts.teacher,
        identity=_identity(problem, TEACHER_FIELDS, start, width=width),
        start=start,
    )


def student_runs(
    problem: Problem, teacher_digest: str | None, weight: float | None = None
) -> Iterator[Run]:
    """Students alone, then distilled ones; those of one distance follow each other.

    Args:
      problem: data, devices, settings.
      teacher_digest: of the teacher; None where it is not trained yet.
      weight: lambda of all distances; None: the settings'.

    Yields:
      The runs.
    """
    settings, start = problem.settings, problem.starts.get("student")
    for name in ("student", *settings.distances):
        fields, more = STUDENT_FIELDS, {}
        if name not in ALONE:
            fields = FEATURE_ONLY_FIELDS if name == FEATURE_ONLY else DISTILLED_FIELDS
            lam = weight_of(settings, name) if weight is None else weight
            more = {"distance": name, "weight": lam}
            more["distance_source"] = methods.digest(name)
            whole = problem.compared_images == settings.batch_size
            more["group_images"] = None if whole else problem.compared_images
            if teacher_digest is not None:
                more["teacher"] = teacher_digest
        for seed in settings.seeds:
            yield Run(
                name=name,
                seed=seed,
                weight=more.get("weight", 0.0),
                epochs=settings.epochs,
                indices=problem.parts.student,
                identity=_identity(problem, fields, start, seed=seed, **more),
                start=start,
            )


def grid_runs(
    problem: Problem, teacher_digest: str | None, grid: Sequence[float]
) -> dict[str, list[Run]]:
    """By distance the students of every lambda of a grid, each with its own folder."""
    every = {name: [] for name in problem.settings.distances}
    for weight in grid:
        for run in student_runs(problem, teacher_digest, weight):
            if run.name in every:
                every[run.name].append(replace(run, place=f"weight-{weight:g}"))
    return every


def check_folder(run: Run, out: Path) -> None:
    """Refuses a folder whose run was made by other settings."""
    path = run.folder(out) / "run.json"
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable; choose another --out") from error
    if found.get("batches") is not None:
        raise UserError(
            f"{path.parent} was trained on the batches of another seed by an earlier "
            "version; choose another --out, or delete that folder"
        )
    for name, wanted in run.identity.items():
        if found.get(name, YOUNGER.get(name)) != wanted:
            raise UserError(
                f"{path.parent} was made with {name}={found.get(name)}, this command "
                f"says {wanted}; choose another --out, or delete that folder"
            )


def epoch_order(run: Run, epoch: int, batch_size: int) -> np.ndarray:
    """Indices of an epoch's full batches, ``[steps, batch]``, from seed and epoch."""
    rng = np.random.default_rng((run.seed, epoch))
    order = rng.permutation(run.indices)
    steps = len(order) // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)
