"""Prepares the images on the devices and the programs that a study's runs share."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax import data, train_step
from kddm_jax.data import augment, stream
from kddm_jax.experiment.machine import processes, signals
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import AtMost, Settings, change, flat
from kddm_jax.experiment.training import methods, models, pretrained, views
from kddm_jax.experiment.training.statistics import Statistics
from kddm_jax.experiment.training.stored import StoredOutputs

EVAL_BATCH = 500
MANY_CLASSES = 20  # fewest with top-5 accuracy; with few it is near 100 %


@dataclass(frozen=True)
class Split:
    """Contains the images that teacher and students are trained and evaluated on.

    Attributes:
      teacher: indices of the teacher's training images.
      student: indices of the students' labelled images, some of the teacher's.
      eval_images: images to evaluate on.
      eval_labels: labels of these images.
      unlabelled: indices of the images that distilled students see without labels, some
        of the teacher's that are not the students'.
    """

    teacher: np.ndarray
    student: np.ndarray
    eval_images: np.ndarray
    eval_labels: np.ndarray
    unlabelled: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def lower(
    settings: Settings, dataset: data.Dataset, devices: int
) -> tuple[Settings, tuple[str, ...]]:
    """Lowers the recipe's numbers that are too large for the data set or the devices.

    Args:
      settings: the settings of the command.
      dataset: the data set.
      devices: the number of devices.

    Returns:
      The settings, and a line for each number that was lowered.
    """
    lines = []

    def fit(name: str, limit: int, why: str, least: int = 1) -> int:
        """Lowers a setting and returns its value, or the limit if it is None."""
        nonlocal settings
        value = flat(settings)[name]
        if isinstance(value, AtMost) and value > limit >= least:
            settings = change(settings, **{name: AtMost(limit)})
            option = name.replace("_", "-")
            lines.append(f"--{option} {limit} instead of the recipe's {value}: {why}")
            return limit
        return limit if value is None else value

    held_out = settings.data.held_out
    left = len(dataset.train_labels) - held_out
    teacher = fit("train_images", left, "there are no more training images")
    student = fit("student_images", teacher, "the teacher sees no more images")
    left, why = teacher - student, "the teacher sees no more images"
    if settings.networks.teacher_statistics is not None:
        left, why = 0, "statistics predict no classes"
    fit("unlabelled_images", left, why, least=0)
    if not held_out:
        count = len(dataset.test_labels)
        fit("test_images", count, "there are no more test images")
    batch = min(student, settings.optimizer.batch_size) // devices * devices
    fit("batch_size", batch, f"{student} images for students, {devices} device(s)")
    return settings, tuple(lines)


def _unlabelled(teacher, student, count):
    """Draws unlabelled images, without regard to their classes, which are unknown."""
    left = np.setdiff1d(teacher, student)
    if count > len(left):
        raise UserError(
            f"--unlabelled-images {count}: {len(left)} of the teacher's images are not "
            "among the students' labelled ones; lower it, or --student-images"
        )
    one_class = np.zeros(len(left), np.int64)
    return left[data.balanced_subset(one_class, count, seed=0)]


def split(dataset: data.Dataset, settings: Settings) -> Split:
    """Chooses nested parts of the training set, equal in all runs.

    All are stratified but the unlabelled images, which are drawn at random.
    """
    labels = dataset.train_labels
    train, held_out, kept = np.arange(len(labels)), None, settings.data.held_out
    if kept >= len(labels):
        raise UserError(
            f"--held-out {kept}: there are only {len(labels)} training images; lower it"
        )
    if kept:
        train, held_out = data.stratified_split(labels, kept, seed=0)

    def choose(indices, count, option):
        if count is None:
            return indices
        if count > len(indices):
            raise UserError(
                f"--{option} {count}: there are only {len(indices)} images; lower it"
            )
        return indices[data.balanced_subset(labels[indices], count, seed=0)]

    teacher = choose(train, settings.data.train_images, "train-images")
    student = choose(teacher, settings.data.student_images, "student-images")
    if held_out is not None:
        images, eval_labels = dataset.train_images[held_out], labels[held_out]
    else:
        images, eval_labels = dataset.test_images, dataset.test_labels
        count = settings.data.test_images
        if count is not None and count > len(eval_labels):
            raise UserError(
                f"--test-images {count}: there are only {len(eval_labels)} test "
                "images; lower it"
            )
        if count is not None and count < len(eval_labels):
            chosen = data.balanced_subset(eval_labels, count, seed=0)
            images, eval_labels = images[chosen], eval_labels[chosen]
    unlabelled = _unlabelled(teacher, student, settings.method.unlabelled_images)
    return Split(teacher, student, images, eval_labels, unlabelled)


@dataclass
class Problem:
    """Contains the data, the devices, the settings and the programs of a study."""

    settings: Settings
    out: Path
    dataset: data.Dataset
    devices: list[Any]
    parts: Split
    lowered: tuple[str, ...] = ()
    programs: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    shapes: tuple[methods.Shapes, methods.Shapes] = ({}, {})
    teacher: models.Network | None = None
    longer_epochs: int | None = None
    chosen_layers: tuple[str, ...] = ()
    of_teacher: dict[str, np.ndarray] = field(default_factory=dict)
    statistics: Statistics | None = None
    outputs: StoredOutputs | None = None

    @property
    def channels(self) -> int:
        """Returns the number of channels of the images."""
        return self.dataset.train_images.shape[-1]

    @property
    def memory(self) -> int:
        """Returns the bytes of a device's memory, or of the machine's for a CPU."""
        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"]
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @property
    def compared_images(self) -> int:
        """Returns the number of images that a distance compares, in batch or group."""
        group = self.settings.method.distance_group or len(self.devices)
        of_each = self.settings.optimizer.batch_size // len(self.devices) * group
        return of_each * (2 if self.settings.method.unlabelled_images else 1)

    @cached_property
    def seen(self) -> np.ndarray:
        """Returns the indices of the images that distilled students see.

        The labelled ones come first.
        """
        return np.concatenate([self.parts.student, self.parts.unlabelled])

    @cached_property
    def student_labels(self) -> np.ndarray:
        """Returns the training labels for students: -1 for their unlabelled images."""
        labels = np.array(self.dataset.train_labels)
        labels[self.parts.unlabelled] = -1
        return labels

    @property
    def num_classes(self) -> int:
        """Returns the number of classes of the data set."""
        return len(self.dataset.class_names)

    @cached_property
    def streams(self) -> bool:
        """Returns whether the training images are too large for the devices."""
        limit = self.settings.run.stream_above
        limit = 1e6 * limit if limit is not None else self.memory / 4
        return processes.first(lambda: self.dataset.train_images.nbytes > limit)

    @cached_property
    def starts(self) -> dict[str, pretrained.Pretrained]:
        """Reads the weights that teacher and student start from, if any are given."""
        given = self.settings.networks
        width = self.teacher_width
        networks = {
            "teacher": (given.pretrained_teacher, given.teacher_model, width),
            "student": (given.pretrained_student, given.student_model, given.width),
        }
        return {
            who: pretrained.load(
                f"--pretrained-{who}", path, self.model(name, width), self.channels
            )
            for who, (path, name, width) in networks.items()
            if path is not None
        }

    @cached_property
    def resident(self) -> tuple[Any, Any]:
        """Copies all training images (uint8) and labels to every device."""
        pair = (self.dataset.train_images, self.dataset.train_labels)
        return train_step.replicate(pair, self.devices)

    @cached_property
    def resident_of_students(self) -> tuple[Any, Any]:
        """Returns the same images on every device with the labels for students."""
        labels = train_step.replicate(self.student_labels, self.devices)
        return self.resident[0], labels

    @cached_property
    def views(self) -> views.Views | None:
        """Returns fixed views of the students' images, if there are any."""
        if self.settings.data.views is None:
            return None
        images, labels = self.dataset.train_images, self.student_labels
        return views.Views(self.settings, images, labels, indices=self.seen)

    @cached_property
    def resident_views(self) -> tuple[Any, Any]:
        """Copies all views (uint8) and labels to every device."""
        pair: Any = self.views and self.views.pair
        return train_step.replicate(pair, self.devices)

    def dispatches(
        self,
        order: np.ndarray,
        length: int,
        *,
        of_views: bool = False,
        of_students: bool = False,
    ) -> Iterator[tuple]:
        """Yields images, labels and indices of dispatches of ``length`` steps.

        The same program runs on streamed and on resident images: ``scan_steps`` looks
        up its images by index, among those of the dispatch or among all.

        Args:
          order: indices of an epoch's batches, ``[steps, b]``.
          length: number of steps of a dispatch.
          of_views: whether the indices are those of fixed views, which only students
            have.
          of_students: whether labels are those for students.

        Yields:
          Arguments of a program of `train_step.scan_steps`.
        """
        if not len(order):
            return
        shares = processes.mine(self.devices)
        rows = stream.reads(order, length=length, shares=shares, of=len(self.devices))
        if of_views or not self.streams:
            if of_views:
                resident = self.resident_views
            else:
                resident = self.resident_of_students if of_students else self.resident
            for shares in rows:
                yield *resident, shares
            return
        own = np.arange(rows[0, 0].size, dtype=np.int32).reshape(rows[0, 0].shape)
        own = np.broadcast_to(own, rows[0].shape)  # [devices, length, b]
        images, labels = self.dataset.train_images, self.dataset.train_labels
        labels = self.student_labels if of_students else labels
        for pair in stream.stream(images, labels, rows):
            yield *pair, own

    @cached_property
    def augment(self) -> Callable:
        """Returns the augmentation of one image."""
        return augment.make_augment(
            mean=self.dataset.mean,
            std=self.dataset.std,
            **asdict(self.settings.augmentation),
            dtype=jnp.dtype(self.settings.networks.dtype),
        )

    @cached_property
    def data_digest(self) -> str | None:
        """Hashes the data of a folder or TFDS set; its name does not identify it."""
        if self.settings.data.dataset in {*data.DATASETS} - {"folder"}:
            return None
        digest = hashlib.sha256(repr((self.dataset.mean, self.dataset.std)).encode())
        for labels in (self.dataset.train_labels, self.dataset.test_labels):
            digest.update(labels.tobytes())
        return digest.hexdigest()[:16]

    def normalize(self, key: None, image: jax.Array) -> jax.Array:
        """Normalizes one image, without augmentation."""
        del key
        return self.augment(None, image, train=False)

    def model(self, name: str, width: int) -> models.Network:
        """Builds a network whose BatchNorm sees the global batch."""
        return models.build(
            name,
            num_classes=self.num_classes,
            stem=self.settings.networks.stem,
            width=width,
            dtype=jnp.dtype(self.settings.networks.dtype),
            axis_name=train_step.AXIS,
        )

    @property
    def student(self) -> models.Network:
        """Builds the student's network."""
        networks = self.settings.networks
        return self.model(networks.student_model, networks.width)

    @property
    def teacher_width(self) -> int:
        """Returns the width of a teacher that is trained here."""
        networks = self.settings.networks
        return networks.teacher_width or networks.width

    def init(self, model: models.Network, seed: int):
        """Initializes a network's variables, on the host."""
        key = ("init", model)
        if key not in self.programs:  # tracing and compiling it takes seconds
            # It runs once, and LLVM's default level takes three times as long.
            level = {"xla_backend_optimization_level": 1}
            options = level if jax.default_backend() == "cpu" else None
            self.programs[key] = jax.jit(model.init, compiler_options=options)
        image = jnp.zeros((1, *self.dataset.train_images.shape[1:]))
        return jax.device_get(self.programs[key](jax.random.key(seed), image))


def prepare(settings: Settings, out: Path) -> Problem:
    """Loads the data, and checks that the settings fit it, before anything runs."""
    run = settings.run
    if run.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(run.compilation_cache))
    dataset = data.load(
        settings.data.dataset,
        data_dir=run.data_dir,
        image_size=settings.data.image_size,
        skip_damaged=settings.data.skip_damaged,
        progress=None if run.progress else lambda done, total: None,
    )
    devices = processes.choose_devices(run.devices)
    settings, lowered = lower(settings, dataset, len(devices))
    _check_devices(settings, len(devices))
    parts = split(dataset, settings)
    problem = Problem(settings, out, dataset, devices, parts, lowered)
    _check_images(problem)
    return problem


def _check_devices(settings, count):
    batch, group = settings.optimizer.batch_size, settings.method.distance_group
    if batch % count:
        raise UserError(
            f"--batch-size {batch} does not divide among {count} "
            f"devices; choose a multiple of {count}"
        )
    if count % (group or count):
        raise UserError(
            f"--distance-group {group} does not divide the {count} "
            f"devices; choose a divisor of {count}"
        )


def _check_images(problem):
    batch, views = problem.settings.optimizer.batch_size, problem.settings.data.views
    for option, part in (("train", "teacher"), ("student", "student")):
        images = len(getattr(problem.parts, part))
        if images < batch:
            raise UserError(
                f"--{option}-images {images} is less than one batch of {batch}; raise "
                "it, or lower --batch-size or --devices"
            )
    if views is not None:
        one = problem.dataset.train_images[0].nbytes
        size = one * len(problem.seen) * views
        if size > problem.memory / 4:
            raise UserError(
                f"--views {views}: {size / 1e9:.1f} GB of images, a quarter of the "
                f"memory is {problem.memory / 4e9:.1f} GB; lower it, or leave it out"
            )


def evaluate(problem: Problem, model: models.Network, variables) -> dict[str, float]:
    """Measures accuracies on the evaluation images, in percent.

    Returns:
      ``accuracy``, and for `MANY_CLASSES` or more also ``top5``, the share of images
      whose class is among the five largest logits.
    """
    top = 5 if problem.num_classes >= MANY_CLASSES else None
    if model not in problem.programs:
        step = train_step.make_eval_step(
            models.network_apply(model),
            normalize=lambda image: problem.normalize(None, image),
            top=top,
        )
        problem.programs[model] = train_step.parallel(
            step,
            in_axes=(None, 0, 0),
            devices=problem.devices,
        )
    images, labels = problem.parts.eval_images, problem.parts.eval_labels
    devices, mine = len(problem.devices), processes.mine(problem.devices)
    size = -(-min(EVAL_BATCH, len(labels)) // devices) * devices
    correct, among = 0, 0
    for start in range(0, len(labels), size):
        if processes.count() == 1:  # several processes stop together, within an epoch
            signals.check()
        x, y = images[start : start + size], labels[start : start + size]
        short = size - len(y)
        x = np.pad(x, ((0, short), (0, 0), (0, 0), (0, 0)))
        y = np.pad(y, (0, short), constant_values=-1)
        shares = (
            part[mine.start : mine.stop] for part in train_step.shard((x, y), devices)
        )
        counts = problem.programs[model](variables, *shares)
        correct += int(counts["correct"])
        among += int(counts.get("correct_top", 0))
    found = {"accuracy": 100 * correct / len(labels)}
    return found if top is None else {**found, "top5": 100 * among / len(labels)}
