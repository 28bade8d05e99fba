"""Runs: a teacher, students alone, distilled students; each resumes where it stopped.

A run is a folder ``<out>/<name>/seed<k>`` with ``run.json`` (what decides its result),
``checkpoints/`` and, once finished, ``result.json``.  A command that would give another
result in an existing folder is refused before anything starts.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import methods
import models
import numpy as np
import optax
import pretrained
import processes
import signals
import views
from flax import linen as nn
from progress import Progress
from settings import FEATURE_ONLY, Settings, UserError, as_json, weight_of

from kddm_jax import augment, data, resnet, stream, train_step
from kddm_jax.losses import carries_weights
from kddm_jax.projectors import without_projectors

if TYPE_CHECKING:
    from teacher import Teacher

EVAL_BATCH = 500
LOOK_SECONDS = 0.1  # between looks at the steps: at each, they cost a small step 10 %
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
    *("scale", "weight_schedule", "layers", "projector", "view"),
)
# Fields that folders of earlier versions do not have, and what these meant.
YOUNGER = {"weight_schedule": "constant"}
FEATURE_ONLY_FIELDS = (*DISTILLED_FIELDS, "head", "quality_images")


def _commit() -> str:
    """The checkout's commit, "unknown" without git."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def environment(devices) -> dict[str, object]:
    """What numbers are measured with."""
    cpu = f"CPU ({os.cpu_count()} cores)"
    script = f"experiments/{Path(sys.argv[0]).name}"
    return {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "commit": _commit(),
        "device": cpu if devices[0].platform == "cpu" else devices[0].device_kind,
        "device_count": len(devices),
        "process_count": processes.count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file whole or not at all."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w") as file:
            file.write(json.dumps(value, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:  # a full disk names no file
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


# ---------------------------------------------------------------------------
# The problem: data on the devices, networks, programs.


@dataclass(frozen=True)
class Split:
    """Which images teacher and students see, and on which accuracy is measured."""

    teacher: np.ndarray
    student: np.ndarray
    eval_images: np.ndarray
    eval_labels: np.ndarray


def split(dataset: data.Dataset, settings: Settings) -> Split:
    """Chooses stratified, nested parts of the training set, the same in every run."""
    labels = dataset.train_labels
    train, held_out = np.arange(len(labels)), None
    if settings.held_out >= len(labels):
        raise UserError(
            f"--held-out {settings.held_out}: there are only {len(labels)} training "
            "images; lower it"
        )
    if settings.held_out:
        train, held_out = data.stratified_split(labels, settings.held_out, seed=0)

    def choose(indices, count, option):
        if count is None:
            return indices
        if count > len(indices):
            raise UserError(
                f"--{option} {count}: there are only {len(indices)} images; lower it"
            )
        return indices[data.balanced_subset(labels[indices], count, seed=0)]

    teacher = choose(train, settings.train_images, "train-images")
    student = choose(teacher, settings.student_images, "student-images")
    if held_out is not None:
        images, eval_labels = dataset.train_images[held_out], labels[held_out]
    else:
        images, eval_labels = dataset.test_images, dataset.test_labels
        if settings.test_images is not None and settings.test_images < len(eval_labels):
            chosen = data.balanced_subset(eval_labels, settings.test_images, seed=0)
            images, eval_labels = images[chosen], eval_labels[chosen]
    return Split(teacher, student, images, eval_labels)


@dataclass
class Problem:
    """Everything that the runs of one command share."""

    settings: Settings
    out: Path
    dataset: data.Dataset
    devices: list[jax.Device]
    parts: Split
    programs: dict[object, Callable] = field(default_factory=dict)
    shapes: tuple[methods.Shapes, methods.Shapes] | None = None
    chosen_layers: tuple[str, ...] = ()
    class_cost: np.ndarray | None = None

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.dataset.train_images.shape[-1]

    @property
    def memory(self) -> int:
        """Bytes of a device's memory; a CPU's is the machine's."""
        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"]
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @property
    def compared_images(self) -> int:
        """Images that a distance sees at once: the batch, or a group's share of it."""
        group = self.settings.distance_group or len(self.devices)
        return self.settings.batch_size // len(self.devices) * group

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set."""
        return len(self.dataset.class_names)

    @cached_property
    def streams(self) -> bool:
        """Whether the training images are too large to lie on every device."""
        limit = self.settings.stream_above
        limit = 1e6 * limit if limit is not None else self.memory / 4
        return processes.first(lambda: self.dataset.train_images.nbytes > limit)

    @cached_property
    def starts(self) -> dict[str, pretrained.Pretrained]:
        """What "teacher" and "student" start from, where a file is given."""
        given = self.settings
        width = given.teacher_width or given.width
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
    def resident(self) -> tuple[jax.Array, jax.Array]:
        """All training images (uint8) and labels, on every device."""
        pair = (self.dataset.train_images, self.dataset.train_labels)
        return train_step.replicate(pair, self.devices)

    @cached_property
    def views(self) -> views.Views | None:
        """Fixed views of the students' images, where asked for."""
        if self.settings.views is None:
            return None
        dataset = self.dataset
        return views.Views(
            *(self.settings, dataset.train_images, dataset.train_labels),
            indices=self.parts.student,
        )

    @cached_property
    def resident_views(self) -> tuple[jax.Array, jax.Array]:
        """All views (uint8) and labels, on every device."""
        return train_step.replicate(self.views.pair, self.devices)

    def dispatches(
        self, order: np.ndarray, length: int, *, of_views: bool = False
    ) -> Iterator[tuple]:
        """Images, labels and indices of an epoch's dispatches, ``length`` steps each.

        Streamed or resident, one program reads both: ``scan_steps`` looks its images
        up among those it is given, all or only its own.
        """
        if not len(order):
            return
        shares = processes.mine(self.devices)
        rows = stream.reads(order, length=length, shares=shares, of=len(self.devices))
        if of_views or not self.streams:
            resident = self.resident_views if of_views else self.resident
            for shares in rows:
                yield *resident, shares
            return
        own = np.arange(rows[0, 0].size, dtype=np.int32).reshape(rows[0, 0].shape)
        own = np.broadcast_to(own, rows[0].shape)  # [devices, length, b]
        dataset = self.dataset
        for pair in stream.stream(dataset.train_images, dataset.train_labels, rows):
            yield *pair, own

    @cached_property
    def augment(self) -> Callable:
        """The recipe's augmentation of one image."""
        return augment.make_augment(
            mean=self.dataset.mean,
            std=self.dataset.std,
            padding=self.settings.padding,
            flip=self.settings.flip,
            degrees=self.settings.degrees,
            shift=self.settings.shift,
            zoom=self.settings.zoom,
            dtype=jnp.dtype(self.settings.dtype),
        )

    @cached_property
    def data_digest(self) -> str | None:
        """Tells images apart that lie in a folder, whose name says nothing of them."""
        if self.settings.dataset in {*data.DATASETS} - {"folder"}:
            return None
        digest = hashlib.sha256(repr((self.dataset.mean, self.dataset.std)).encode())
        for labels in (self.dataset.train_labels, self.dataset.test_labels):
            digest.update(labels.tobytes())
        return digest.hexdigest()[:16]

    def normalize(self, key: None, image: jax.Array) -> jax.Array:
        """Of one image, nothing else."""
        del key
        return self.augment(None, image, train=False)

    def model(self, name: str, width: int) -> nn.Module:
        """A network whose BatchNorm sees the global batch."""
        return models.build(
            name,
            num_classes=self.num_classes,
            stem=self.settings.stem,
            width=width,
            dtype=jnp.dtype(self.settings.dtype),
            axis_name=train_step.AXIS,
        )

    def init(self, model: nn.Module, seed: int):
        """Fresh variables, on the host."""
        key = ("init", model)
        if key not in self.programs:  # tracing and compiling it takes seconds
            self.programs[key] = jax.jit(model.init)
        image = jnp.zeros((1, *self.dataset.train_images.shape[1:]))
        return jax.device_get(self.programs[key](jax.random.key(seed), image))


def prepare(settings: Settings, out: Path) -> Problem:
    """Loads the data and answers what can be wrong before anything runs."""
    if settings.compilation_cache is not None:
        cache = settings.compilation_cache
        jax.config.update("jax_compilation_cache_dir", str(cache))
    dataset = data.load(
        settings.dataset,
        data_dir=settings.data_dir,
        image_size=settings.image_size,
        skip_damaged=settings.skip_damaged,
        progress=None if settings.progress else lambda done, total: None,
    )
    devices = processes.choose_devices(settings.devices)
    count = len(devices)
    if settings.batch_size % count:
        raise UserError(
            f"--batch-size {settings.batch_size} does not divide among {count} "
            f"devices; choose a multiple of {count}"
        )
    if count % (settings.distance_group or count):
        raise UserError(
            f"--distance-group {settings.distance_group} does not divide the {count} "
            f"devices; choose a divisor of {count}"
        )
    problem = Problem(settings, out, dataset, devices, split(dataset, settings))
    for option, part in (("train", "teacher"), ("student", "student")):
        images = len(getattr(problem.parts, part))
        if images < settings.batch_size:
            raise UserError(
                f"--{option}-images {images} is less than one batch of "
                f"{settings.batch_size}; raise it or lower --batch-size"
            )
    if settings.views is not None:
        pixels = dataset.train_images[0].nbytes * len(problem.parts.student)
        if pixels * settings.views > problem.memory / 4:
            raise UserError(
                f"--views {settings.views}: {pixels * settings.views / 1e9:.1f} GB of "
                f"images, a quarter of the memory is {problem.memory / 4e9:.1f} GB; "
                "lower it, or leave it out"
            )
    return problem


def _check_schedule(problem, name):
    settings = problem.settings
    if settings.weight_schedule == "constant":
        return
    if name == FEATURE_ONLY or carries_weights(
        method_of(problem, name, weight_of(settings, name)).distance
    ):
        raise UserError(
            f"--weight-schedule {settings.weight_schedule}: {name} compares layers, "
            "whose weights are fixed; leave the schedule out, or compare the pooled "
            "features without a projector"
        )


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
        _check_schedule(problem, name)
        if name == FEATURE_ONLY and not settings.layers:
            methods.check_choice_of_layers(settings, *problem.shapes)
            continue  # its layers are chosen once there is a teacher
        method = method_of(problem, name, weight_of(settings, name))
        methods.check(name, method, *problem.shapes, problem.compared_images)


def method_of(problem: Problem, name: str, weight: float) -> methods.Method:
    """How the student of a name learns; alone, or with a teacher."""
    settings = problem.settings
    if name in ALONE:
        return methods.Method()
    if name == FEATURE_ONLY and not settings.layers:
        settings = replace(settings, layers=problem.chosen_layers)
    options = {}
    if methods.needs_class_cost(name):
        cost = problem.class_cost  # until there is a teacher, its shape alone matters
        k = problem.num_classes
        options["class_cost"] = np.zeros((k, k)) if cost is None else cost
    return methods.make(settings, name, weight, *problem.shapes, options)


# ---------------------------------------------------------------------------
# One run.


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Where a run lives."""
    return out / name.replace(":", ".") / f"seed{seed}"


@dataclass(frozen=True)
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
    """

    name: str
    seed: int
    weight: float
    epochs: int
    indices: np.ndarray
    identity: dict[str, object]
    start: pretrained.Pretrained | None = None

    def folder(self, out: Path) -> Path:
        """Where it lives."""
        return folder_of(out, self.name, self.seed)

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


def student_runs(problem: Problem, teacher_digest: str | None) -> Iterator[Run]:
    """Students alone, then distilled ones; those of one distance follow each other."""
    settings, start = problem.settings, problem.starts.get("student")
    for name in ("student", *settings.distances):
        fields, more = STUDENT_FIELDS, {}
        if name not in ALONE:
            fields = FEATURE_ONLY_FIELDS if name == FEATURE_ONLY else DISTILLED_FIELDS
            more = {"distance": name, "weight": weight_of(settings, name)}
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


def check_folder(run: Run, out: Path) -> None:
    """Refuses a folder whose run was made by other settings."""
    path = run.folder(out) / "run.json"
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable; choose another --out") from error
    for name, wanted in run.identity.items():
        if found.get(name, YOUNGER.get(name)) != wanted:
            raise UserError(
                f"{path.parent} was made with {name}={found.get(name)}, this command "
                f"says {wanted}; choose another --out, or delete that folder"
            )


def make_schedule(settings: Settings, steps_per_epoch: int, epochs: int):
    """The learning rate as a function of the step."""
    total = steps_per_epoch * epochs
    if settings.schedule == "constant":
        return optax.constant_schedule(settings.lr)
    if settings.schedule == "onecycle":  # torch's OneCycleLR, with its defaults
        return optax.cosine_onecycle_schedule(
            total, settings.lr, pct_start=0.3, div_factor=25.0, final_div_factor=1e4
        )
    if settings.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if settings.warmup else settings.lr,
            peak_value=settings.lr,
            warmup_steps=round(settings.warmup * total),
            decay_steps=total,
            end_value=settings.lr_end,
        )

    def per_epoch(step):
        share = (step // steps_per_epoch) / epochs
        fall = 0.5 * (1 + jnp.cos(jnp.pi * share))
        return settings.lr_end + (settings.lr - settings.lr_end) * fall

    return per_epoch


def make_weight_schedule(settings: Settings, steps: int):
    """The factor of lambda as a function of the step, None where it is constant."""
    if settings.weight_schedule == "warmup":
        return optax.linear_schedule(0.0, 1.0, transition_steps=max(1, steps // 2))
    if settings.weight_schedule == "decay":
        return optax.cosine_decay_schedule(1.0, decay_steps=steps)
    return None


def make_optimizer(settings: Settings, schedule) -> optax.GradientTransformation:
    """AdamW, or SGD as torch.optim has it: decay joins the gradient before momentum."""
    if settings.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=settings.weight_decay)
    sgd = optax.sgd(schedule, settings.momentum, settings.nesterov)
    if not settings.weight_decay:
        return sgd
    return optax.chain(optax.add_decayed_weights(settings.weight_decay), sgd)


def _steps_per_dispatch(settings, steps_per_epoch):
    """Largest divisor up to 50, so that one program serves; one step on a CPU."""
    fitting = 1 if jax.default_backend() == "cpu" else 50
    limit = settings.steps_per_dispatch or fitting
    return max(k for k in range(1, limit + 1) if steps_per_epoch % k == 0)


def epoch_order(run: Run, epoch: int, batch_size: int) -> np.ndarray:
    """Indices of an epoch's full batches, ``[steps, batch]``, from seed and epoch."""
    order = np.random.default_rng((run.seed, epoch)).permutation(run.indices)
    steps = len(order) // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def evaluate(problem: Problem, model: nn.Module, variables) -> float:
    """Accuracy on the evaluation images, in percent."""
    if model not in problem.programs:
        step = train_step.make_eval_step(
            resnet.linen_apply(model),
            normalize=lambda image: problem.normalize(None, image),
        )
        problem.programs[model] = train_step.parallel(
            step,
            in_axes=(None, 0, 0),
            devices=problem.devices,
            how=problem.settings.mapping,
        )
    images, labels = problem.parts.eval_images, problem.parts.eval_labels
    devices, mine = len(problem.devices), processes.mine(problem.devices)
    size = -(-min(EVAL_BATCH, len(labels)) // devices) * devices
    correct = 0
    for start in range(0, len(labels), size):
        if processes.count() == 1:  # several stop together, within an epoch
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
    return 100 * correct / len(labels)


def _on_views(problem, run):
    """Whether a run sees fixed views; the teacher itself never does."""
    return problem.views is not None and run.name != "teacher"


def _what_teaches(problem, run, method, teacher):
    """What the steps take of the teacher: nothing, its variables, or its outputs."""
    if run.name in ALONE:
        return None
    if not _on_views(problem, run):
        return teacher.variables
    named = methods.teacher_layers(method)
    key = ("outputs", named)
    if key not in problem.programs:
        outputs = problem.views.outputs(problem, teacher, named)
        problem.programs[key] = train_step.replicate(outputs, problem.devices)
    return problem.programs[key]


def _train_program(problem, run, method, model, teacher, tx, length):
    """The compiled steps; runs that differ in seed, or lambda alone, share it."""
    own_weights = run.weight if carries_weights(method.distance) else None
    key = (run.name, run.epochs, length, own_weights)
    if key not in problem.programs:
        distilled, of_views = run.name not in ALONE, _on_views(problem, run)
        teacher_apply = None
        if distilled:
            known = train_step.known_outputs
            teacher_apply = known if of_views else resnet.linen_apply(teacher.model)
        steps = run.epochs * (len(run.indices) // problem.settings.batch_size)
        weight_schedule = make_weight_schedule(problem.settings, steps)
        step = train_step.make_train_step(
            methods.apply_of(method, resnet.linen_apply(model)),
            teacher_apply,
            tx,
            augment=problem.normalize if of_views else problem.augment,
            distance=method.distance,
            head=method.head,
            weight_schedule=weight_schedule if distilled else None,
            group_size=problem.settings.distance_group,
            **method.options,
        )
        images = 0 if problem.streams and not of_views else None
        problem.programs[key] = train_step.parallel(
            train_step.scan_steps(step, known=distilled and of_views),
            in_axes=(None, None, images, images, 0),
            donate=(0,),
            devices=problem.devices,
            how=problem.settings.mapping,
        )
    return problem.programs[key]


def _epoch(problem, run, progress, program, fixed, length, report):
    """Takes the steps that are left of an epoch; gives images per second."""
    settings, epoch = problem.settings, len(progress.history)
    began = looked = time.monotonic()
    counted, waiting = 0, []
    speed = lambda: counted / max(time.monotonic() - began, 1e-6)

    def look(dispatches):
        for metrics in jax.device_get(dispatches):
            progress.take(metrics, stop=settings.on_nonfinite == "stop")
        if dispatches:
            report(
                run,
                epoch=epoch,
                done=progress.step,
                total=run.epochs * progress.steps,
                metrics=metrics,
                speed=speed(),
            )

    watch = processes.Watch()
    order = epoch_order(run, epoch, settings.batch_size)
    of_views = _on_views(problem, run)
    if of_views:
        order = problem.views.order(order, run.seed, epoch)
    order = order[progress.tally.steps :]
    for inputs in problem.dispatches(order, length, of_views=of_views):
        progress.state, metrics = program(progress.state, fixed, *inputs)
        counted += length * settings.batch_size
        waiting.append(metrics)
        if progress.first_step is None:  # compiling is no part of the speed
            jax.block_until_ready(metrics)
            progress.first_step = time.monotonic() - progress.began
            began, counted = time.monotonic(), 0
        if watch.looks(time.monotonic() - looked >= LOOK_SECONDS):
            look(waiting[:-1])  # not at the newest: the device never waits
            del waiting[:-1]
            looked = time.monotonic()
        asked, due = watch.agree(
            signals.asked(), progress.due(settings.checkpoint_seconds)
        )
        if asked or due:
            look(waiting)  # a checkpoint's state and tally are of one step
            waiting.clear()
            if asked:  # of another process, maybe
                signals.ask()
            signals.check()
            if progress.tally.steps < progress.steps:
                progress.save()
    look(waiting)
    return speed()


def train(
    problem: Problem,
    run: Run,
    model: nn.Module,
    teacher: "Teacher | None",
    report: Callable[..., None],
    observe: Callable[[int, object], None] = lambda epoch, variables: None,
) -> dict[str, object]:
    """Trains a run to its end, from its last checkpoint if there is one.

    Args:
      problem: data, devices, settings.
      run: what to train.
      model: the network.
      teacher: None for cross-entropy alone.
      report: called as ``report(run, epoch=, done=, total=, metrics=, speed=)``.
      observe: called with the number of epochs done, 0 before the first step, and the
        network's variables; not for a run that has ended before.

    Returns:
      The run's result, as in its ``result.json``.

    Raises:
      RunError: loss or gradient were not finite.
      Terminated: SIGTERM came; there is a checkpoint of the newest step.
      UserError: the folder's run was made by other settings.
      CheckpointError: checkpoints cannot be written, or all are damaged.
    """
    settings, folder = problem.settings, run.folder(problem.out)
    result_path = folder / "result.json"

    def begin():
        check_folder(run, problem.out)
        if result_path.exists():
            return json.loads(result_path.read_text())
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", run.identity)
        return None

    if finished := processes.first(begin):
        return finished

    # --- state: fresh, or that of the last checkpoint --------------------------
    steps = len(run.indices) // settings.batch_size
    schedule = make_schedule(settings, steps, run.epochs)
    tx = make_optimizer(settings, schedule)
    variables = (
        run.start.variables_of(run.seed) if run.start else problem.init(model, run.seed)
    )
    method = method_of(problem, run.name, run.weight)
    if method.projectors:
        key = jax.random.fold_in(jax.random.key(run.seed), 1)
        variables = methods.with_projectors(method, variables, key, problem.shapes[0])
    state = train_step.create_state(variables, tx, seed=run.seed, weight=run.weight)
    about = {
        "run": run.identity,
        "num_classes": problem.num_classes,
        "channels": problem.channels,
    }
    title = f"{run.name} seed {run.seed}"
    progress = Progress(title, folder / "checkpoints", about, steps, state)
    progress.state = train_step.replicate(progress.state, problem.devices)

    # --- epochs ------------------------------------------------------------------
    # From a checkpoint within an epoch on, dispatches must end with it, too.
    length = _steps_per_dispatch(settings, math.gcd(steps, progress.tally.steps))
    program = _train_program(problem, run, method, model, teacher, tx, length)
    fixed, speeds = _what_teaches(problem, run, method, teacher), []
    with progress.running():
        if progress.step == 0:
            observe(0, without_projectors(progress.state.variables))
        for epoch in range(len(progress.history), run.epochs):
            speed = _epoch(problem, run, progress, program, fixed, length, report)
            speeds += [speed] if speed else []  # none of the step that compiles
            record = {
                "epoch": epoch + 1,
                "lr": float(schedule(epoch * steps)),
                **progress.means(),
                "skipped": progress.tally.skipped,
            }
            final = epoch + 1 == run.epochs
            deployed = without_projectors(progress.state.variables)
            observe(epoch + 1, deployed)  # before a checkpoint says that it is over
            if final or (epoch + 1) % settings.eval_every == 0:
                record["test_accuracy"] = evaluate(problem, model, deployed)
            progress.end_epoch(record)
            report(
                run,
                epoch=epoch,
                done=progress.step,
                total=run.epochs * steps,
                metrics=record,
                speed=speed,
            )
            due = final or progress.due(settings.checkpoint_seconds)
            if processes.first(lambda due=due: due):
                progress.save()

    # --- result ------------------------------------------------------------------
    history = progress.history
    evaluated = [r for r in history if "test_accuracy" in r]
    best = max(evaluated, key=lambda r: r["test_accuracy"])
    result = {
        "name": run.name,
        "title": run.title,
        "seed": run.seed,
        "weight": run.weight,
        "accuracy": evaluated[-1]["test_accuracy"],
        "best_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "settings": run.identity,
        "history": history,
        "timing": {
            "seconds": progress.seconds,
            "seconds_to_first_step": progress.first_step,
            "images_per_second": float(np.median(speeds)) if speeds else None,
        },
        "environment": environment(problem.devices),
    }
    processes.first(lambda: write_json(result_path, result))
    return result
