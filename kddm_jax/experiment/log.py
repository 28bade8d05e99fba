"""Logs runs to their folders, as JSON lines and for programs such as TensorBoard.

`Log` collects what is logged: the numbers of each epoch, and with ``--log`` the norms
of the features of student and teacher, and a picture of the features at the end. A
`Backend` writes it by three functions, for numbers, for a histogram and for a picture;
an entry of `BACKENDS` adds another one. Only the first process writes, inside
`processes.first`, so that an error ends all processes. A step is the number of updates
made.
"""

import contextlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kddm_jax.experiment.machine import processes, records
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.settings import Settings
from kddm_jax.experiment.training.outputs import Network, features_of
from kddm_jax.experiment.training.problems import Problem
from kddm_jax.experiment.training.runs import Run
from kddm_jax.experiment.training.train import Teacher

BINS = 30  # of a histogram; NumPy's rules make too many if a value is far away


class Backend(Protocol):
    """Writes the log of one run.

    A backend is made by ``Backend(folder, step)``; the folder exists. Readers of the
    log must no longer see entries of an interrupted command at this step or later.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Opens the log."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by name to the disk, with everything before them."""

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Writes the distribution of numbers ``[n]``."""

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture, uint8 ``[h, w, 3]``."""

    def close(self) -> None:
        """Ends the log."""


class JsonLines:
    """Writes numbers to ``log.jsonl``, a JSON object for each epoch, and nothing else.

    JSON has no number that is not finite; null stands for it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "log.jsonl"
        kept = [line for line in _lines(self.path) if line["step"] < step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        records.write_text(self.path, text)
        self.file = self.path.open("a")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by name to the disk."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with records.naming(self.path):
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
            self.file.flush()

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Leaves a distribution out."""

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Leaves a picture out."""

    def close(self) -> None:
        """Ends the log."""
        with records.naming(self.path):
            self.file.close()


def _lines(path):
    """Reads JSON lines, without those that an interrupted command damaged."""
    found = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict) and isinstance(value.get("step"), int):
                    found.append(value)
    return found


class TensorBoard:
    """Writes event files of TensorBoard."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        messages: Any = event_pb2  # type checkers do not find its classes
        self.event = messages.Event
        # SummaryWriter hands events to a thread: its flush() does not wait for them,
        # and an error of the disk ends the thread.
        # The names of files have a time in seconds; a suffix keeps them apart.
        self.file = EventsWriter(str(folder / "events"), f".step-{step:08d}")
        self._write(step, session_log={"status": "START"})

    def _write(self, step, **content):
        event = self.event(wall_time=time.time(), step=step, **content)
        self.file.write_event(event)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by name to the disk, with everything before them."""
        # tensorboardX.summary.scalar would change the signs @ and : in names.
        found = [{"tag": k, "simple_value": v} for k, v in values.items()]
        self._write(step, summary={"value": found})
        self.file.flush()

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Writes the distribution of numbers ``[n]``."""
        from tensorboardX import summary

        self._write(step, summary=summary.histogram(name, values, BINS))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture, uint8 ``[h, w, 3]``."""
        from tensorboardX import summary

        picture = summary.image(name, pixels, dataformats="HWC")
        self._write(step, summary=picture)

    def close(self) -> None:
        """Ends the log."""
        self.file.close()


# By the value of --log: the backend and the package that it needs.
BACKENDS: Mapping[str, tuple[Callable[[Path, int], Backend], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
}


def check_log(settings: Settings) -> None:
    """Raises a `UserError` if a package that the log needs is not installed."""
    kind = settings.run.log
    if kind is None:
        return
    _, package = BACKENDS[kind]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--log {kind} needs {package}; install the extra: "
            f'pip install "kddm-jax[{kind}]"'
        )


class Log:
    """Logs the runs of a study, one after the other.

    `reporting` and `observing` wrap the functions that `train.train` calls. A run's log
    is opened at its first epoch and closed at its last, or when another run begins.
    """

    def __init__(self, problem: Problem) -> None:
        kind = problem.settings.run.log
        self.problem, self.folder, self.backends = problem, None, []
        self.opened = contextlib.ExitStack()  # closes all backends
        self.of_teacher = None  # its features, which are computed once
        self.features = kind is not None
        self.makers: list[Any] = [JsonLines, *([BACKENDS[kind][0]] if kind else [])]

    def _open(self, run: Run, step: int) -> list[Backend]:
        folder = run.folder(self.problem.out)
        if not self.backends or folder != self.folder:
            self.close()
            self.folder = folder
            for make in self.makers:
                self.backends.append(make(folder, step))
                self.opened.callback(self.backends[-1].close)
        return self.backends

    def close(self) -> None:
        """Closes the log of the last run."""
        self.backends = []
        self.opened.close()

    def reporting(self, report: Callable[..., None]) -> Callable[..., None]:
        """Adds the numbers of each epoch to a function that reports progress.

        Args:
          report: as in `train.train`, which calls it with an epoch's record before it
            writes the epoch's checkpoint.

        Returns:
          A function of the same arguments.
        """

        def logged(run, *, done, total, metrics, **shown):
            report(run, done=done, total=total, metrics=metrics, **shown)
            if "epoch" in metrics:
                processes.first(lambda: self._log_numbers(run, done, total, metrics))

        return logged

    def _log_numbers(self, run, step, last, values):
        """Logs the numbers of an epoch, and closes the log after the last step."""
        for backend in self._open(run, step):
            backend.scalars(step, values)
        if step == last:
            self.close()

    def observing(
        self, run: Run, teacher: Teacher, observe: Callable[[int, object], None]
    ) -> Callable[[int, object], None]:
        """Adds norms and picture of features to a function that observes a student.

        Args:
          run: the student's run.
          teacher: the teacher.
          observe: as in `train.train`.

        Returns:
          A function of the same arguments.
        """
        if not self.features:
            return observe
        optimizer = run.settings.optimizer
        steps = len(run.indices) // optimizer.batch_size

        def logged(epoch, variables):
            observe(epoch, variables)
            if epoch == run.epochs or epoch and epoch % optimizer.eval_every == 0:
                step = epoch * steps
                processes.first(
                    lambda: self._log_features(run, epoch, step, teacher, variables)
                )

        return logged

    def _log_features(self, run, epoch, step, teacher, variables):
        """Logs norms of features, and after the last epoch a picture of them."""
        from kddm_jax.experiment.report import embedding  # imports scikit-learn

        problem, logs = self.problem, self._open(run, step)
        images, chosen = problem.parts.eval_images, embedding.chosen_images(problem)
        of = lambda network: features_of(problem, network, "features", images, chosen)
        student = of(Network(problem.student, variables))
        found = {"student": student}
        if teacher.model is not None:
            if self.of_teacher is None:
                self.of_teacher = of(teacher)
            found = {"teacher": self.of_teacher, "student": student}
        for who, features in found.items():
            norms = np.linalg.norm(features, axis=1)
            norms = norms[np.isfinite(norms)]
            if norms.size:
                for log in logs:
                    log.histogram(step, f"feature_norm/{who}", norms)
        if epoch == run.epochs and problem.settings.run.embedding != "none":
            titles = {"teacher": ("teacher",) * 2, "student": (run.name, run.title)}
            networks = [(*titles[who], features) for who, features in found.items()]
            _log_picture(logs, step, embedding.panels_of(problem, networks))


def _log_picture(logs, step, found):
    from kddm_jax.experiment.report import curves, page  # import Matplotlib

    if found["panels"]:
        pixels = curves.pixels(page.features(found))
        for log in logs:
            log.image(step, "features", pixels)
