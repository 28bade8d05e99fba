"""Runs: a teacher, students alone, distilled students; each resumes where it stopped.

A run is a folder ``<out>/<name>/seed<k>`` with ``run.json`` (what decides its result),
``checkpoints/`` and, once finished, ``result.json``.  A command that would give another
result in an existing folder is refused before anything starts.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import methods
import models
import numpy as np
import optimizers
import pretrained
import problems
import processes
import records
import signals
from flax import linen as nn
from problems import Problem
from progress import Progress
from settings import FEATURE_ONLY, UserError, as_json, weight_of

from kddm_jax import resnet, train_step
from kddm_jax.losses import carries_weights
from kddm_jax.projectors import without_projectors

if TYPE_CHECKING:
    from teacher import Teacher

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
        weight_schedule = optimizers.make_weight_schedule(problem.settings, steps)
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
        records.write_json(folder / "run.json", run.identity)
        return None

    if finished := processes.first(begin):
        return finished

    # --- state: fresh, or that of the last checkpoint --------------------------
    steps = len(run.indices) // settings.batch_size
    schedule = optimizers.make_schedule(settings, steps, run.epochs)
    tx = optimizers.make_optimizer(settings, schedule)
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
                record["test_accuracy"] = problems.evaluate(problem, model, deployed)
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
        "environment": records.environment(problem.devices),
    }
    processes.first(lambda: records.write_json(result_path, result))
    return result
