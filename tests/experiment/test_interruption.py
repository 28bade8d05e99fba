"""Tests interrupted runs: kills, SIGTERM, full disks, and numbers that are not finite.

A resumed run must end with the same bits as a run without interruption.
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import jax
import numpy as np
import pytest
from commands import (
    CACHE,
    EXPERIMENTS,
    SMALL,
    TINY,
    assert_same_arrays,
    call,
    command,
    environ,
    final_arrays,
    results_of,
    timeless,
    tiny,
)

from kddm_jax import checkpoint
from kddm_jax.experiment.machine import records, signals
from kddm_jax.experiment.machine.errors import RunError
from kddm_jax.experiment.machine.terminal import Reporter
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.training import problems, runs, train
from kddm_jax.experiment.training.progress import Progress, Tally

STEPS = 4  # steps in each of TINY's two epochs


def assert_same_runs(left, right, names):
    """Asserts that parameters, optimizer, statistics and history are bitwise equal."""
    for name, seed in names:
        assert_same_arrays(
            final_arrays(left, name, seed), final_arrays(right, name, seed)
        )
        records = (
            json.loads((out / name / f"seed{seed}" / "result.json").read_text())
            for out in (left, right)
        )
        one, two = map(timeless, records)
        assert one == two


# ---------------------------------------------------------------------------
# What an epoch's steps add up to.


def dispatches(seed=0, count=7, length=3):
    draw = np.random.default_rng(seed).standard_normal
    return [
        {
            "loss": draw(length).astype(np.float32),
            "w2/converged": (draw(length) > 0).astype(np.float32),
            "finite": draw(length) > -1,
        }
        for _ in range(count)
    ]


def test_tally_is_the_mean_of_the_finite_steps():
    tally, columns = Tally(), dispatches()
    for metrics in columns:
        tally.add(metrics)
    loss, finite = (np.concatenate([m[k] for m in columns]) for k in ("loss", "finite"))
    assert 0 < np.sum(~finite) < finite.size
    assert tally.means()["loss"] == pytest.approx(np.mean(loss[finite], dtype=float))
    assert (tally.steps, tally.skipped) == (21, np.sum(~finite))


def test_tally_of_skipped_steps_stays_finite():
    tally = Tally()
    tally.add({"loss": np.array([np.nan, 1.0]), "finite": np.array([False, True])})
    tally.add({"loss": np.array([3.0, np.inf]), "finite": np.array([True, False])})
    assert tally.means() == {"loss": 2.0}
    assert list(tally.complaints()) == [
        "2 of 4 steps skipped: loss or gradient not finite"
    ]


def test_tally_names_the_teacher():
    """The message names the teacher if it is the cause of a step that is not finite."""
    tally, no = Tally(), np.array([False, False, True])
    taught = np.array([False, True, False])
    tally.add({"loss": np.ones(3), "finite": no, "teacher_finite": taught})
    assert tally.means() == {"loss": 1.0}
    assert list(tally.complaints()) == [
        "2 of 3 steps skipped: loss or gradient not finite (1 of them: features or "
        "logits of the teacher not finite)"
    ]


@pytest.mark.parametrize("cut", range(8))
def test_tally_cut_anywhere_is_the_same(cut):
    whole, columns = Tally(), dispatches()
    for metrics in columns:
        whole.add(metrics)
    tally = Tally()
    for metrics in columns[:cut]:
        tally.add(metrics)
    tally = Tally(**json.loads(json.dumps(vars(tally))))
    for metrics in columns[cut:]:
        tally.add(metrics)
    assert vars(tally) == vars(whole)
    assert tally.means() == whole.means()


def test_steps_whose_solver_did_not_converge_are_told():
    tally, steps = Tally(), np.array([1.0, 0.0, 1.0, 1.0], np.float32)
    finite = np.ones(4, bool)
    tally.add({"w2/converged": steps, "cw2@stem/converged": finite, "finite": finite})
    (complaint,) = tally.complaints()
    assert complaint.startswith("the solver of w2 did not converge in 25.0 % of the")


def a_progress(folder, state=None):
    state = {"a": np.zeros(3)} if state is None else state
    return Progress("w2 seed 1", folder, {"run": {}}, STEPS, state)


def step_of(loss=1.0, finite=True):
    return {"loss": np.array([loss]), "w2": np.array([0.5]), "finite": finite}


def test_progress_goes_on_within_an_epoch(tmp_path):
    one = a_progress(tmp_path)
    for _ in range(STEPS):
        one.take(step_of(), stop=True)
    one.end_epoch({"epoch": 1, **one.means()})
    one.take(step_of(0.1), stop=True)
    one.state = {"a": np.arange(3.0)}
    one.save()
    two = a_progress(tmp_path)
    assert two.last == tmp_path / "step-00000005"
    assert (two.step, two.history, two.tally) == (5, one.history, one.tally)
    np.testing.assert_array_equal(two.state["a"], np.arange(3.0))
    assert two.earlier > 0


def test_checkpoint_of_an_earlier_version_is_an_epoch_s_end(tmp_path):
    """Its name was the epoch, and it had no sums over the epoch's steps."""
    meta = {"run": {}, "history": [{"epoch": 1}], "seconds": 2.0}
    checkpoint.save(tmp_path, 1, {"a": np.zeros(3)}, meta)
    one = a_progress(tmp_path)
    assert (one.step, one.tally) == (STEPS, Tally())
    one.save()
    assert a_progress(tmp_path).last.name == f"step-{STEPS:08d}"


def test_step_that_is_not_finite_stops_with_all_there_is_to_know(tmp_path):
    one = a_progress(tmp_path)
    one.take(step_of(), stop=True)
    with pytest.raises(RunError, match="at step 2 .loss nan, w2 0.5.*no checkpoint"):
        one.take(step_of(np.nan, False), stop=True)
    one.save()
    before = vars(one.tally).copy()
    with pytest.raises(RunError, match="another --out.*skip.*/step-00000001") as caught:
        one.take(step_of(np.nan, False), stop=True)
    assert "\n" not in str(caught.value)
    assert vars(one.tally) == before
    one.take(step_of(np.nan, False), stop=False)
    assert (one.tally.steps, one.tally.skipped) == (2, 1)


def test_a_teacher_that_is_not_finite_is_named(tmp_path):
    step = {**step_of(np.nan, False), "teacher_finite": np.array([False])}
    one, message = a_progress(tmp_path), "features or logits of the teacher not finite "
    fix = ".*; check the teacher's weights, or try --dtype float32, in another --out"
    with pytest.raises(RunError, match=f"{message}at step 1 .loss nan, w2 0.5.{fix}"):
        one.take(step, stop=True)
    one.take(step, stop=False)
    with pytest.raises(RunError, match=f"{message}at any of the 1 steps{fix}"):
        one.means()
    one.take({**step, "teacher_finite": np.array([True])}, stop=False)
    with pytest.raises(
        RunError, match="loss or gradient not finite at any.*lower --lr"
    ):
        one.means()


def test_epoch_without_a_finite_step_stops(tmp_path):
    one = a_progress(tmp_path)
    one.take(step_of(np.nan, False), stop=False)
    with pytest.raises(RunError, match="not finite at any of the 1 steps of epoch 1"):
        one.means()


# ---------------------------------------------------------------------------
# SIGTERM.


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_is_an_exception():
    with signals.listening(), pytest.raises(signals.Terminated):
        terminate()


@pytest.mark.parametrize("checked", [True, False])
def test_sigterm_waits_while_held(checked):
    """The signal waits for the next check, or for the end of the block."""
    reached = []

    def work():
        with signals.held():
            terminate()
            terminate()  # a second signal changes nothing
            reached.append(signals.asked())
            if checked:
                signals.check()
            reached.append("the end")

    with signals.listening(), pytest.raises(signals.Terminated):
        work()
    assert reached == ([True] if checked else [True, "the end"])
    signals.check()  # the signal was handled


def test_sigterm_is_left_as_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with signals.listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    heard = []

    def elsewhere():  # only the main thread may listen for signals
        with signals.listening():
            heard.append(signal.getsignal(signal.SIGTERM) == before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert heard == [True]


@pytest.fixture
def terminated_at(monkeypatch):
    """Sends SIGTERM when the n-th step of a run is shown, or in its evaluation."""
    moments = []
    show, evaluate = Reporter.__call__, problems.evaluate

    def show_and_terminate(self, run, **shown):
        if moments and moments[0] == (run.name, shown["done"]):
            moments.pop()
            terminate()
        show(self, run, **shown)

    def terminate_and_evaluate(*arguments):
        if moments and moments[0] == "evaluation":
            moments.pop()
            terminate()
        return evaluate(*arguments)

    monkeypatch.setattr(train, "LOOK_SECONDS", 0)
    monkeypatch.setattr(Reporter, "__call__", show_and_terminate)
    monkeypatch.setattr(problems, "evaluate", terminate_and_evaluate)
    return moments


def newest(out, run):
    path = checkpoint.latest(out / run / "checkpoints")
    return path.name, checkpoint.read_meta(path)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(
    shared,
    finished,
    tmp_path,
    capsys,
    terminated_at,
):
    """Stops within an epoch and in evaluation, in a teacher's and a student's run."""
    out = tmp_path / "out"
    line = (*tiny(out), "--devices", 1, "--distances")
    line = (*line, "--checkpoint-seconds", 1e6)  # only SIGTERM saves
    for moment, run, step, whole in (
        (("teacher", 2), "teacher/seed0", 3, 0),  # one more step has started
        ("evaluation", "teacher/seed0", STEPS, 0),
        (("student", 2 * STEPS - 1), "student/seed1", 2 * STEPS, 1),
    ):
        terminated_at.append(moment)
        assert call(*line) == signals.STATUS == 143, moment
        stopped = capsys.readouterr().err
        assert stopped == "stopped by SIGTERM; rerun the command to resume\n"
        assert not terminated_at
        name, meta = newest(out, run)
        assert name == f"step-{step:08d}"
        assert len(meta["history"]) == whole
        assert meta["tally"]["steps"] == step - whole * STEPS
        assert not (out / run / "result.json").exists()
    assert call(*line) == 0
    said = capsys.readouterr().out
    assert "teacher: epoch" not in said
    assert "student seed 1: epoch 1" not in said
    assert_same_runs(out, finished / "out", (("teacher", 0), ("student", 1)))

    # --- the last checkpoint of a teacher is damaged ------------------------------
    last = out / "teacher" / "seed0" / "checkpoints" / f"step-{2 * STEPS:08d}"
    (last / "meta.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert call(*line) == 0
    said = capsys.readouterr()
    assert f"step-{2 * STEPS:08d} is damaged: meta.json" in said.err
    assert "teacher: epoch 1 " in said.out  # evaluated again
    assert_same_runs(out, finished / "out", (("teacher", 0), ("student", 1)))


@pytest.mark.slow
def test_several_steps_in_one_dispatch(finished, tmp_path, monkeypatch, terminated_at):
    """As on accelerators; the run is the same, also if it is resumed at an odd step."""
    out = tmp_path / "out"
    line = (*tiny(out), "--devices", 1, "--distances", "w2")
    line = (*line, "--checkpoint-seconds", 1e6)
    terminated_at.append(("teacher", 2))  # a third step has started
    assert call(*line) == signals.STATUS
    assert newest(out, "teacher/seed0")[0] == "step-00000003"

    lengths, scan = set(), train.train_step.scan_steps

    def spy(step, **options):
        scanned = scan(step, **options)

        def counted(*arguments):
            lengths.add(arguments[4].shape[0])  # the indices' shape
            return scanned(*arguments)

        return counted

    monkeypatch.setattr(train.train_step, "scan_steps", spy)
    monkeypatch.setattr(train, "most_steps_per_dispatch", lambda: 2)
    assert call(*line) == 0
    assert lengths == {1, 2}  # of the teacher, then of the students
    for name, seed in (("teacher", 0), ("student", 1), ("w2", 1)):
        left, right = (final_arrays(o, name, seed) for o in (out, finished / "out"))
        for (key, a), (_, b) in zip(left[1], right[1], strict=True):
            # Steps in a loop are another program, with other rounding errors.
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4, err_msg=str(key))
        histories = (
            json.loads((o / name / f"seed{seed}" / "result.json").read_text())[
                "history"
            ]
            for o in (out, finished / "out")
        )
        for one, two in zip(*histories, strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_sigterm_outside_training_stops_at_once(tmp_path, capsys, monkeypatch):
    """A command that reads data for minutes stops immediately."""

    def load(*arguments, **options):
        terminate()
        raise AssertionError("went on")

    monkeypatch.setattr(problems.data, "load", load)
    assert call(*TINY, "--out", tmp_path / "out") == signals.STATUS
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------
# Disks.


def test_full_disk_names_the_file_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "result.json"
    records.write_json(path, {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(OSError, match="File too large: .*/result.json"):
            records.write_json(path, list(range(100)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------
# Numbers that go wrong.

# A distance that is not finite in some batches, and a solver that stops too early.
WRONG = """
from dataclasses import replace
import jax.numpy as jnp
from kddm_jax import DISTANCES, Distance

def broken(x, y, labels):
    return jnp.mean((x - y) ** 2) + jnp.where(labels[0] == BAD, jnp.nan, 0)

BROKEN = Distance(broken, inputs=("features", "labels"))
ROUGH = replace(
    DISTANCES["w2"],
    options={"solver": "entropic", "threshold": 1e-7, "max_iterations": 10},
)
"""


def first_labels(problem, run):
    """Returns the label of the first image of each batch."""
    orders = [runs.epoch_order(run, epoch, 32)[:, 0] for epoch in range(run.epochs)]
    return problem.dataset.train_labels[np.concatenate(orders)]


@pytest.fixture
def beside(finished, tmp_path, monkeypatch):
    """Makes a working folder with the finished runs of the teacher and the student."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    for run in ("teacher", "student"):
        shutil.copytree(finished / "out" / run, tmp_path / "out" / run)


@pytest.mark.slow
@pytest.mark.usefixtures("beside")
def test_steps_that_are_not_finite(shared, tmp_path, capsys):
    """The command stops with a message, or skips; both give the same history."""
    line = (*tiny("out"), "--distances", "wrong:BROKEN", "--devices", 1)
    problem = problems.prepare(parse([*map(str, line[:-4])]), tmp_path)
    run = runs.Run("any", 1, 0.0, 2, problem.parts.student, problem.settings, {})
    labels = first_labels(problem, run)
    bad = labels[5]  # fails in the second step of the second epoch or before
    expected = labels == bad
    assert 0 < expected[STEPS:].sum() < STEPS
    (tmp_path / "wrong.py").write_text(WRONG.replace("BAD", str(bad)))

    # --- stop, the default; stops again at the same step -------------------------
    at = int(np.argmax(expected)) + 1
    for _ in range(2):
        assert call(*line, "--checkpoint-seconds", 0) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: wrong:BROKEN seed 1: loss or gradient not fin")
        assert f"at step {at} (" in error
        assert "wrong:BROKEN nan" in error
        kept = tmp_path / "out" / "wrong.BROKEN" / "seed1" / "checkpoints"
        assert error.endswith(f"step-{at - 1:08d}\n")
        assert checkpoint.latest(kept).name == f"step-{at - 1:08d}"

    # --- skip, in the same folder ------------------------------------------------
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert call(*line, "--on-nonfinite", "skip") == 0
    told = [m for m in capsys.readouterr().err.splitlines() if m.startswith("warning")]
    counts = expected.reshape(2, STEPS).sum(axis=1)
    assert told == [
        f"warning: wrong:BROKEN seed 1: epoch {epoch + 1}: {count} of {STEPS} steps "
        "skipped: loss or gradient not finite"
        for epoch, count in enumerate(counts)
        if count
    ]
    result = json.loads((kept.parent / "result.json").read_text())
    assert [record["skipped"] for record in result["history"]] == list(counts)
    assert all(np.isfinite(record["loss"]) for record in result["history"])
    state = checkpoint.restore_arrays(checkpoint.latest(kept))[0]
    assert state["step"] == 2 * STEPS - counts.sum()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.usefixtures("beside")
def test_solver_that_does_not_converge(shared, tmp_path, capsys):
    """A warning is printed once per epoch, and the statistics are recorded."""
    (tmp_path / "wrong.py").write_text(WRONG.replace("BAD", "0"))
    line = (*tiny("out"), "--distances", "wrong:ROUGH", "--devices", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert call(*line) == 0
    told = [m for m in capsys.readouterr().err.splitlines() if m.startswith("warning")]
    assert len(told) == 2
    for epoch, message in enumerate(told, start=1):
        said = f"warning: wrong:ROUGH seed 1: epoch {epoch}: the solver of .* did not "
        assert re.match(f"{said}converge in 100.0 % of the steps", message)
    history = results_of(tmp_path / "out")["runs"][-1]["history"]
    for record in history:
        (name,) = [name for name in record if name.endswith("/converged")]
        assert record[name] == 0.0


# ---------------------------------------------------------------------------
# The same bits.


@pytest.mark.slow
def test_two_processes_give_the_same_bits(
    shared,
    finished,
    tmp_path,
):
    """Compares a run of this process with one of another process."""
    assert call(*tiny(tmp_path), "--distances", "--devices", 1) == 0
    assert_same_runs(tmp_path, finished / "out", (("teacher", 0), ("student", 1)))


@pytest.mark.slow
def test_a_home_that_cannot_be_written_stops_no_run(tmp_path):
    """The caches of compiled programs and of Matplotlib are there by default."""
    (tmp_path / "file").touch()
    home = environ(HOME=str(tmp_path / "file" / "home"))
    del home["JAX_COMPILATION_CACHE_DIR"]
    home.pop("XDG_CACHE_HOME", None)
    options = ("--distances", "l2", "--embedding", "none", "--out", tmp_path / "out")
    done = command(*SMALL, *options, cwd=tmp_path, env=home)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert [run["name"] for run in results_of(tmp_path / "out")["runs"]] == [
        "student",
        "l2",
    ]


@pytest.mark.slow
def test_two_processes_compile_and_give_the_same_bits(tmp_path):
    """As users run it: with optimized programs, which each process compiles itself."""
    names = ("w2", "cw2_gaussian")
    env = environ(JAX_NUM_CPU_DEVICES="2")
    for variable in (*CACHE, "JAX_DISABLE_MOST_OPTIMIZATIONS"):
        del env[variable]
    line = (*SMALL, "--compilation-cache", "None", "--embedding", "none")
    line = (*line, "--distances", *names, "--out", "out")
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        done = command(*line, cwd=tmp_path / place, env=env)
        assert done.returncode == 0, done.stderr
        assert "2 cpu device(s)" in done.stdout
    outs = [tmp_path / place / "out" for place in ("one", "two")]
    students = [(name, 1) for name in ("student", *names)]
    assert_same_runs(*outs, (("teacher", 0), *students))
    assert timeless(results_of(outs[0])) == timeless(results_of(outs[1]))


# ---------------------------------------------------------------------------
# kill -9.


def at_work(out):
    """Returns the name of a run without a result."""
    for folder in out.glob("*/seed*"):
        if not (folder / "result.json").exists():
            return folder.parent.name
    return None


def last_save(out):
    """Returns the time of the last write to a checkpoint."""
    times = [0]
    for path in out.glob("*/seed*/checkpoints/*"):
        with contextlib.suppress(OSError):  # just removed
            times.append(path.stat().st_mtime_ns)
    return max(times)


@pytest.mark.slow
def test_killed_at_any_moment(shared, tmp_path):
    """Kills a command at least ten times, during all runs and also while it saves.

    Every other kill comes at any time in the life of a process, including its start and
    the restoring of checkpoints. The others come while it trains and saves.
    """
    epochs = ("--teacher-epochs", "6", "--epochs", "6", "--checkpoint-seconds", "0")
    # A kill may leave an incomplete program in the cache, which others must not read.
    own = ("--compilation-cache", shared / "cache")
    # Quick to trace, because a process spends most of its life on starting.
    line = (*tiny("out"), *own, *epochs, "--distances", "l2", "--embedding", "none")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    done = command(*line, cwd=whole)
    assert done.returncode == 0, done.stderr
    results = results_of(whole / "out")
    timings = [run["timing"] for run in (results["teacher"], *results["runs"])]
    steps = sum(t["seconds"] - t["seconds_to_first_step"] for t in timings)
    ahead = steps / 6  # no process gets further than this

    draw, kills, within, start = random.Random(0), [], 0, 0.0
    script = [sys.executable, str(EXPERIMENTS / "cifar.py"), *map(str, line)]
    for life in range(60):
        began, before = time.monotonic(), last_save(cut / "out")
        with (cut / "log").open("a") as log:
            process = subprocess.Popen(
                script, cwd=cut, env=environ(), stdout=log, stderr=subprocess.STDOUT
            )
        trains = life % 2 == 0
        while trains and process.poll() is None and last_save(cut / "out") == before:
            time.sleep(0.005)
        start = start or time.monotonic() - began
        try:
            process.wait(draw.uniform(0, ahead if trains else start + ahead))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        kills.append(at_work(cut / "out"))
        within += any(cut.glob("out/*/*/checkpoints/*.partial"))
    assert process.returncode == 0, (cut / "log").read_text()[-2000:]
    assert len(kills) >= 10, kills
    assert {"teacher", "student", "l2"} <= {*kills}, kills
    assert within, "no kill came within a save"
    assert_same_runs(
        cut / "out", whole / "out", (("teacher", 0), ("student", 1), ("l2", 1))
    )
    assert timeless(results_of(cut / "out")) == timeless(results)
