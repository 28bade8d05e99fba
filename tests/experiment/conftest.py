"""Makes the runs that tests share, once per session, by one of the workers."""

import contextlib
import fcntl
import os
import shutil
import signal

import jax
import pytest
from commands import KILL, NETWORK, TINY, command, tiny

from kddm_jax import checkpoint
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.training import models, problems, runs


@pytest.fixture(autouse=True)
def settings_of_jax():
    """Uses the settings of the subprocesses, and restores them after the test."""
    names = ("jax_compilation_cache_dir", "jax_disable_most_optimizations")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Returns a folder that all workers of the session share."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / "experiments"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def once(shared, name):
    """Gives ``(folder, True)`` to the first caller and makes all others wait for it."""
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder, done = shared / name, shared / f"{name}.done"
        if done.exists():
            yield folder, False
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder, True
        done.touch()


@pytest.fixture(scope="session")
def finished(shared):
    """Returns the folder of a finished run, with ``out/`` and ``stdout.txt``."""
    with once(shared, "finished") as (folder, first):
        if first:
            done = command(*tiny("out"), cwd=folder)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
            (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def resumed(shared, finished):
    """Returns the folder of a resumed run: ``out/``, ``stdout.txt``, ``killed/``."""
    with once(shared, "resumed") as (folder, first):
        if first:
            line = (*tiny("out"), "--checkpoint-seconds", "0")
            killed = command(*line, script=("-c", KILL), cwd=folder)
            assert killed.returncode == -signal.SIGKILL, killed.stderr
            shutil.copytree(folder / "out", folder / "killed")
            done = command(*line, cwd=folder)
            assert done.returncode == 0, done.stderr
            (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def trained(shared):
    """Returns folders of teachers' runs with untrained variables."""
    with once(shared, "trained") as (folder, first):
        if first:
            settings = parse([*TINY, "--compilation-cache", "None", "--devices", "1"])
            problem = problems.prepare(settings, folder)
            run = runs.teacher_run(problem)
            variables = problem.init(problem.model("ResNet9", 4), 0)
            for dataset in ("digits", "mnist"):
                meta = {"run": {**run.identity, "dataset": dataset}}
                checkpoint.save(folder / dataset / "checkpoints", 2, variables, meta)
            source = models.source_digest(NETWORK)
            own = {"teacher_model": NETWORK, "teacher_model_source": source}
            variables = problem.init(problem.model(NETWORK, 4), 0)
            meta = {"run": {**run.identity, **own}}
            checkpoint.save(folder / "small" / "checkpoints", 2, variables, meta)
    return folder
