"""Opens a study, which contains everything that the runs of one command share.

Every command that trains opens its study here. `open` reads the data and finds the
teacher, checks all settings before anything is trained or written, locks the folder of
results, trains or reads the teacher, and computes the arrays that distances take from
the teacher. The command then trains the runs of the study.
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from kddm_jax.experiment.log import Log, check_log
from kddm_jax.experiment.machine import processes
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.machine.terminal import Reporter
from kddm_jax.experiment.recipes import defaults
from kddm_jax.experiment.report import table
from kddm_jax.experiment.settings import OWN, Settings, as_json
from kddm_jax.experiment.training import from_teacher, problems, runs, train
from kddm_jax.experiment.training.problems import Problem
from kddm_jax.experiment.training.runs import Run
from kddm_jax.experiment.training.teacher import (
    find_teacher,
    known_digest,
    load_teacher,
)
from kddm_jax.experiment.training.train import Teacher

Plan = Callable[[Problem, str | None], Iterable[Run]]


@dataclass(frozen=True)
class Study:
    """Contains all runs of one command, and the data and teacher that they share.

    Attributes:
      problem: the data, the devices and the settings.
      teacher: the trained teacher.
      runs: the students' runs, in the order of the plan.
      reporter: shows the progress of a run.
      log: writes the logs of every run.
    """

    problem: Problem
    teacher: Teacher
    runs: tuple[Run, ...]
    reporter: Reporter
    log: Log

    def train(
        self,
        run: Run,
        observe: Callable[[int, object], None] = lambda epoch, variables: None,
    ) -> dict[str, Any]:
        """Trains a student to its end, or reads its result if it has ended.

        Args:
          run: one of the study's runs.
          observe: called with the number of epochs done and the student's variables, as
            in `train.train`.

        Returns:
          The run's result, as in its ``result.json``.
        """
        problem = self.problem
        report = self.log.reporting(self.reporter)
        observe = self.log.observing(run, self.teacher, observe)
        return train.train(
            *(problem, run, problem.student, self.teacher, report), observe
        )

    def say(self, line: str) -> None:
        """Prints a line above the bars of progress."""
        self.reporter.progress.console.print(line)


def default_out(settings: Settings, suffix: str = "") -> Path:
    """Returns the folder of results in the settings, or a default one in ``runs``."""
    name = f"{settings.data.dataset}-{settings.run.recipe}{suffix}"
    return settings.run.out or Path("runs") / name


@contextlib.contextmanager
def open(
    settings: Settings,
    console: Console,
    *,
    suffix: str = "",
    plan: Plan = runs.student_runs,
    check: Callable[[Problem], None] = lambda problem: None,
) -> Iterator[Study]:
    """Opens a study, and keeps other commands out of its folder until it is closed.

    Args:
      settings: the settings of the command.
      console: console that prints the lines.
      suffix: end of the default folder's name, used if the settings have no folder.
      plan: function that returns the students' runs from the problem and the teacher's
        digest (None while the teacher is unknown).
      check: additional check of the command, called before anything is trained.

    Yields:
      The study, with a trained teacher.

    Raises:
      UserError: the settings do not fit the data, the devices, the networks or the
        folder; or another command is running in the folder.
    """
    out = default_out(settings, suffix)

    # --- all checks, before anything is trained or written ---------------------
    processes.first(lambda: check_log(settings))
    problem = _read(settings, out)
    source = find_teacher(problem)
    _check_options(settings, source)
    runs.check_distances(problem, source.model)
    check(problem)
    planned = [] if source.given else [runs.teacher_run(problem)]
    planned += plan(problem, known_digest(source))

    with contextlib.ExitStack() as stack:
        processes.first(lambda: _open_folder(out, planned, stack))
        _introduce(problem, console)
        live = settings.run.progress and console.is_terminal and not processes.quiet()
        reporter = Reporter(console, live)
        stack.enter_context(reporter.progress)
        console = reporter.progress.console
        log = stack.enter_context(contextlib.closing(Log(problem)))
        teacher = load_teacher(source, log.reporting(reporter))
        console.print(f"teacher: {teacher.accuracy:.2f} %")
        quality = from_teacher.prepare(problem, teacher, _draw_quality)
        if quality is not None:
            table.show_quality(quality, console)
        planned = tuple(plan(problem, teacher.digest))
        yield Study(problem, teacher, planned, reporter, log)


def _check_options(settings, source):
    """Refuses options that ask for another network than that of ``--teacher``.

    An option that has the recipe's value counts as not given.
    """
    asked = settings.networks
    if asked.teacher is None:
        return
    usual = defaults(settings.data.dataset, settings.run.recipe).networks
    for option, value, default, found in (
        ("--teacher-model", asked.teacher_model, usual.teacher_model, source.name),
        ("--teacher-width", asked.teacher_width, usual.teacher_width, source.width),
    ):
        if value not in (default, found):
            raise UserError(
                f"--teacher {asked.teacher} has {option} {found}, this command says "
                f"{value}; leave {option} out"
            )


def _read(settings, out):
    """Reads data and weights in every process, and checks that they are the same."""
    problem = processes.together(lambda: problems.prepare(settings, out))
    processes.together(lambda: problem.starts)  # every process reads these files
    weights = {who: start.sha256 for who, start in problem.starts.items()}
    shared = {k: v for k, v in as_json(settings).items() if k not in OWN}
    processes.agree_on(shared, problem.dataset, weights)
    return problem


def _introduce(problem, console):
    settings, parts = problem.settings, problem.parts
    unlabelled = len(parts.unlabelled)
    more = f" and {unlabelled} unlabelled ones for distilled ones" if unlabelled else ""
    console.print(
        f"{settings.data.dataset}: {len(parts.teacher)} images for the teacher, "
        f"{len(parts.student)} for students{more}, {len(parts.eval_labels)} to "
        "evaluate on; "
        f"{len(problem.devices)} {problem.devices[0].platform} device(s)"
        f"{'; images are streamed from the host' if problem.streams else ''}"
    )
    for line in problem.lowered:
        console.print(line)
    for who, weights in problem.starts.items():
        console.print(f"{who} starts from {weights}")


def _draw_quality(record, path):
    # Matplotlib is slow to import, so it is imported only if there is a plot to draw.
    from kddm_jax.experiment.report import curves

    curves.of_layers(record, path)


# ---------------------------------------------------------------------------
# The folder of results.


@contextlib.contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Locks a folder; raises if another command is running in it."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--out {out}: another command is running in this folder; "
                "wait until it ends, or choose another --out"
            ) from error
        yield


def _open_folder(out, planned, stack):
    """Checks and makes the folder, and locks it until the stack is closed."""
    for run in planned:
        runs.check_folder(run, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another") from error
    stack.enter_context(only_one(out))
