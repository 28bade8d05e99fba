"""Tests several processes: two with two devices give the result of one with four."""

import fcntl
import json
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from commands import EXPERIMENTS, KEEP, KILL, SMALL, environ, final_arrays

from kddm_jax import checkpoint
from kddm_jax.experiment.machine import processes
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.recipes import parse

LINE = (
    *SMALL,
    "--epochs",
    1,
    "--teacher-epochs",
    1,
    "--distances",
    "l2",
    "--embedding",
    "none",
    "--devices",
    4,
)
CIFAR = (str(EXPERIMENTS / "cifar.py"),)


def launch(cwd, *arguments, devices, script=CIFAR):
    """Starts the command in its own folder."""
    cwd.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *script, *map(str, arguments)],
        cwd=cwd,
        env=environ(JAX_NUM_CPU_DEVICES=str(devices)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*begun):
    """Returns each process's status, output and errors, without Gloo's messages."""
    done = []
    of_gloo = ("[Gloo]", "peer ranks")  # written by two threads, which may interleave
    try:
        for process in begun:
            out, err = process.communicate(timeout=240)
            told = lambda line: not any(part in line for part in of_gloo)
            lines = [line for line in out.splitlines() if told(line)]
            done.append((process.returncode, lines, err))
    finally:  # a process may wait for another that has ended
        for process in begun:
            process.kill()
    return done


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def both(root, *arguments, more=((), ())):
    """Runs the command in two processes, each in its own folder."""
    meet = ("--coordinator", f"localhost:{free_port()}", "--processes", 2)
    return ended(
        *(
            launch(
                root / f"host{i}", *arguments, *meet, "--process", i, *own, devices=2
            )
            for i, own in enumerate(more)
        )
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Makes a finished run of one process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    line = (*LINE, *KEEP, "--out", "out")
    ((status, _, err),) = ended(launch(folder, *line, devices=4))
    assert (status, err) == (0, "")
    return folder / "out"


RUNS = (("teacher", 0), ("student", 1), ("l2", 1))


def assert_same_run(left, right, name, seed):
    """Compares the last checkpoints with all their arrays, and the histories."""
    # One step leaves a difference of 1e-5, as on the devices of one process
    # (test_devices.py), because Gloo adds in another order. Each of the four steps may
    # add as much.
    one, two = (final_arrays(out, name, seed) for out in (left, right))
    assert one[0] == two[0]
    for (path, a), (_, b) in zip(one[1], two[1], strict=True):
        largest = max(float(np.max(np.abs(a))), 1e-3)
        np.testing.assert_allclose(b, a, rtol=0, atol=4e-5 * largest, err_msg=str(path))
    histories = [
        json.loads((out / name / f"seed{seed}" / "result.json").read_text())["history"]
        for out in (left, right)
    ]
    for a, b in zip(*histories, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["test_accuracy"] == pytest.approx(a["test_accuracy"], abs=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "--stream-above 0.001"])
def test_two_processes_are_one(how, alone, tmp_path):
    (first, second) = both(tmp_path, *LINE, *KEEP, *how.split(), "--out", "out")
    assert first[::2] == second[::2] == (0, "")
    # Only the first process prints and writes.
    assert any("4 cpu device(s)" in line for line in first[1])
    assert any("l2 seed 1: epoch 1" in line for line in first[1])
    assert second[1] == []
    assert not list((tmp_path / "host1").iterdir())
    out = tmp_path / "host0" / "out"
    assert (out / "table.md").read_text()
    environment = json.loads((out / "results.json").read_text())["environment"]
    assert (environment["device_count"], environment["process_count"]) == (4, 2)
    for name, seed in RUNS:
        assert_same_run(alone, out, name, seed)


@pytest.mark.slow
def test_killed_run_continues_in_two_processes(alone, tmp_path):
    """It resumes from the step of the first process, whatever the second has."""
    line = (*LINE, "--epochs", 2, "--checkpoint-seconds", 0, *KEEP, "--out", "out")
    # Within the second epoch of four steps.
    late = """"l2" in path.parts and path.name[-1] > '4'"""
    late = KILL.replace('"w2" in path.parts', late)
    assert late != KILL
    kill = ("-c", late)
    (killed,) = ended(launch(tmp_path / "host0", *line, devices=4, script=kill))
    assert killed[0] < 0
    shutil.copytree(tmp_path / "host0", tmp_path / "whole")
    (whole,) = ended(launch(tmp_path / "whole", *line, devices=4))
    assert whole[0] == 0
    first, second = both(tmp_path, *line)
    assert first[::2] == second[::2] == (0, "")
    assert not any("l2 seed 1: epoch 1" in line for line in first[1])
    assert any("l2 seed 1: epoch 2" in line for line in first[1])
    assert_same_run(tmp_path / "whole" / "out", tmp_path / "host0" / "out", "l2", 1)
    # Run again, the command trains nothing.
    (again, _) = both(tmp_path, *line)
    assert not any("seed 1: epoch" in line for line in again[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "errors"),
    [
        (((), ("--lr", 0.5)), ["process 1 has other settings than process 0", None]),
        (
            ((), ("--pretrained-student", "none.npz")),
            ["process 1 stopped; see its error", "none.npz"],
        ),
    ],
    ids=["settings", "files"],
)
def test_mistake_of_one_process_stops_both(more, errors, tmp_path):
    for (status, lines, err), error in zip(
        both(tmp_path, *LINE, more=more), errors, strict=True
    ):
        assert (status, lines) == (2, [])
        assert (err == "") if error is None else err.startswith("error: ")
        assert (error or "") in err


@pytest.mark.slow
def test_locked_folder_stops_both(tmp_path):
    out = tmp_path / "host0" / "out"
    out.mkdir(parents=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first, second = both(tmp_path, *LINE, "--out", "out")
    assert first[0] == second[0] == 2
    assert "another command is running" in first[2]
    assert (second[1], second[2]) == ([], "")


@pytest.mark.slow
def test_sigterm_to_one_stops_both_between_the_same_steps(tmp_path):
    line = (*LINE, "--teacher-epochs", 300, "--distances", *KEEP, "--out", "out")
    meet = ("--coordinator", f"localhost:{free_port()}", "--processes", 2)
    first, second = (
        launch(tmp_path / f"host{i}", *line, *meet, "--process", i, devices=2)
        for i in range(2)
    )
    for printed in first.stdout:
        if "teacher: epoch 3" in printed:
            break
    second.send_signal(signal.SIGTERM)
    (status, _, err), (other, _, _) = ended(first, second)
    assert status == other == 143
    assert err == "stopped by SIGTERM; rerun the command to resume\n"
    kept = tmp_path / "host0" / "out" / "teacher" / "seed0" / "checkpoints"
    meta = checkpoint.read_meta(checkpoint.latest(kept))
    assert len(meta["history"]) >= 3
    assert not (kept.parent / "result.json").exists()


# ---------------------------------------------------------------------------
# Who is there, and who is asked.


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--coordinator a:1", ["--processes, --process, too"]),
        ("--processes 2", ["--coordinator, --process, too"]),
        ("--process 0", ["--coordinator, --processes, too"]),
        ("--coordinator a --processes 2 --process 0", ["HOST:PORT", "'a'"]),
        ("--coordinator a:1 --processes 2 --process 2", ["[0, 2)", "got 2"]),
        ("--processes 0", ["--processes must be positive, got 0"]),
    ],
)
def test_incomplete_settings(line, parts):
    with pytest.raises(UserError) as error:
        parse(line.split())
    for part in parts:
        assert part in str(error.value)


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}


@pytest.fixture
def initialized(monkeypatch):
    """Records the arguments of `jax.distributed.initialize`; hides all clusters."""
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **_: calls.append(args)
    )
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(processes.CLUSTERS, "Cloud TPU", lambda: False)
    return calls


def start(line):
    run = parse(line).run
    processes.start(run.coordinator, run.processes, run.process)


def test_one_process_does_not_communicate(initialized):
    start([])
    assert initialized == []


def test_slurm_is_found(initialized, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    start(["--processes", "1"])
    assert initialized == []
    start([])
    assert initialized == [(None, None, None)]
    monkeypatch.setenv("SLURM_NTASKS", "1")
    start([])
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("SLURM_STEP_NODELIST")  # in a batch script, without srun
    start([])
    assert len(initialized) == 1


def test_cloud_tpu_is_found(monkeypatch, tmp_path):
    libtpu = lambda name: SimpleNamespace() if name == "libtpu" else None
    monkeypatch.setattr(processes.importlib.util, "find_spec", libtpu)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    found = processes._on_cloud_tpu
    assert not found(tmp_path)
    (tmp_path / "accel0").touch()
    assert found(tmp_path)
    for platforms, joins in {"cpu": False, "": True, "tpu,cpu": True}.items():
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        assert found(tmp_path) == joins
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    assert not found(tmp_path)


@pytest.mark.parametrize("kind", processes.ERRORS.values())
def test_errors_are_the_same_in_all(kind):
    """SIGTERM, too: all processes end as the first one, with its status."""
    value, error = processes._read(processes._written(None, kind("said")))
    assert value is None
    assert (type(error), str(error)) == (kind, "said")
    assert processes.was_told(error)


def test_the_coordinator_is_named(initialized, monkeypatch):
    place = f"localhost:{free_port()}"
    line = ("--coordinator", place, "--processes", "2", "--process")
    start([*line, "0"])
    assert initialized == [(place, 2, 0)]
    monkeypatch.setattr(processes, "PATIENCE", 0.0)
    with pytest.raises(UserError, match=f"{place}: .*refused; it is the host of the"):
        start([*line, "1"])
    with socket.socket() as taken:
        taken.bind(("", int(place.rpartition(":")[2])))
        taken.listen()
        with pytest.raises(UserError, match=f"{place}: .* choose another port"):
            start([*line, "0"])
        start([*line, "1"])
    assert initialized[1:] == [(place, 2, 1)]


def test_trouble_of_jax_is_one_line(monkeypatch, initialized):
    def fail(*args, **options):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setitem(processes.CLUSTERS, "Cloud TPU", lambda: True)
    with pytest.raises(UserError, match="Cloud TPU: first line; run .*--processes 1"):
        start([])


def device(process, number):
    return SimpleNamespace(process_index=process, id=number)


@pytest.fixture
def slice_of(monkeypatch):
    """Pretends to be the second of two processes with interleaved devices."""

    def make(counts):
        every = [device(p, i) for i in range(4) for p in (0, 1) if i < counts[p]]
        monkeypatch.setattr(jax, "devices", lambda: every)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        return every

    return make


def test_devices_of_a_process_lie_together(slice_of):
    slice_of((3, 3))
    chosen = processes.choose_devices(None)
    assert [d.process_index for d in chosen] == [0, 0, 0, 1, 1, 1]
    assert processes.mine(chosen) == range(3, 6)
    chosen = processes.choose_devices(4)
    assert [(d.process_index, d.id) for d in chosen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert processes.mine(chosen) == range(2, 4)


@pytest.mark.parametrize(
    ("counts", "wanted", "message"),
    [
        ((2, 2), 3, "--devices 3 does not divide among 2 processes; .* multiple of 2"),
        ((2, 2), 6, "--devices 6: 2 processes have 4; lower it"),
        ((2, 3), None, "processes have 2 to 3 devices; pass --devices 4"),
        ((2, 3), 6, "--devices 6: 2 processes have 4; lower it"),
    ],
)
def test_missing_devices_are_an_error(slice_of, counts, wanted, message):
    slice_of(counts)
    with pytest.raises(UserError, match=message):
        processes.choose_devices(wanted)


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_values_of_the_first_process_reach_all(size, monkeypatch):
    """Sends values and errors in pieces; the two processes are played in turn."""
    monkeypatch.setattr(processes, "CHUNK", 300)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sent = []

    def play(who, fn):
        monkeypatch.setattr(jax, "process_index", lambda: who)
        heard = iter(list(sent))

        def broadcast(array):
            if who == 0:
                sent.append(array.copy())
                return array
            told = next(heard)
            assert (array.shape, array.dtype) == (told.shape, told.dtype)
            return told

        name = "broadcast_one_to_all"
        monkeypatch.setattr(processes.multihost_utils, name, broadcast)
        return processes.first(fn)

    def never():
        raise AssertionError("called in the second process")

    nested = lambda: processes.first(lambda: {"state": np.arange(size), "at": None})
    for who, fn in enumerate((nested, never)):
        value = play(who, fn)
        np.testing.assert_array_equal(value["state"], np.arange(size))
    sent.clear()

    def fail(error):
        raise error

    for fn, own, kind in (
        (partial(fail, UserError("one line")), UserError, UserError),
        (partial(fail, FileNotFoundError("gone")), OSError, OSError),
        (partial(fail, ZeroDivisionError("0")), ZeroDivisionError, RuntimeError),
        (lambda: {1, 2}, TypeError, RuntimeError),  # a value that cannot be sent
    ):
        with pytest.raises(own) as own:
            play(0, fn)
        with pytest.raises(kind, match=str(own.value)) as told:
            play(1, never)
        assert not processes.was_told(own.value)
        assert processes.was_told(told.value)
        sent.clear()


def test_alone_one_looks_up_at_will():
    watch = processes.Watch()
    assert [watch.looks(ready) for ready in (True, False, True)] == [True, False, True]
    assert watch.agree(True, False) == (True, False)
    assert watch.agree(False, True) == (False, True)


def test_several_look_up_after_the_same_dispatches(monkeypatch):
    """The first process sets the interval. A signal to the second reaches both."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    others = iter([[0, 0, 9], [1, 0, 9], [0, 1, 9]])  # those of the second process

    def gather(own):
        return np.stack([own, np.array(next(others), own.dtype)])

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    watch = processes.Watch()
    heard = []
    for dispatch in range(1, 8):
        looks = watch.looks(False)
        heard.append((dispatch, looks, watch.agree(False, dispatch == 1)))
    # After 1, then 2, then 4 more steps: the interval at most doubles.
    assert [at for at, looks, _ in heard if looks] == [1, 3, 7]
    assert [said for _, looks, said in heard if looks] == [
        (False, True),  # a checkpoint is due in the first process
        (True, False),
        (False, False),  # what is due in the second does not matter
    ]
    assert all(said == (False, False) for _, looks, said in heard if not looks)
