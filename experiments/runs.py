"""Runs: a teacher, students alone, distilled students; each resumes where it stopped.

A run is a folder ``<out>/<name>/seed<k>`` with ``run.json`` (what decides its result),
``checkpoints/`` and, once finished, ``result.json``.  A command that would give another
result in an existing folder is refused before anything starts.
"""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from settings import Settings, UserError, as_json, weight_of

from kddm_jax import DISTANCES, augment, checkpoint, data, resnet, train_step

EVAL_BATCH = 500
# What decides a teacher's result, and a student's beside the teacher itself.
SHARED_FIELDS = (
    *("dataset", "image_size"),
    *("train_images", "test_images", "held_out", "eval_every"),
    *("stem", "dtype", "padding", "flip", "batch_size"),
    *("lr", "lr_end", "schedule", "warmup", "momentum", "nesterov", "weight_decay"),
)
TEACHER_FIELDS = (*SHARED_FIELDS, "teacher_model", "teacher_epochs")
STUDENT_FIELDS = (
    *SHARED_FIELDS,
    *("student_model", "width", "epochs", "student_images", "scale"),
)


class RunError(Exception):
    """A run had to stop; one line says where and what to continue from."""


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
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


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

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set."""
        return len(self.dataset.class_names)

    @cached_property
    def resident(self) -> tuple[jax.Array, jax.Array]:
        """All training images (uint8) and labels, on every device."""
        pair = (self.dataset.train_images, self.dataset.train_labels)
        return train_step.replicate(pair, self.devices)

    @cached_property
    def augment(self) -> Callable:
        """The recipe's augmentation of one image."""
        return augment.make_augment(
            mean=self.dataset.mean,
            std=self.dataset.std,
            padding=self.settings.padding,
            flip=self.settings.flip,
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

    def model(self, name: str, width: int) -> resnet.ResNet:
        """A network whose BatchNorm sees the global batch."""
        return getattr(resnet, name)(
            num_classes=self.num_classes,
            stem=self.settings.stem,
            width=width,
            dtype=jnp.dtype(self.settings.dtype),
            axis_name=train_step.AXIS,
        )

    def init(self, model: resnet.ResNet, seed: int):
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
    available = jax.local_devices()
    count = settings.devices or len(available)
    if count > len(available):
        raise UserError(
            f"--devices {count}: this machine has {len(available)}; lower it"
        )
    if settings.batch_size % count:
        raise UserError(
            f"--batch-size {settings.batch_size} does not divide among {count} "
            f"devices; choose a multiple of {count}"
        )
    problem = Problem(
        settings, out, dataset, available[:count], split(dataset, settings)
    )
    for option, part in (("train", "teacher"), ("student", "student")):
        images = len(getattr(problem.parts, part))
        if images < settings.batch_size:
            raise UserError(
                f"--{option}-images {images} is less than one batch of "
                f"{settings.batch_size}; raise it or lower --batch-size"
            )
    return problem


def check_distances(problem: Problem, teacher_width: int) -> None:
    """Traces every distance on the shapes to come: its errors, before any training."""
    n, k = problem.settings.batch_size, problem.num_classes
    of = jax.ShapeDtypeStruct
    width = 8 * problem.settings.width
    shapes = {
        "features": [
            of((n, width), jnp.float32),
            of((n, 8 * teacher_width), jnp.float32),
        ],
        "logits": [of((n, k), jnp.float32)] * 2,
        "labels": [of((n,), jnp.int32)],
        "key": [jax.eval_shape(lambda: jax.random.key(0))],
    }
    for name in problem.settings.distances:
        row = DISTANCES[name]
        if not set(row.inputs) <= set(shapes):
            continue  # maps: their shapes are the networks' affair
        arrays = [array for kind in row.inputs for array in shapes[kind]]
        try:
            jax.eval_shape(lambda *a, row=row: row.fn(*a, **row.options), *arrays)
        except ValueError as error:
            raise UserError(f"distance {name}: {error}") from error


# ---------------------------------------------------------------------------
# One run.


@dataclass(frozen=True)
class Run:
    """A network to train and how.

    Attributes:
      name: "teacher", "student" or a key of the catalogue.
      seed: of initialisation, order and augmentation.
      weight: lambda.
      epochs: to train.
      indices: of the training images it sees.
      identity: what decides its result, as JSON values.
    """

    name: str
    seed: int
    weight: float
    epochs: int
    indices: np.ndarray
    identity: dict[str, object]

    def folder(self, out: Path) -> Path:
        """Where it lives."""
        return out / self.name / f"seed{self.seed}"

    @property
    def title(self) -> str:
        """Its name in tables."""
        return DISTANCES[self.name].title if self.name in DISTANCES else self.name


def _identity(problem, names, **more):
    values = as_json(problem.settings)
    chosen = {name: values[name] for name in names}
    return {**chosen, "data": problem.data_digest, **more}


def teacher_run(problem: Problem) -> Run:
    """The teacher's run."""
    settings = problem.settings
    return Run(
        name="teacher",
        seed=0,
        weight=0.0,
        epochs=settings.teacher_epochs,
        indices=problem.parts.teacher,
        identity=_identity(
            problem, TEACHER_FIELDS, width=settings.teacher_width or settings.width
        ),
    )


def student_runs(problem: Problem, teacher_digest: str | None) -> Iterator[Run]:
    """Students alone, then distilled ones; those of one distance follow each other."""
    settings = problem.settings
    for name in ("student", *settings.distances):
        distilled = name != "student"
        more = {}
        if distilled:
            more = {"distance": name, "weight": weight_of(settings, name)}
            if teacher_digest is not None:
                more["teacher"] = teacher_digest
        for seed in settings.seeds:
            yield Run(
                name=name,
                seed=seed,
                weight=more.get("weight", 0.0),
                epochs=settings.epochs,
                indices=problem.parts.student,
                identity=_identity(problem, STUDENT_FIELDS, seed=seed, **more),
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
        if found.get(name) != wanted:
            raise UserError(
                f"{path.parent} was made with {name}={found.get(name)}, this command "
                f"says {wanted}; choose another --out, or delete that folder"
            )


def make_schedule(settings: Settings, steps_per_epoch: int, epochs: int):
    """The learning rate as a function of the step."""
    total = steps_per_epoch * epochs
    if settings.schedule == "constant":
        return optax.constant_schedule(settings.lr)
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


def make_optimizer(settings: Settings, schedule) -> optax.GradientTransformation:
    """SGD as torch.optim.SGD has it: the decay joins the gradient before momentum."""
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


def evaluate(problem: Problem, model: resnet.ResNet, variables) -> float:
    """Accuracy on the evaluation images, in percent."""
    if model not in problem.programs:
        step = train_step.make_eval_step(
            resnet.linen_apply(model),
            normalize=lambda image: problem.augment(None, image, train=False),
        )
        problem.programs[model] = train_step.parallel(
            step, in_axes=(None, 0, 0), devices=problem.devices
        )
    images, labels = problem.parts.eval_images, problem.parts.eval_labels
    devices = len(problem.devices)
    size = -(-min(EVAL_BATCH, len(labels)) // devices) * devices
    correct = 0
    for start in range(0, len(labels), size):
        x, y = images[start : start + size], labels[start : start + size]
        short = size - len(y)
        x = np.pad(x, ((0, short), (0, 0), (0, 0), (0, 0)))
        y = np.pad(y, (0, short), constant_values=-1)
        counts = problem.programs[model](variables, *train_step.shard((x, y), devices))
        correct += int(counts["correct"])
    return 100 * correct / len(labels)


def _train_program(problem, run, model, teacher, tx, length):
    """The compiled steps; runs that differ in seed or lambda share it."""
    key = (run.name, run.epochs, length)
    if key not in problem.programs:
        distilled = run.name in DISTANCES
        step = train_step.make_train_step(
            resnet.linen_apply(model),
            resnet.linen_apply(teacher.model) if distilled else None,
            tx,
            augment=problem.augment,
            distance=run.name if distilled else (),
            **({"scale": problem.settings.scale} if distilled else {}),
        )
        problem.programs[key] = train_step.parallel(
            train_step.scan_steps(step),
            in_axes=(None, None, None, None, 0),
            donate=(0,),
            devices=problem.devices,
        )
    return problem.programs[key]


def train(
    problem: Problem,
    run: Run,
    model: resnet.ResNet,
    teacher: "Teacher | None",
    report: Callable[..., None],
) -> dict[str, object]:
    """Trains a run to its end, from its last checkpoint if there is one.

    Args:
      problem: data, devices, settings.
      run: what to train.
      model: the network.
      teacher: None for cross-entropy alone.
      report: called as ``report(run, epoch=, done=, total=, metrics=, speed=)``.

    Returns:
      The run's result, as in its ``result.json``.

    Raises:
      RunError: loss or gradient were not finite.
      UserError: the folder's run was made by other settings.
      CheckpointError: checkpoints cannot be written, or all are damaged.
    """
    settings, folder = problem.settings, run.folder(problem.out)
    check_folder(run, problem.out)
    result_path = folder / "result.json"
    if result_path.exists():
        return json.loads(result_path.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", run.identity)

    # --- state: fresh, or that of the last checkpoint --------------------------
    steps = len(run.indices) // settings.batch_size
    schedule = make_schedule(settings, steps, run.epochs)
    tx = make_optimizer(settings, schedule)
    state = train_step.create_state(
        problem.init(model, run.seed), tx, seed=run.seed, weight=run.weight
    )
    history, seconds, last = [], 0.0, checkpoint.latest(folder / "checkpoints")
    if last is not None:
        state, meta = checkpoint.restore(last, state)
        history, seconds = meta["history"], meta["seconds"]
    state = train_step.replicate(state, problem.devices)

    # --- epochs ------------------------------------------------------------------
    length = _steps_per_dispatch(settings, steps)
    program = _train_program(problem, run, model, teacher, tx, length)
    fixed = teacher.variables if run.name in DISTANCES else None
    began = saved = time.monotonic()
    first_step = None
    for epoch in range(len(history), run.epochs):
        order = epoch_order(run, epoch, settings.batch_size)
        collected, epoch_began, counted = [], time.monotonic(), 0
        for start in range(0, steps, length):
            rows = order[start : start + length]  # [length, batch]
            shares = rows.reshape(length, len(problem.devices), -1).swapaxes(0, 1)
            state, metrics = program(state, fixed, *problem.resident, shares)
            collected.append(metrics)
            counted += rows.size
            if first_step is None:  # compiling is no part of the speed
                jax.block_until_ready(metrics)
                first_step = time.monotonic() - began
                epoch_began, counted = time.monotonic(), 0
            if len(collected) > 1:  # look one dispatch back: the device never waits
                report(
                    run,
                    epoch=epoch,
                    done=epoch * steps + start,
                    total=run.epochs * steps,
                    metrics=collected[-2],
                    speed=counted / max(time.monotonic() - epoch_began, 1e-6),
                )
        means = _epoch_means(jax.device_get(collected), run, epoch, steps, last)
        speed = counted / max(time.monotonic() - epoch_began, 1e-6)
        record = {
            "epoch": epoch + 1,
            "lr": float(schedule(epoch * steps)),
            **means,
        }
        final = epoch + 1 == run.epochs
        if final or (epoch + 1) % settings.eval_every == 0:
            record["test_accuracy"] = evaluate(problem, model, state.variables)
        history.append(record)
        report(
            run,
            epoch=epoch,
            done=(epoch + 1) * steps,
            total=run.epochs * steps,
            metrics=record,
            speed=speed,
        )
        now = time.monotonic()
        if final or now - saved >= settings.checkpoint_seconds:
            spent = seconds + now - began
            meta = {
                "run": run.identity,
                "history": history,
                "seconds": spent,
                "num_classes": problem.num_classes,
                "channels": problem.dataset.train_images.shape[-1],
            }
            last = checkpoint.save(folder / "checkpoints", epoch + 1, state, meta)
            saved = now

    # --- result ------------------------------------------------------------------
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
            "seconds": seconds + time.monotonic() - began,
            "seconds_to_first_step": first_step,
        },
        "environment": environment(problem.devices),
    }
    write_json(result_path, result)
    return result


def _epoch_means(collected, run, epoch, steps, last):
    """Means over an epoch's steps; stops at the first non-finite one."""
    columns = {
        name: np.concatenate([np.atleast_1d(m[name]) for m in collected])
        for name in collected[0]
    }
    bad = np.flatnonzero(~columns.pop("finite").astype(bool))
    if bad.size:
        at = {name: float(column[bad[0]]) for name, column in columns.items()}
        kept = f"last checkpoint: {last}" if last else "no checkpoint yet"
        raise RunError(
            f"{run.name} seed {run.seed}: loss or gradient not finite at step "
            f"{epoch * steps + bad[0] + 1} ({at}); lower --lr or the weight; {kept}"
        )
    return {name: float(np.mean(column)) for name, column in columns.items()}


# ---------------------------------------------------------------------------
# The teacher.


@dataclass(frozen=True)
class Teacher:
    """A trained network that students follow.

    Attributes:
      model: the network.
      width: its width.
      variables: on the devices.
      digest: of its arrays: students of another teacher are other runs.
      accuracy: on the evaluation images, in percent.
      result: of its run, None for a given checkpoint.
    """

    model: resnet.ResNet
    width: int
    variables: object
    digest: str
    accuracy: float
    result: dict[str, object] | None


def _variables_of(problem, path, model):
    """Parameters and statistics of a run's checkpoint, whatever its optimiser."""
    arrays, meta = checkpoint.restore_arrays(path)
    like = problem.init(model, 0)
    found = {k: arrays.get(k, {}) for k in ("params", "batch_stats")}
    return checkpoint.match(path, found, like), meta


def _digest(variables):
    digest = hashlib.sha256()
    for key, leaf in jax.tree_util.tree_leaves_with_path(variables):
        digest.update(jax.tree_util.keystr(key).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def find_checkpoint(path: Path) -> Path:
    """A checkpoint, from its own folder, a run's, or one of checkpoints."""
    if (path / "meta.json").exists():
        return path
    for folder in (path / "checkpoints", path):
        found = checkpoint.latest(folder)
        if found is not None:
            return found
    raise UserError(
        f"no checkpoint in {path}; pass a run's folder (such as "
        "runs/digits-laptop/teacher/seed0), or leave --teacher out to train one"
    )


def teacher_shape(problem: Problem) -> tuple[str, int, Path | None]:
    """Architecture and width of the teacher, and its checkpoint if one is given."""
    settings = problem.settings
    if settings.teacher is None:
        return settings.teacher_model, settings.teacher_width or settings.width, None
    path = find_checkpoint(settings.teacher)
    checkpoint.verify(path)
    made = checkpoint.read_meta(path).get("run", {})
    if made.get("dataset") != settings.dataset:
        raise UserError(
            f"--teacher {path} was trained on {made.get('dataset')}, "
            f"this run is on {settings.dataset}; pass a teacher of the same data"
        )
    if settings.held_out and made.get("held_out") != settings.held_out:
        raise UserError(
            f"--held-out {settings.held_out}: --teacher {path} was trained with "
            f"held_out={made.get('held_out')} and may have seen these images; "
            "train one with the same --held-out"
        )
    if made.get("stem") != settings.stem:
        raise UserError(
            f"--teacher {path} has the {made.get('stem')} stem; pass "
            f"--stem {made.get('stem')}"
        )
    model = made.get("teacher_model") or made.get("student_model")
    return model, made["width"], path


def known_digest(problem: Problem) -> str:
    """Digest of the teacher to come, where it is trained already."""
    name, width, path = teacher_shape(problem)
    if path is None:
        folder = teacher_run(problem).folder(problem.out)
        if not (folder / "result.json").exists():
            return "not trained yet"
        path = find_checkpoint(folder)
    variables, _ = _variables_of(problem, path, problem.model(name, width))
    return _digest(variables)


def load_teacher(problem: Problem, report) -> Teacher:
    """Trains the teacher, or takes the checkpoint that was given."""
    name, width, path = teacher_shape(problem)
    model, result = problem.model(name, width), None
    if path is None:
        run = teacher_run(problem)
        result = train(problem, run, model, None, report)
        path = find_checkpoint(run.folder(problem.out))
    variables, _ = _variables_of(problem, path, model)
    replicated = train_step.replicate(variables, problem.devices)
    accuracy = evaluate(problem, model, replicated)
    return Teacher(model, width, replicated, _digest(variables), accuracy, result)
