"""Trains runs: one alone, or several that differ in seed and lambda in one program.

Each goes on from its newest checkpoint; what runs are is in ``runs.py``, what a
checkpoint holds in ``progress.py``.  Runs of one program share
``<out>/<name>/together`` until all have ended.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
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
from progress import Progress, RunError, Tally
from runs import ALONE, Run, check_folder, epoch_order, method_of
from settings import UserError

from kddm_jax import checkpoint, resnet, train_step
from kddm_jax.losses import carries_weights
from kddm_jax.projectors import without_projectors

if TYPE_CHECKING:
    from teacher import Teacher

LOOK_SECONDS = 0.1  # between looks at the steps: at each, they cost a small step 10 %


def _steps_per_dispatch(settings, steps_per_epoch):
    """Largest divisor up to 50, so that one program serves; one step on a CPU."""
    fitting = 1 if jax.default_backend() == "cpu" else 50
    limit = settings.steps_per_dispatch or fitting
    return max(k for k in range(1, limit + 1) if steps_per_epoch % k == 0)


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


def _train_program(problem, run, method, model, teacher, tx, length, count):
    """The compiled steps; runs that differ in seed, or lambda alone, share it."""
    own_weights = run.weight if carries_weights(method.distance) else None
    key = (run.name, run.epochs, length, own_weights, count)
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
            together=problem.settings.together if count > 1 else None,
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


def _epoch(problem, group, progress, program, fixed, length, report):
    """Takes the steps that are left of an epoch; gives images per second."""
    settings, epoch = problem.settings, progress.epoch
    began = looked = time.monotonic()
    counted, waiting = 0, []
    speed = lambda: counted / max(time.monotonic() - began, 1e-6)

    def look(dispatches):
        for metrics in jax.device_get(dispatches):
            progress.take(metrics, stop=settings.on_nonfinite == "stop")
        if dispatches:
            for run, own in zip(group, progress.split(metrics), strict=True):
                report(
                    run,
                    epoch=epoch,
                    done=progress.step,
                    total=run.epochs * progress.steps,
                    metrics=own,
                    speed=speed(),
                )

    watch = processes.Watch()
    first = group[0]
    order = epoch_order(first, epoch, settings.batch_size)
    of_views = _on_views(problem, first)
    if of_views:
        order = problem.views.order(order, first.seed_of_batches, epoch)
    order = order[progress.taken :]
    for inputs in problem.dispatches(order, length, of_views=of_views):
        progress.state, metrics = program(progress.state, fixed, *inputs)
        counted += length * settings.batch_size * len(group)
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
    seed = run.seed_of_batches
    return train_step.create_state(variables, tx, seed=seed, weight=run.weight)


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
    folder = run.folder(problem.out) / "checkpoints"
    (result,) = _train(problem, [run], model, teacher, report, observe, folder)
    return result


def train_together(
    problem: Problem,
    group: Sequence[Run],
    model: nn.Module,
    teacher: "Teacher | None",
    report: Callable[..., None],
) -> list[dict[str, object]]:
    """Trains runs that differ in seed and lambda in one program, on the same batches.

    Until all have ended they have one checkpoint, in ``together`` beside their folders;
    then each has its own.

    Args:
      problem: data, devices, settings.
      group: the runs, of one name and the same batches.
      model: the network.
      teacher: None for cross-entropy alone.
      report: as of `train`, for each of them.

    Returns:
      Their results.

    Raises:
      UserError: ``together`` holds other runs, cut before their end.
      RunError: as `train`, ``which`` being positions in the group; one stops all.
      Terminated, CheckpointError: as `train`.
    """
    known = [_begin(problem, run) for run in group]
    chosen = processes.first(
        lambda: [group.index(run) for run in members(problem, group)]
    )
    left, made = [group[i] for i in chosen], []
    try:
        if len(left) == 1:
            made = [train(problem, left[0], model, teacher, report)]
        elif left:
            folder = _shared_folder(problem, group) / "checkpoints"
            made = _train(problem, left, model, teacher, report, None, folder)
    except RunError as error:
        error.which = tuple(chosen[i] for i in error.which)
        raise
    for i, result in zip(chosen, made, strict=True):
        known[i] = result
    processes.first(lambda: forget(problem, group))
    return known


def members(problem: Problem, group: Sequence[Run]) -> list[Run]:
    """Says which runs of a group are to be trained together.

    Args:
      problem: data, devices, settings.
      group: of runs.

    Returns:
      Those without a result; and, where a command was cut between two results, all of
      that command's, whose last checkpoint makes them both again.

    Raises:
      UserError: there are runs of other settings or seeds, cut before their end.
    """
    has_result = lambda run: (run.folder(problem.out) / "result.json").exists()
    left = [run for run in group if not has_result(run)]
    if not left or not problem.settings.together:
        return left
    found = _in_shared_folder(problem, group)
    if found is None:
        return left
    identities, ended = found
    # In the order of the checkpoint, whose state has an axis of them.
    held = [run for run in group if run.identity in identities]
    held.sort(key=lambda run: identities.index(run.identity))
    # Of a group that ended the last checkpoint makes results again, else it goes on.
    fits = len(held) == len(identities) and all(r.identity in identities for r in left)
    if not fits or not (ended or len(held) == len(left)):
        each = lambda field: dict.fromkeys(identity[field] for identity in identities)
        seeds = " ".join(map(str, each("seed")))
        weights = each("weight") if "weight" in identities[0] else ()
        lams = " ".join(f"{weight:g}" for weight in weights)
        lams = f" and lambdas {lams}" if len(weights) > 1 else ""
        raise UserError(
            f"{_shared_folder(problem, group)} holds runs of seeds {seeds}{lams}, cut "
            "before their end; finish them by the command that they were begun with, "
            "or delete that folder"
        )
    return held


def _in_shared_folder(problem, group):
    """Identities of the runs that the group's folder holds, and whether they ended."""
    newest = checkpoint.latest(_shared_folder(problem, group) / "checkpoints")
    if newest is None:
        return None
    meta = checkpoint.read_meta(newest)
    return meta["group"], len(meta["history"]) == group[0].epochs


def forget(problem: Problem, group: Sequence[Run]) -> None:
    """Removes the group's shared checkpoints, never those of others."""
    found = _in_shared_folder(problem, group)
    own = [run.identity for run in group]
    if found is None or all(identity in own for identity in found[0]):
        folder = _shared_folder(problem, group)
        doomed = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(doomed)  # none is ever seen in parts
        shutil.rmtree(doomed, ignore_errors=True)


def _shared_folder(problem, group):
    first = group[0]
    if any(run.place != first.place for run in group):  # of several lambdas
        first = replace(first, place="")
    return first.folder(problem.out).parent / "together"


def _train(problem, group, model, teacher, report, observe, folder):
    """Trains runs of one program from the last checkpoint of a folder to their end."""
    settings, first, alone = problem.settings, group[0], len(group) == 1

    # --- state: fresh, or that of the last checkpoint --------------------------
    steps = len(first.indices) // settings.batch_size
    schedule = optimizers.make_schedule(settings, steps, first.epochs)
    tx = optimizers.make_optimizer(settings, schedule)
    method = method_of(problem, first.name, first.weight)
    states = [_fresh(problem, run, model, method, tx) for run in group]
    state = states[0] if alone else train_step.stack_states(states)
    about = _about(problem, first)
    if not alone:
        about["group"] = [run.identity for run in group]
    progress = Progress([run.label for run in group], folder, about, steps, state)
    progress.state = train_step.replicate(progress.state, problem.devices)

    def each():
        return [progress.state] if alone else train_step.unstack_states(progress.state)

    # --- epochs ------------------------------------------------------------------
    # From a checkpoint within an epoch on, dispatches must end with it, too.
    length = _steps_per_dispatch(settings, math.gcd(steps, progress.taken))
    program = _train_program(
        problem, first, method, model, teacher, tx, length, len(group)
    )
    fixed, speeds = _what_teaches(problem, first, method, teacher), []
    with progress.running():
        if progress.step == 0 and observe:
            observe(0, without_projectors(progress.state.variables))
        for epoch in range(progress.epoch, first.epochs):
            speed = _epoch(problem, group, progress, program, fixed, length, report)
            speeds += [speed] if speed else []  # none of the step that compiles
            final = epoch + 1 == first.epochs
            evaluates = final or (epoch + 1) % settings.eval_every == 0
            deployed = [without_projectors(state.variables) for state in each()]
            if observe:  # before a checkpoint says that it is over
                observe(epoch + 1, deployed[0])
            ended = [
                {
                    "epoch": epoch + 1,
                    "lr": float(schedule(epoch * steps)),
                    **means,
                    "skipped": tally.skipped,
                }
                for means, tally in zip(progress.means(), progress.tallies, strict=True)
            ]
            if evaluates:
                for record, variables in zip(ended, deployed, strict=True):
                    record["test_accuracy"] = problems.evaluate(
                        problem, model, variables
                    )
            progress.end_epoch(ended)
            for run, record in zip(group, ended, strict=True):
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

    # --- results -----------------------------------------------------------------
    if not alone:
        _save_each(problem, group, progress, each())
    count = len(group)  # times and speed are shares of the group's
    timing = {
        "seconds": progress.seconds / count,
        "seconds_to_first_step": progress.first_step and progress.first_step / count,
        "images_per_second": float(np.median(speeds)) / count if speeds else None,
        **({} if alone else {"together": count}),
    }
    return [
        _result(problem, run, history, timing)
        for run, history in zip(group, progress.histories, strict=True)
    ]


def _save_each(problem, group, progress, states):
    """Gives each run of a group a last checkpoint of its own."""
    for run, state, history in zip(group, states, progress.histories, strict=True):
        folder = run.folder(problem.out) / "checkpoints"
        meta = {
            **_about(problem, run),
            "history": history,
            "tally": asdict(Tally()),
            "seconds": progress.seconds / len(group),
        }
        processes.first(
            lambda folder=folder, state=state, meta=meta: str(
                checkpoint.save(folder, progress.step, state, meta)
            )
        )


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
