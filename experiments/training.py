"""Trains a run, from its newest checkpoint if there is one.

``runs.py`` defines a run, ``progress.py`` the contents of a checkpoint.
"""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import methods
import numpy as np
import optimizers
import problems
import processes
import records
import signals
from flax import linen as nn
from problems import Problem
from progress import Progress
from runs import ALONE, Run, check_folder, epoch_order, method_of
from settings import UserError

from kddm_jax import resnet, train_step
from kddm_jax.projectors import without_projectors

if TYPE_CHECKING:
    from teacher import Teacher

LOOK_SECONDS = 0.1  # between looks at the steps: at each, they cost a small step 10 %


def most_steps_per_dispatch() -> int:
    """One on a CPU, whose loops are slow (`train_step.scan_steps`)."""
    return 1 if jax.default_backend() == "cpu" else 50


def _steps_per_dispatch(steps):
    """The largest divisor of an epoch's steps that is allowed: one program serves."""
    most = most_steps_per_dispatch()
    return max(k for k in range(1, most + 1) if steps % k == 0)


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


def _teacher_data(problem, run):
    """What the run's distance takes that is computed from the teacher."""
    if run.name in ALONE or not methods.needs_class_cost(run.name):
        return {}
    if problem.class_cost is None:
        raise UserError(
            f"{run.name} needs the price between classes, which this command does not "
            "compute; leave it out"
        )
    cost = np.asarray(problem.class_cost, np.float32)
    return train_step.replicate({"class_cost": cost}, problem.devices)


def _train_program(problem, run, method, model, teacher, tx, length):
    """The compiled steps; runs that differ in seed, or lambda alone, share it."""
    key = (run.name, run.epochs, length)
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
            in_axes=(None, None, images, images, 0, None),
            donate=(0,),
            devices=problem.devices,
        )
    return problem.programs[key]


def _epoch(problem, run, progress, program, fixed, length, report):
    """Takes the steps that are left of an epoch; gives images per second."""
    settings, epoch = problem.settings, progress.epoch
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

    taught, computed = fixed
    watch = processes.Watch()
    order = epoch_order(run, epoch, settings.batch_size)
    of_views = _on_views(problem, run)
    if of_views:
        order = problem.views.order(order, run.seed, epoch)
    order = order[progress.taken :]
    for inputs in problem.dispatches(order, length, of_views=of_views):
        progress.state, metrics = program(progress.state, taught, *inputs, computed)
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
            if progress.taken < progress.steps:
                progress.save()
    look(waiting)
    return speed()


def _begin(problem, run):
    """The result of a run that has ended; else None, and it has its folder."""

    def begin():
        check_folder(run, problem.out)
        folder = run.folder(problem.out)
        if (folder / "result.json").exists():
            cure = f"delete it, and {folder} is finished again"
            return records.read_json(folder / "result.json", cure)
        folder.mkdir(parents=True, exist_ok=True)
        records.write_json(folder / "run.json", run.identity)
        return None

    return processes.first(begin)


def _fresh(problem, run, model, method, tx):
    """The state in which a run begins."""
    variables = (
        run.start.variables_of(run.seed) if run.start else problem.init(model, run.seed)
    )
    if method.projectors:
        key = jax.random.fold_in(jax.random.key(run.seed), 1)
        variables = methods.with_projectors(method, variables, key, problem.shapes[0])
    return train_step.create_state(variables, tx, seed=run.seed, weight=run.weight)


def _about(problem, run):
    """What a checkpoint says of its run."""
    return {
        "run": run.identity,
        "num_classes": problem.num_classes,
        "channels": problem.channels,
    }


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
    if finished := _begin(problem, run):
        return finished
    settings = problem.settings

    # --- state: fresh, or that of the last checkpoint --------------------------
    steps = len(run.indices) // settings.batch_size
    schedule = optimizers.make_schedule(settings, steps, run.epochs)
    tx = optimizers.make_optimizer(settings, schedule)
    method = method_of(problem, run.name)
    folder = run.folder(problem.out) / "checkpoints"
    state = _fresh(problem, run, model, method, tx)
    progress = Progress(run.label, folder, _about(problem, run), steps, state)
    progress.state = train_step.replicate(progress.state, problem.devices)

    # --- epochs ------------------------------------------------------------------
    # From a checkpoint within an epoch on, dispatches must end with it, too.
    length = _steps_per_dispatch(math.gcd(steps, progress.taken))
    program = _train_program(problem, run, method, model, teacher, tx, length)
    taught = _what_teaches(problem, run, method, teacher)
    fixed, speeds = (taught, _teacher_data(problem, run)), []
    with progress.running():
        if progress.step == 0:
            observe(0, without_projectors(progress.state.variables))
        for epoch in range(progress.epoch, run.epochs):
            speed = _epoch(problem, run, progress, program, fixed, length, report)
            speeds += [speed] if speed else []  # none of the step that compiles
            final = epoch + 1 == run.epochs
            deployed = without_projectors(progress.state.variables)
            observe(epoch + 1, deployed)  # before a checkpoint says that it is over
            record = {
                "epoch": epoch + 1,
                "lr": float(schedule(epoch * steps)),
                **progress.means(),
                "skipped": progress.tally.skipped,
            }
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

    timing = {
        "seconds": progress.seconds,
        "seconds_to_first_step": progress.first_step,
        "images_per_second": float(np.median(speeds)) if speeds else None,
    }
    return _result(problem, run, progress.history, timing)


def _result(problem, run, history, timing):
    """Writes and returns the result of a run that has ended."""
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
        "timing": timing,
        "environment": records.environment(problem.devices),
    }
    path = run.folder(problem.out) / "result.json"
    processes.first(lambda: records.write_json(path, result))
    return result
