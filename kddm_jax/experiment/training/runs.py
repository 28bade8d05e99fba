"""Defines the runs of a study, and the settings that decide their results.

A run is a folder ``<out>/<name>/seed<k>`` with ``run.json`` (the settings that decide
its result), ``log.jsonl`` (the numbers of each epoch), ``checkpoints/`` and, once
finished, ``result.json``. ``kddm choose-weights`` has such folders in
``<out>/<place>``, a place for each candidate. A command that would give another result
in an existing folder stops with an error. `train.py` trains the runs.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import (
    ALONE,
    FEATURE_ONLY,
    LONGER,
    Settings,
    as_json,
    by_quality,
    change,
    identity,
    parts_of,
    renamed,
)
from kddm_jax.experiment.training import (
    compute,
    methods,
    models,
    placebos,
    pretrained,
    stored,
)
from kddm_jax.experiment.training.lookup import weight_of
from kddm_jax.experiment.training.problems import Problem

TITLES = {LONGER: "student alone, compute of a distilled run"}


def _shapes_without_network(problem, count):
    """Returns the shapes of stored outputs, or of features only for statistics."""
    if problem.outputs is not None:
        return problem.outputs.shapes(count)
    width = problem.statistics.bank.features.shape[1]
    features = jax.ShapeDtypeStruct((count, width), jnp.float32)
    return {"features": features, "logits": None, "maps": {}, "modules": ()}


def _check_stored(problem, name, method):
    if problem.outputs is not None:
        settings, memory = problem.settings, problem.memory
        stored.check_method(settings, problem.outputs, name, method, memory)


def check_distances(problem: Problem, teacher: models.Network | None) -> None:
    """Traces every method on the real shapes, to find errors before any training.

    Without a network as the teacher, the problem has statistics or outputs of one.
    """
    settings, problem.teacher = problem.settings, teacher
    image = problem.dataset.train_images.shape[1:]
    student = problem.student
    name, count = settings.networks.student_model, problem.compared_images
    problem.shapes = (
        models.shapes(name, student, image, count),
        models.shapes("teacher", teacher, image, count)
        if teacher is not None
        else _shapes_without_network(problem, count),
    )
    placebo, share = settings.method.placebo, settings.method.placebo_share
    if placebo is not None and placebo in placebos.OF_OTHERS:
        labels = problem.dataset.train_labels[problem.seen]
        placebos.partners(placebo, labels, share)
    for name in settings.method.distances:
        if name == FEATURE_ONLY and by_quality(settings):
            _check_stored(problem, name, None)
            methods.check_choice_of_layers(settings, *problem.shapes)
            placebos.check(settings, name, None)
            continue  # its layers are chosen when the teacher is trained
        method = method_of(problem, name)
        _check_stored(problem, name, method)
        bank = problem.statistics and problem.statistics.bank
        methods.check(name, method, *problem.shapes, problem.compared_images, bank)
        placebos.check(settings, name, method)


def method_of(
    problem: Problem, name: str, settings: Settings | None = None
) -> methods.Method:
    """Makes the training method of a run.

    Args:
      problem: the data, the devices and the settings.
      name: name of the run: one of `ALONE`, or a method.
      settings: settings of the run; None uses those of the study.

    Returns:
      The method; it has no distance for the teacher and for students alone.

    Raises:
      UserError: a network or a file has no array that the method compares, or the
        method cannot be a `Term`.
    """
    settings = settings or problem.settings
    if name in ALONE:
        return methods.Method()
    if name == FEATURE_ONLY and by_quality(settings):
        settings = methods.released(settings, problem.chosen_layers)
    try:
        return methods.make(settings, name, *problem.shapes)
    except ValueError as error:
        raise UserError(f"distance {name}: {error}") from error


# ---------------------------------------------------------------------------
# One run.


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Returns the folder of a run."""
    return out / name.replace(":", ".") / f"seed{seed}"


@dataclass(frozen=True, eq=False)
class Run:
    """Describes one training of one network.

    Attributes:
      name: name of the run: one of `ALONE`, or a method.
      seed: seed of initialization, order and augmentation.
      weight: lambda.
      epochs: number of epochs.
      indices: indices of the run's labelled training images.
      settings: the study's settings, of which this run may change some.
      identity: the settings that decide the result, as JSON values.
      start: weights of a file that the network starts from; None uses random weights.
      place: folder within the folder of results, named after what a candidate of
        ``kddm choose-weights`` tries.
      weights: lambda of each distance, if the method is a sum of several; the run's
        lambda is then 1.
      unlabelled: indices of the images that the run sees without labels.
    """

    name: str
    seed: int
    weight: float
    epochs: int
    indices: np.ndarray
    settings: Settings
    identity: dict[str, Any]
    start: pretrained.Pretrained | None = None
    place: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    unlabelled: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def folder(self, out: Path) -> Path:
        """Returns the run's folder."""
        return folder_of(out / self.place, self.name, self.seed)

    @property
    def label(self) -> str:
        """Returns the run's name in messages."""
        if self.name == "teacher":
            return self.name
        if not self.place:
            return f"{self.name} seed {self.seed}"
        epochs = f"{self.epochs} epoch{'' if self.epochs == 1 else 's'}"
        return ", ".join((self.name, *self._candidate, epochs, f"seed {self.seed}"))

    @property
    def _candidate(self) -> tuple[str, ...]:
        """Returns what a candidate of ``kddm choose-weights`` tries, in words."""
        optimizer, normalization = self.settings.optimizer, ()
        if self.name in ALONE:
            return f"lr {optimizer.lr:g}", f"weight decay {optimizer.weight_decay:g}"
        if methods.normalizes(self.name):
            normalization = (self.settings.method.normalization or "raw features",)
        return *normalization, f"λ = {self.weight:g}", f"lr {optimizer.lr:g}"

    @property
    def title(self) -> str:
        """Returns the run's name in tables."""
        if self.name in ALONE:
            return TITLES.get(self.name, self.name)
        return methods.title(self.name)


def _identity(problem, settings, name, start, **more):
    decisive = identity(settings, name)
    decisive["data"] = problem.data_digest
    for model in ("teacher_model", "student_model"):
        if model in decisive:
            decisive[f"{model}_source"] = models.source_digest(decisive[model])
    decisive["pretrained"] = start.sha256 if start else None
    if settings.optimizer.mixup:  # each device mixes its own images
        decisive["mixup_devices"] = len(problem.devices)
    return json.loads(json.dumps({**decisive, **more}))  # in the form that is read back


def teacher_run(problem: Problem) -> Run:
    """Returns the teacher's run."""
    settings, start = problem.settings, problem.starts.get("teacher")
    return Run(
        name="teacher",
        seed=0,
        weight=0.0,
        epochs=settings.optimizer.teacher_epochs,
        indices=problem.parts.teacher,
        settings=settings,
        identity=_identity(
            problem, settings, "teacher", start, width=problem.teacher_width
        ),
        start=start,
    )


def student_run(
    problem: Problem,
    teacher_digest: str | None,
    name: str,
    seed: int,
    *,
    settings: Settings | None = None,
    place: str = "",
) -> Run:
    """Returns the run of one student.

    Args:
      problem: the data, the devices and the settings.
      teacher_digest: digest of the teacher; None if it is not trained yet.
      name: "student" for the student alone, "student_longer" for one with the compute
        of a distilled run, or a method.
      seed: the run's seed.
      settings: settings of the run; None uses those of the study. They may differ from
        the study's in method and optimizer only.
      place: folder within the folder of results.
    """
    settings = settings or problem.settings
    if name == LONGER:
        settings = change(settings, epochs=compute.longer_epochs(problem))
    start, more = problem.starts.get("student"), {}
    count = 0 if name in ALONE else settings.method.unlabelled_images
    if name not in ALONE:
        more = {"distance": name, "weight": weight_of(settings, name)}
        if len(parts := parts_of(name)) > 1:
            more["weights"] = {part: weight_of(settings, part) for part in parts}
        more["distance_source"] = methods.digest(name)
        statistics, outputs = problem.statistics, problem.outputs
        read = {
            "statistics": statistics and statistics.words,
            # "" if the outputs that it reads are those of the network
            "outputs": outputs and outputs.words_for(settings, name),
        }
        for kind, words in read.items():
            more[kind] = words or None
            more[f"{kind}_digest"] = getattr(problem, kind).digest if words else None
        whole = settings.method.distance_group in (None, len(problem.devices))
        more["group_images"] = None if whole else problem.compared_images
        if teacher_digest is not None:
            more["teacher"] = teacher_digest
    return Run(
        name=name,
        seed=seed,
        weight=more.get("weight", 0.0),
        epochs=settings.optimizer.epochs,
        indices=problem.parts.student,
        settings=settings,
        identity=_identity(problem, settings, name, start, seed=seed, **more),
        start=start,
        place=place,
        weights=more.get("weights", {}),
        unlabelled=problem.parts.unlabelled[:count],
    )


def student_runs(problem: Problem, teacher_digest: str | None) -> Iterator[Run]:
    """Yields the students alone, then the distilled ones, distance by distance.

    With ``--equal-compute``, students alone are trained twice: as long as the distilled
    ones, and with the compute of a distilled run.

    Args:
      problem: the data, the devices and the settings.
      teacher_digest: digest of the teacher; None if it is not trained yet.

    Yields:
      The runs.
    """
    settings = problem.settings
    longer = settings.run.equal_compute and (
        compute.longer_epochs(problem) > settings.optimizer.epochs
    )
    alone = ("student", LONGER) if longer else ("student",)
    for name in (*alone, *settings.method.distances):
        for seed in settings.run.seeds:
            yield student_run(problem, teacher_digest, name, seed)


def check_folder(run: Run, out: Path) -> None:
    """Raises if the folder's run was made with other settings."""
    path = run.folder(out) / "run.json"
    if not path.exists():
        return
    try:
        found = renamed(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable; choose another --out") from error
    if found.get("batches") is not None:
        raise UserError(
            f"{path.parent} was trained on the batches of another seed by an earlier "
            "version; choose another --out, or delete that folder"
        )
    # Folders of earlier versions lack later settings, which had their defaults.
    plain = json.loads(json.dumps(as_json(Settings())))
    for name, wanted in run.identity.items():
        made = found.get(name, plain.get(name))
        if made != wanted:
            raise UserError(
                f"{path.parent} was made with {name}={made}, this command says "
                f"{wanted}; choose another --out, or delete that folder"
            )


def epoch_order(run: Run, epoch: int, batch_size: int) -> np.ndarray:
    """Draws the indices of an epoch's full batches, ``[steps, batch]``.

    If the run has unlabelled images, a batch alternates between ``batch_size`` labelled
    images and as many unlabelled ones, so that every device has as many of both. An
    unlabelled image is repeated only if an epoch needs more than there are.
    """
    rng = np.random.default_rng((run.seed, epoch))
    order = rng.permutation(run.indices)
    steps = len(order) // batch_size
    order = order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)
    if not len(run.unlabelled):
        return order
    rng = np.random.default_rng((run.seed, epoch, 2))  # 1 draws the views
    rounds = -(-order.size // len(run.unlabelled))
    drawn = np.concatenate([rng.permutation(run.unlabelled) for _ in range(rounds)])
    drawn = drawn[: order.size].reshape(order.shape).astype(np.int32)
    return np.stack([order, drawn], axis=-1).reshape(steps, -1)
