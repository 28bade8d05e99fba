"""Trains a run, from its newest checkpoint if there is one.

`runs.py` defines a run, and `progress.py` the contents of a checkpoint.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from kddm_jax import train_step
from kddm_jax.experiment.machine import processes, records, signals
from kddm_jax.experiment.machine.profile import profiling
from kddm_jax.experiment.settings import ALONE
from kddm_jax.experiment.training import methods, models, optimizers, placebos, problems
from kddm_jax.experiment.training.problems import Problem
from kddm_jax.experiment.training.progress import Progress
from kddm_jax.experiment.training.runs import Run, check_folder, epoch_order, method_of
from kddm_jax.networks.projectors import without_projectors
from kddm_jax.numerics.mixing import make_mix

LOOK_SECONDS = 0.1  # between reads of metrics; a read at each small step costs 10 %


@dataclass(frozen=True)
class Teacher:
    """Contains a trained teacher, or what a file says about one.

    Attributes:
      model: the network; None if there is only a file made from it.
      width: width of the network.
      variables: variables of the network, on the devices; None like the network.
      digest: digest of the variables; students of another teacher are other runs.
      accuracy: accuracy on the evaluation images, in percent.
      result: the result of the teacher's run; None for a given checkpoint.
      name: name of the network in tables.
      top5: top-5 accuracy, in percent; None if there are few classes.
    """

    model: models.Network | None
    width: int
    variables: object
    digest: str
    accuracy: float
    result: dict[str, Any] | None
    name: str = ""
    top5: float | None = None


def most_steps_per_dispatch() -> int:
    """Returns 1 on a CPU, whose loops are slow (`train_step.scan_steps`), else 50."""
    return 1 if jax.default_backend() == "cpu" else 50


def _steps_per_dispatch(steps):
    """Returns the largest allowed divisor of ``steps``, to need only one program."""
    most = most_steps_per_dispatch()
    return max(k for k in range(1, most + 1) if steps % k == 0)


def _on_views(problem, run):
    """Returns whether a run uses fixed views; the teacher's run never does."""
    return problem.views is not None and run.name != "teacher"


def _what_teaches(problem, run, method, teacher):
    """Returns the steps' argument for the teacher: None, variables, or outputs."""
    if run.name in ALONE or problem.statistics is not None:
        return None
    if not _on_views(problem, run):
        return teacher.variables
    named, placebo = methods.teacher_layers(method), run.settings.method.placebo
    share = run.settings.method.placebo_share
    key = ("outputs", named, placebo, share)
    if key not in problem.programs:
        if problem.outputs is not None:
            outputs = problem.outputs.of(named)
        else:
            outputs = problem.views.outputs(problem, teacher, named)
        if placebo is not None:
            labels = problem.dataset.train_labels[problem.seen]  # also of unlabelled
            views = problem.views.count
            outputs = placebos.replace(placebo, outputs, labels, views, share)
        problem.programs[key] = train_step.replicate(outputs, problem.devices)
    return problem.programs[key]


def teacher_data(problem: Problem, run: Run) -> dict[str, Any]:
    """Returns the teacher's arrays that a run's distance needs."""
    if run.name in ALONE:
        return {}
    if problem.statistics is not None:
        bank = {methods.BANK: problem.statistics.bank}
        return train_step.replicate(bank, problem.devices)
    found = {}
    for name in methods.needed_arrays(run.name):
        if name not in problem.of_teacher:
            raise RuntimeError(
                f"{run.name} needs the teacher's {name}; open the study by study.open"
            )
        found[name] = np.asarray(problem.of_teacher[name], np.float32)
    return train_step.replicate(found, problem.devices) if found else {}


def _train_program(problem, run, method, model, teacher, tx, length):
    """Compiles the steps; runs that differ only in seed or lambda share the program.

    The lambdas of a sum of distances are constants of the program.
    """
    settings = run.settings
    key = (run.name, run.epochs, length, repr(settings.optimizer), repr(run.weights))
    key += (repr(replace(settings.method, distances=(), weight=None, weights=None)),)
    if key not in problem.programs:
        distilled, of_views = run.name not in ALONE, _on_views(problem, run)
        taught = distilled and problem.statistics is None
        predicted = settings.method.predicted_labels
        teacher_apply = None
        if taught:
            known = train_step.known_outputs
            teacher_apply = known if of_views else models.network_apply(teacher.model)
        steps = run.epochs * (len(run.indices) // settings.optimizer.batch_size)
        weight_schedule = optimizers.make_weight_schedule(settings.method, steps)
        step = train_step.make_train_step(
            methods.apply_of(method, models.network_apply(model)),
            teacher_apply,
            tx,
            augment=problem.normalize if of_views else problem.augment,
            mix=make_mix(
                num_classes=problem.num_classes,
                label_smoothing=settings.optimizer.label_smoothing,
                mixup_alpha=settings.optimizer.mixup,
            ),
            distance=method.distance,
            head=method.head,
            weight_schedule=weight_schedule if distilled else None,
            group_size=settings.method.distance_group,
            predicted_labels=taught and bool(len(run.unlabelled)) and predicted,
            **method.options,
        )
        images = 0 if problem.streams and not of_views else None
        problem.programs[key] = train_step.parallel(
            train_step.scan_steps(step, known=taught and of_views),
            in_axes=(None, None, images, images, 0, None),
            donate=(0,),
            devices=problem.devices,
        )
    return problem.programs[key]


def _epoch(problem, run, progress, program, fixed, length, report):
    """Takes the remaining steps of an epoch and returns the images per second."""
    settings, epoch = run.settings, progress.epoch
    began = looked = time.monotonic()
    counted, waiting = 0, []
    speed = lambda: counted / max(time.monotonic() - began, 1e-6)

    def look(dispatches):
        for metrics in jax.device_get(dispatches):
            progress.take(metrics, stop=settings.run.on_nonfinite == "stop")
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
    order = epoch_order(run, epoch, settings.optimizer.batch_size)
    of_views = _on_views(problem, run)
    if of_views:
        order = problem.views.order(order, run.seed, epoch)
    order, of_students = order[progress.taken :], run.name != "teacher"
    for inputs in problem.dispatches(
        order, length, of_views=of_views, of_students=of_students
    ):
        progress.state, metrics = program(progress.state, taught, *inputs, computed)
        counted += length * order.shape[1]
        waiting.append(metrics)
        if progress.first_step is None:  # the speed does not include compilation
            jax.block_until_ready(metrics)
            progress.first_step = time.monotonic() - progress.began
            began, counted = time.monotonic(), 0
        if watch.looks(time.monotonic() - looked >= LOOK_SECONDS):
            look(waiting[:-1])  # without the newest, so that the device never waits
            del waiting[:-1]
            looked = time.monotonic()
        asked, due = watch.agree(
            signals.asked(), progress.due(settings.run.checkpoint_seconds)
        )
        if asked or due:
            look(waiting)  # state and tally of a checkpoint must be of the same step
            waiting.clear()
            if asked:  # another process may have had the signal
                signals.ask()
            signals.check()
            if progress.taken < progress.steps:
                progress.save()
    look(waiting)
    return speed()


def _begin(problem, run):
    """Returns the result of a finished run, or makes the folder and returns None."""

    def begin():
        check_folder(run, problem.out)
        folder = run.folder(problem.out)
        if (folder / "result.json").exists():
            fix = f"delete it, and {folder} is finished again"
            return records.read_json(folder / "result.json", fix)
        folder.mkdir(parents=True, exist_ok=True)
        records.write_json(folder / "run.json", run.identity)
        return None

    return processes.first(begin)


def _fresh(problem, run, model, method, tx):
    """Makes the initial state of a run."""
    variables = (
        run.start.variables_of(run.seed) if run.start else problem.init(model, run.seed)
    )
    if method.projectors:
        key = jax.random.fold_in(jax.random.key(run.seed), 1)
        variables = methods.with_projectors(method, variables, key, problem.shapes[0])
    return train_step.create_state(variables, tx, seed=run.seed, weight=run.weight)


def _about(problem, run):
    """Returns the metadata of a run's checkpoints."""
    return {
        "run": run.identity,
        "num_classes": problem.num_classes,
        "channels": problem.channels,
        "mean": problem.dataset.mean,
        "std": problem.dataset.std,
    }


def _end_epoch(problem, run, model, variables, progress, lr, final):
    """Ends an epoch, with an evaluation if one is due, and returns its record."""
    epoch = progress.epoch + 1
    record = {
        "epoch": epoch,
        "lr": lr,
        **progress.means(),
        "skipped": progress.tally.skipped,
    }
    if final or epoch % run.settings.optimizer.eval_every == 0:
        measured = problems.evaluate(problem, model, variables)
        record |= {f"test_{name}": value for name, value in measured.items()}
    progress.end_epoch(record)
    return record


def train(
    problem: Problem,
    run: Run,
    model: models.Network,
    teacher: Teacher | None,
    report: Callable[..., None],
    observe: Callable[[int, object], None] = lambda epoch, variables: None,
) -> dict[str, Any]:
    """Trains a run to its end, from its last checkpoint if there is one.

    Args:
      problem: the data, the devices and the settings.
      run: the run.
      model: the network.
      teacher: the teacher; None trains by cross-entropy alone.
      report: called as ``report(run, epoch=, done=, total=, metrics=, speed=)``.
      observe: called with the number of epochs done (0 before the first step) and the
        network's variables.  It is not called for a run that has already finished.

    Returns:
      The run's result, as in its ``result.json``.

    Raises:
      RunError: loss or gradient was not finite.
      Terminated: SIGTERM was received; there is a checkpoint of the newest step.
      UserError: the folder's run was made with other settings.
      CheckpointError: checkpoints cannot be written, or all are damaged.
    """
    if finished := _begin(problem, run):
        return finished
    settings = run.settings

    # --- state: initial, or that of the last checkpoint ------------------------
    steps = len(run.indices) // settings.optimizer.batch_size
    schedule = optimizers.make_schedule(settings.optimizer, steps, run.epochs)
    tx = optimizers.make_optimizer(settings.optimizer, schedule)
    method = method_of(problem, run.name, settings)
    folder = run.folder(problem.out)
    state = _fresh(problem, run, model, method, tx)
    progress = Progress(
        run.label, folder / "checkpoints", _about(problem, run), steps, state
    )
    progress.state = train_step.replicate(progress.state, problem.devices)

    # --- epochs ------------------------------------------------------------------
    # The number of steps in a dispatch must divide those before and after a checkpoint.
    length = _steps_per_dispatch(math.gcd(steps, progress.taken))
    program = _train_program(problem, run, method, model, teacher, tx, length)
    taught = _what_teaches(problem, run, method, teacher)
    fixed, speeds = (taught, teacher_data(problem, run)), []
    profiled = profiling(program, length, folder, settings.run.profile)
    # The trace is written last: after SIGTERM there may be time for a checkpoint only.
    with profiled as program, progress.running():
        if progress.step == 0:
            observe(0, without_projectors(progress.state.variables))
        for epoch in range(progress.epoch, run.epochs):
            speed = _epoch(problem, run, progress, program, fixed, length, report)
            speeds += [speed] if speed else []  # 0 if all of it was compilation
            final = epoch + 1 == run.epochs
            deployed = without_projectors(progress.state.variables)
            observe(epoch + 1, deployed)  # before a checkpoint records the epoch
            lr = float(np.asarray(schedule(epoch * steps)))
            record = _end_epoch(problem, run, model, deployed, progress, lr, final)
            report(
                run,
                epoch=epoch,
                done=progress.step,
                total=run.epochs * steps,
                metrics=record,
                speed=speed,
            )
            due = final or progress.due(settings.run.checkpoint_seconds)
            if processes.first(lambda due=due: due):
                progress.save()

    timing = {
        "seconds": progress.seconds,
        "seconds_to_first_step": progress.first_step,
        "images_per_second": float(np.median(speeds)) if speeds else None,
    }
    return _result(problem, run, progress.history, timing)


def _result(problem, run, history, timing):
    """Writes and returns the result of a finished run."""
    evaluated = [r for r in history if "test_accuracy" in r]
    last = evaluated[-1]
    best = max(evaluated, key=lambda r: r["test_accuracy"])
    result = {
        "name": run.name,
        "title": run.title,
        "seed": run.seed,
        "weight": run.weight,
        "accuracy": last["test_accuracy"],
        **({"top5": last["test_top5"]} if "test_top5" in last else {}),
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
