"""Tests ``--profile``: the steps in a trace, and its place."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from commands import KEEP, SMALL, call, results_of, unwanted_training

from kddm_jax.experiment.machine import processes
from kddm_jax.experiment.machine.profile import profiling
from kddm_jax.experiment.training import problems, train


def traces(folder):
    """Returns the events of each trace in a run's folder."""
    paths = (folder / "plugins" / "profile").glob("*/perfetto_trace.json.gz")
    return [json.loads(gzip.open(path).read())["traceEvents"] for path in paths]


def profiled(folder, steps, taken=6):
    """Profiles a small program, and returns how often each trace has called it."""

    def small_step(x):
        return jnp.sin(x @ x)

    program, x = jax.jit(small_step), jnp.ones((8, 8))
    with profiling(program, 1, folder, steps) as program:
        for _ in range(taken):
            x = program(x)
    called = lambda event: event.get("name") == "PjitFunction(small_step)"
    return [sum(map(called, events)) for events in traces(folder)]


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path):
    one, three, rest = (profiled(tmp_path / str(n), n)[0] for n in (1, 3, 100))
    assert (three, rest) == (3 * one, 5 * one)  # all but the first, which compiles
    assert profiled(tmp_path / "none", 0) == []


def test_a_trace_ends_with_an_error(tmp_path):
    def interrupted():
        with profiling(jnp.sin, 1, tmp_path, 3) as program:
            program(1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(traces(tmp_path)) == 1
    assert profiled(tmp_path / "next", 1) != []  # the profiler is free again


@pytest.mark.parametrize("step", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_does_not_end_the_block(step, tmp_path, monkeypatch):
    work = getattr(jax.profiler, step)

    def fail(*arguments, **options):
        if step == "stop_trace":
            work()
        raise OSError("disk full")

    monkeypatch.setattr(jax.profiler, step, fail)
    with pytest.warns(UserWarning, match=f"no trace in {tmp_path}: disk full") as found:
        profiled(tmp_path, 1)
    assert len(found) == 1


def test_other_processes_are_not_profiled(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "index", lambda: 1)
    assert profiled(tmp_path, 3) == []


@pytest.mark.slow
def test_runs_are_profiled_and_measured(tmp_path, monkeypatch):
    """Each run has one trace, and the same command without --profile is finished.

    Digits count as many classes here, so that there is also top-5 accuracy.
    """
    monkeypatch.setattr(problems, "MANY_CLASSES", 10)
    line = (*SMALL, *KEEP, "--distances", "l2", "--out", tmp_path)
    assert call(*line, "--profile", 2) == 0
    found = [len(traces(tmp_path / run)) for run in ("teacher/seed0", "l2/seed1")]
    assert found == [1, 1]
    results = results_of(tmp_path)
    for measured in (results["teacher"], *results["runs"]):
        assert measured["accuracy"] < measured["top5"] < 100
    last = results["runs"][-1]
    assert last["history"][-1]["test_top5"] == last["top5"]
    assert "| accuracy % | top-5 % |" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(train, "_epoch", unwanted_training)
    assert call(*line) == 0
