"""Tests that the logs of a run hold what it measures, in every epoch once.

Event files are read here and not by TensorBoard, which is large. `events` hides what an
interrupted command wrote, as TensorBoard does.
"""

import contextlib
import json
import math
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from commands import KEEP, SMALL, call, unwanted_training
from tensorboardX.proto import event_pb2

from kddm_jax.experiment import log as log_module
from kddm_jax.experiment.machine import processes, records
from kddm_jax.experiment.machine.errors import RunError
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.training import train

STEPS = 128 // 32
LINE = (*SMALL, *KEEP, "--distances", "l2", "--epochs", 3, "--eval-every", 2)
LINE = (*LINE, "--log", "tensorboard")


def events(folder):
    """Returns ``{tag: {step: [value, ...]}}`` of a run's event files."""
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])  # then a checksum of four bytes
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == event_pb2.SessionLog.START:
                found = {
                    tag: {s: v for s, v in values.items() if s < event.step}
                    for tag, values in found.items()
                }
            for value in event.summary.value:
                steps = found.setdefault(value.tag, {})
                steps.setdefault(event.step, []).append(value)
    return found


def numbers(found):
    """Returns the scalars as ``{step: {tag: value}}``; each must occur once."""
    by_step = {}
    for tag, steps in found.items():
        for step, values in steps.items():
            if values[0].HasField("simple_value"):
                (value,) = values
                by_step.setdefault(step, {})[tag] = value.simple_value
    return by_step


def lines(folder):
    """Returns the objects of a run's JSON lines."""
    text = (folder / "log.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def assert_logs_history(run, found):
    history = records.read_json(run / "result.json")["history"]
    expected = {STEPS * record["epoch"]: record for record in history}
    assert lines(run) == [{"step": s, **record} for s, record in expected.items()]
    logged = numbers(found)
    assert {*logged} == {*expected}
    for step, values in expected.items():
        assert logged[step] == pytest.approx(values, rel=1e-6)  # float32


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Returns the folder of a study whose student l2 was interrupted in epoch 3.

    Its only checkpoint was then that of epoch 1.
    """
    out = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        end, due = train._end_epoch, train.Progress.due
        named = lambda progress: progress.title.startswith("l2")

        def fail(problem, run, model, variables, progress, *rest):
            if named(progress) and progress.epoch == 2:
                raise RunError("interrupted")
            return end(problem, run, model, variables, progress, *rest)

        patch.setattr(train, "_end_epoch", fail)
        once = lambda progress, seconds: named(progress) and progress.step == STEPS
        patch.setattr(train.Progress, "due", once)
        assert call(*LINE, "--out", out) == 1
        run = out / "l2" / "seed1"
        assert {*numbers(events(run))} == {STEPS, 2 * STEPS}
        assert [line["step"] for line in lines(run)] == [STEPS, 2 * STEPS]
        patch.setattr(train, "_end_epoch", end)
        patch.setattr(train.Progress, "due", due)
        assert call(*LINE, "--out", out) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("run", ["teacher/seed0", "student/seed1", "l2/seed1"])
def test_numbers_are_those_of_the_history(logged, run):
    found = events(logged / run)
    assert_logs_history(logged / run, found)
    assert {"loss", "accuracy", "test_accuracy", "lr"} < {*found}
    assert ("l2" in found) == (run == "l2/seed1")


@pytest.mark.slow
@pytest.mark.parametrize("run", ["student/seed1", "l2/seed1"])
def test_features_are_logged_where_students_are_evaluated(logged, run):
    found = events(logged / run)
    for who in ("student", "teacher"):
        histograms = found[f"feature_norm/{who}"]
        assert {*histograms} == {2 * STEPS, 3 * STEPS}  # epoch 2 and the last
        for values in histograms.values():
            (value,) = values
            assert value.histo.num == 100  # all test images
            assert value.histo.min >= 0
    student = found["feature_norm/student"]
    sums = [values[0].histo.sum for values in student.values()]
    assert sums[0] != sums[1]
    ((step, (picture,)),) = found["features"].items()
    assert step == 3 * STEPS
    assert picture.image.encoded_image_string.startswith(b"\x89PNG")
    assert picture.image.width > picture.image.height > 100


def made_by(**settings):
    """Returns what the log needs to know of a study."""
    line = (word for pair in settings.items() for word in (f"--{pair[0]}", pair[1]))
    return SimpleNamespace(settings=parse([*map(str, line)]), out=settings.get("out"))


def test_a_resumed_run_has_every_step_once(tmp_path):
    """The second command goes on from the checkpoint of epoch 1."""
    run, shown = SimpleNamespace(folder=lambda out: out / "run"), []
    (tmp_path / "run").mkdir()
    report = lambda run, **numbers: shown.append(numbers["done"])
    problem = made_by(log="tensorboard", out=tmp_path)
    for first, loss in ((1, 0.5), (2, 0.25)):
        with contextlib.closing(log_module.Log(problem)) as log:
            logged = log.reporting(report)
            more = {"total": 30, "speed": 1.0}
            for epoch in range(first, 4):
                step = {"loss": np.ones(1)}  # within an epoch
                logged(run, epoch=epoch - 1, done=10 * epoch - 5, metrics=step, **more)
                record = {"epoch": epoch, "loss": loss, "l2:own@2": loss}
                logged(run, epoch=epoch - 1, done=10 * epoch, metrics=record, **more)
                written = numbers(events(tmp_path / "run"))  # before the log is closed
                assert written[10 * epoch]["l2:own@2"] == loss
                assert lines(tmp_path / "run")[-1] == {"step": 10 * epoch, **record}
    losses = {
        step: values["loss"]
        for step, values in numbers(events(tmp_path / "run")).items()
    }
    assert losses == {10: 0.5, 20: 0.25, 30: 0.25}
    assert {line["step"]: line["loss"] for line in lines(tmp_path / "run")} == losses
    assert len(lines(tmp_path / "run")) == 3
    assert shown == [5, 10, 15, 20, 25, 30, 15, 20, 25, 30]


def test_without_the_package_nothing_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", unwanted_training)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    out = tmp_path / "out"
    assert call(*LINE, "--out", out) == 2
    assert capsys.readouterr().err == (
        "error: --log tensorboard needs tensorboardX; install the extra: "
        'pip install "kddm-jax[tensorboard]"\n'
    )
    assert not out.exists()


def test_every_process_stops_if_the_log_cannot_be_written(tmp_path, monkeypatch):
    """The others wait in `processes.first`, which raises the first one's error."""

    def fail(fn):
        raise OSError("disk full")

    monkeypatch.setattr(processes, "first", fail)
    log = log_module.Log(made_by(log="tensorboard", out=tmp_path))
    report = log.reporting(lambda run, **numbers: None)
    report(None, done=5, total=10, metrics={"loss": 1.0})  # within an epoch
    with pytest.raises(OSError, match="disk full"):
        report(None, done=10, total=10, metrics={"epoch": 1, "loss": 1.0})
    optimizer = SimpleNamespace(batch_size=10, eval_every=2)
    settings = SimpleNamespace(optimizer=optimizer)
    run = SimpleNamespace(settings=settings, indices=range(100), epochs=3)
    observe = log.observing(run, None, lambda epoch, variables: None)
    observe(1, None)
    with pytest.raises(OSError, match="disk full"):
        observe(2, None)


def test_json_lines_of_a_killed_run_go_on(tmp_path):
    """Some lines are damaged, the last was cut off, and a value is not finite."""
    whole = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    text = whole.replace("\n", "\n3\n{}\n\xff\n", 1) + '{"step": 3, "l'
    (tmp_path / "log.jsonl").write_text(text, "latin-1")
    log = log_module.JsonLines(tmp_path, 3)
    log.scalars(3, {"loss": math.nan})
    assert lines(tmp_path) == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": None},
    ]
    log.close()


def test_a_full_disk_is_named(tmp_path):
    log = log_module.JsonLines(tmp_path, 1)
    log.file.close()
    with open("/dev/full", "w") as log.file:
        for write in (lambda: log.scalars(1, {"loss": 1.0}), log.close):
            with pytest.raises(OSError, match=r"No space left.*log\.jsonl"):
                write()


def test_without_the_option_only_numbers_are_logged(tmp_path):
    run = SimpleNamespace(folder=lambda out: out)
    with contextlib.closing(log_module.Log(made_by(out=tmp_path))) as log:
        report, observe = log.reporting(lambda run, **numbers: None), object()
        assert log.observing(None, None, observe) is observe
        report(run, done=10, total=20, metrics={"epoch": 1, "loss": 1.0})
    assert lines(tmp_path) == [{"step": 10, "epoch": 1, "loss": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
