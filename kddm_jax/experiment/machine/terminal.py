"""Prints progress, warnings and errors of a command."""

import sys
import warnings
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kddm_jax.checkpoint import CheckpointError
from kddm_jax.data import DataError
from kddm_jax.experiment.machine import processes, signals
from kddm_jax.experiment.machine.errors import RunError, UserError
from kddm_jax.experiment.machine.records import distance_of
from kddm_jax.numerics.convolution import prefer_eigen


class Reporter:
    """Shows a live bar for each run on a terminal, or prints a line for each epoch."""

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
        """Shows the newest numbers of a run."""
        ended = "epoch" in metrics
        if not self.live and not ended:
            return
        name = run.label
        last = lambda key: float(_last(metrics[key]))
        parts = [f"loss {last('loss'):.3f}"]
        distance = distance_of(metrics, run.name, run.weights)
        if distance is not None:
            parts.append(f"distance {float(_last(distance)):.3g}")
        parts.append(f"train {100 * last('accuracy'):.1f} %")
        if "test_accuracy" in metrics:
            parts.append(f"eval {metrics['test_accuracy']:.1f} %")
        if speed:  # 0 if all steps of the epoch were in the dispatch that compiled
            parts.append(f"{speed:.0f} images/s")
        numbers = "  ".join(parts)
        if not self.live:
            self.console.print(f"{name}: epoch {epoch + 1}  {numbers}")
            return
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total, numbers="")
        self.progress.update(self.tasks[name], completed=done, numbers=numbers)

    def remove(self, run) -> None:
        """Removes a run's bar, if it has one."""
        if run.label in self.tasks:
            self.progress.remove_task(self.tasks.pop(run.label))


def _last(value):
    # on the host, because one process cannot compute with arrays of all processes
    return value if isinstance(value, float) else np.asarray(value)[-1]


def _show_warning(message, *_, **__):
    if not processes.quiet():
        print(f"warning: {message}", file=sys.stderr)


def _say(error, text):
    """Prints an error, unless another process does."""
    if not processes.was_told(error):
        print(f"error: {text}", file=sys.stderr)


def answer_errors(work: Callable[[], object]) -> int:
    """Runs a command, and turns its errors into one line and an exit status.

    This also chooses how XLA computes convolutions, so it must be called before JAX
    first looks for devices.

    Args:
      work: function that runs the command.

    Returns:
      The exit status.
    """
    prefer_eigen()
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
    except RunError as error:  # all processes have the same numbers and the same error
        if not processes.quiet():
            _say(error, error)
        return 1
    except KeyboardInterrupt:
        print("stopped; rerun the command to resume", file=sys.stderr)
        return 130
    except signals.Terminated:
        if not processes.quiet():
            print("stopped by SIGTERM; rerun the command to resume", file=sys.stderr)
        return signals.STATUS
    return 0


def console() -> Console:
    """Returns a console that prints lines unchanged, unbroken and without markup.

    Only the first process prints.
    """
    quiet = processes.quiet()
    return Console(soft_wrap=True, markup=False, highlight=False, quiet=quiet)
