"""Distils a ResNet34 into a ResNet18 with KD2M's distances and prints the table.

    python experiments/cifar.py --dataset digits
    python experiments/cifar.py --dataset cifar10 --data-dir DIR --recipe strong

See ``--help`` for every setting and experiments/README.md for measured results.
"""

import os

# Before the first import of NumPy or JAX: OpenBLAS's own threads turn a 1 ms SVD
# into 800 ms when another job keeps a core busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import contextlib
import fcntl
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kddm_jax.checkpoint import CheckpointError
from kddm_jax.convolution import prefer_eigen
from kddm_jax.data import DataError
from kddm_jax.experiment.machine import processes, records, signals
from kddm_jax.experiment.machine.errors import RunError, UserError
from kddm_jax.experiment.report import table as report
from kddm_jax.experiment.settings import Settings, as_json, parse
from kddm_jax.experiment.training import outputs as layers
from kddm_jax.experiment.training import problems, runs
from kddm_jax.experiment.training import train as training
from kddm_jax.experiment.training.teacher import (
    find_teacher,
    known_digest,
    load_teacher,
)

prefer_eigen()  # before JAX computes anything


class Reporter:
    """A live bar per run on a terminal, else one line per epoch."""

    def __init__(self, console: Console, live: bool):
        self.console, self.live, self.tasks = console, live, {}
        self.progress = Progress(
            TextColumn("{task.description:>14}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not live,
        )

    def __call__(self, run, *, epoch, done, total, metrics, speed):
        """Shows a run's newest numbers."""
        ended = "epoch" in metrics
        if not self.live and not ended:
            return
        name = run.label
        last = lambda key: float(_last(metrics[key]))
        parts = [f"loss {last('loss'):.3f}"]
        distance = report.distance_of(metrics, run.name)
        if distance is not None:
            parts.append(f"distance {float(_last(distance)):.3g}")
        parts.append(f"train {100 * last('accuracy'):.1f} %")
        if "test_accuracy" in metrics:
            parts.append(f"eval {metrics['test_accuracy']:.1f} %")
        parts.append(f"{speed:.0f} images/s")
        numbers = "  ".join(parts)
        if not self.live:
            self.console.print(f"{name}: epoch {epoch + 1}  {numbers}")
            return
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total, numbers="")
        self.progress.update(self.tasks[name], completed=done, numbers=numbers)


def _last(value):
    # on the host: one process alone computes nothing with arrays of all
    return value if isinstance(value, float) else np.asarray(value)[-1]


@contextlib.contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Refuses a folder in which another command is at work."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--out {out}: another command is at work in this folder; "
                "wait for its end, or choose another --out"
            ) from error
        yield


def run_all(settings: Settings, console: Console) -> dict[str, object]:
    """Runs the experiment: teacher, students alone, distilled students."""
    out = settings.out or Path("runs") / f"{settings.dataset}-{settings.recipe}"

    # --- all that can be wrong, before anything is trained or written ----------
    problem = prepare(settings, out)
    source = find_teacher(problem)
    runs.check_distances(problem, source.model)
    planned = [] if source.given else [runs.teacher_run(problem)]
    planned += runs.student_runs(problem, known_digest(source))

    with contextlib.ExitStack() as stack:
        processes.first(lambda: open_folder(out, planned, stack))
        return _train_all(problem, source, console)


def open_folder(
    out: Path, planned: Iterable[runs.Run], stack: contextlib.ExitStack
) -> None:
    """Makes a folder, and keeps other commands out of it until the stack is closed.

    Args:
      out: where results go.
      planned: what this command will train there.
      stack: of contexts.

    Raises:
      UserError: a planned run's folder was made by other settings, ``out`` cannot be
        made, or another command is at work in it.
    """
    for run in planned:
        runs.check_folder(run, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another") from error
    stack.enter_context(only_one(out))


def prepare(settings: Settings, out: Path) -> problems.Problem:
    """Loads the data in every process; all must have the same."""
    problem = processes.together(lambda: problems.prepare(settings, out))
    processes.together(lambda: problem.starts)  # files that each of them reads
    weights = {who: start.sha256 for who, start in problem.starts.items()}
    processes.agree_on(settings, problem.dataset, weights)
    return problem


def _train_all(problem, source, console):
    """Trains what is not trained yet, writes and shows the table."""
    began = time.monotonic()
    settings, out, parts = problem.settings, problem.out, problem.parts
    console.print(
        f"{settings.dataset}: {len(parts.teacher)} images for the teacher, "
        f"{len(parts.student)} for students, {len(parts.eval_labels)} to evaluate on; "
        f"{len(problem.devices)} {problem.devices[0].platform} device(s)"
        f"{'; images are streamed from the host' if problem.streams else ''}"
    )
    for who, weights in problem.starts.items():
        console.print(f"{who} starts from {weights}")

    # --- teacher, then students ------------------------------------------------
    live = settings.progress and console.is_terminal and not processes.quiet()
    reporter = Reporter(console, live)
    with reporter.progress:
        teacher = load_teacher(source, reporter)
        reporter.progress.console.print(f"teacher: {teacher.accuracy:.2f} %")
        layers.prepare(problem, teacher, reporter.progress.console)
        results = []
        student = problem.model(settings.student_model, settings.width)
        for run in runs.student_runs(problem, teacher.digest):
            result = training.train(problem, run, student, teacher, reporter)
            reporter.progress.console.print(f"{run.label}: {result['accuracy']:.2f} %")
            results.append(result)

    trained = teacher.result
    summary = {
        "settings": as_json(settings),
        "eval_images": len(parts.eval_labels),
        "teacher": {
            "model": type(teacher.model).__name__,
            "width": teacher.width,
            "accuracy": teacher.accuracy,
            "best_accuracy": trained and trained["best_accuracy"],
            "digest": teacher.digest,
            "pretrained": trained and trained["settings"].get("pretrained"),
            "history": trained and trained["history"],
            "timing": trained and trained["timing"],
            "environment": trained and trained["environment"],
        },
        "runs": results,
        "environment": records.environment(problem.devices),
        "timing": {"seconds": time.monotonic() - began},
    }
    processes.first(lambda: report.write(summary, out))
    report.show(summary, console)

    def page():
        # scikit-learn's manifolds, jinja2 and matplotlib: no command need wait for them
        from kddm_jax.experiment.report import embedding
        from kddm_jax.experiment.report import page as html_report

        html_report.write(summary, embedding.find(problem, teacher, results), out)

    processes.first(page)
    alone = max(r["accuracy"] for r in results if r["name"] == "student")
    if teacher.accuracy <= alone:
        console.print(
            f"The teacher ({teacher.accuracy:.2f} %) is no better than the student "
            f"alone ({alone:.2f} %): there is nothing to distil. The paper recipe "
            "needs ImageNet weights (--pretrained-teacher, --pretrained-student); "
            "without them use --recipe strong."
        )
    console.print(f"{out}/report.html, results.json, table.md, curves.png")
    return summary


def _show_warning(message, *_, **__):
    if not processes.quiet():
        print(f"warning: {message}", file=sys.stderr)


def _say(error, text):
    """Prints an error, unless another process does."""
    if not processes.was_told(error):
        print(f"error: {text}", file=sys.stderr)


def answer_errors(work) -> int:
    """Runs ``work``; mistakes become one line and an exit status."""
    try:
        with signals.listening(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            work()
    except (UserError, DataError, CheckpointError) as error:
        _say(error, error)
        return 2
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        _say(error, what)
        return 2
    except RunError as error:  # of numbers that all processes have
        if not processes.quiet():
            _say(error, error)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    except signals.Terminated:
        if not processes.quiet():
            print("stopped by SIGTERM; the same command continues", file=sys.stderr)
        return signals.STATUS
    return 0


def console() -> Console:
    """Prints lines as they are: unbroken, brackets in paths being no markup.

    The first process prints, the others are quiet.
    """
    quiet = processes.quiet()
    return Console(soft_wrap=True, markup=False, highlight=False, quiet=quiet)


def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""

    def work():
        settings = parse(arguments)
        processes.start(settings)
        run_all(settings, console())

    return answer_errors(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
