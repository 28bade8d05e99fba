"""Counts the steps of a run, and saves and restores its checkpoints.

A checkpoint may be written between any two dispatches. It contains the sums over the
epoch's steps so far, in float64 and in order, so that an interrupted run that is
resumed ends with the same history, to the last bit.
"""

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kddm_jax import checkpoint, train_step
from kddm_jax.experiment.machine import processes, signals
from kddm_jax.experiment.machine.errors import RunError


def _cause(taught):
    """Describes which numbers of a step were not finite."""
    if taught:
        return "loss or gradient not finite"
    return "features or logits of the teacher not finite"


def _fix(taught):
    if taught:
        return "lower --lr or the weight in another --out"
    return "check the teacher's weights, or try --dtype float32, in another --out"


@dataclass
class Tally:
    """Contains sums over the steps of an epoch.

    Attributes:
      steps: number of steps taken.
      skipped: number of steps whose loss or gradient was not finite; the sums do not
        include them.
      untaught: number of skipped steps in which the teacher's outputs were not finite.
      sums: sums of the metrics.
    """

    steps: int = 0
    skipped: int = 0
    untaught: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: Mapping) -> None:
        """Adds the metrics of a dispatch, which are on the host."""
        columns = {k: np.atleast_1d(v).astype(np.float64) for k, v in metrics.items()}
        finite = columns.pop("finite") > 0
        taught = columns.pop("teacher_finite", np.ones(finite.shape)) > 0
        for name, column in columns.items():
            total = float(np.sum(column[finite]))
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.steps += finite.size
        self.skipped += int(np.sum(~finite))
        self.untaught += int(np.sum(~finite & ~taught))

    def means(self) -> dict[str, float]:
        """Returns the mean of each metric over the steps that were not skipped."""
        kept = self.steps - self.skipped
        return {name: total / kept for name, total in self.sums.items()}

    def complaints(self) -> Iterator[str]:
        """Yields a line for each problem in these steps."""
        if self.skipped:
            line = f"{self.skipped} of {self.steps} steps skipped: {_cause(True)}"
            yield line + (
                f" ({self.untaught} of them: {_cause(False)})" if self.untaught else ""
            )
        for name, mean in self.means().items():
            term, _, stat = name.rpartition("/")
            if stat == "converged" and mean < 1:
                yield (
                    f"the solver of {term} did not converge in {100 * (1 - mean):.1f} "
                    "% of the steps: value and gradient are rough there"
                )


def _first_not_finite(metrics):
    """Finds a dispatch's first step whose loss or gradient is not finite."""
    bad = np.flatnonzero(~np.atleast_1d(metrics["finite"]).astype(bool))
    if not bad.size:
        return None
    terms = {k: float(np.atleast_1d(v)[bad[0]]) for k, v in metrics.items()}
    terms.pop("finite")
    return int(bad[0]), terms


@dataclass
class Progress:
    """Contains the progress of a run.

    Attributes:
      title: name of the run, for messages.
      folder: folder of the run's checkpoints.
      about: metadata that is stored in each checkpoint.
      steps: number of steps in an epoch.
      state: the state after the newest step.
      history: a record of each finished epoch.
      tally: sums over the steps of the unfinished epoch.
      earlier: seconds that earlier commands spent.
      first_step: seconds to the end of this command's first step.
      last: the newest checkpoint, None before the first.
      began: time at which this command started the run, by the monotonic clock.
      saved: time of this command's newest checkpoint, by the monotonic clock.
    """

    title: str
    folder: Path
    about: Mapping[str, Any]
    steps: int
    state: train_step.TrainState
    history: list[dict[str, Any]] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    earlier: float = 0.0
    first_step: float | None = None
    last: Path | None = None
    began: float = field(init=False)
    saved: float = field(init=False)

    def __post_init__(self):
        """Restores the newest checkpoint that is not damaged."""
        self.began = self.saved = time.monotonic()
        last = processes.first(lambda: str(checkpoint.latest(self.folder) or ""))
        self.last = Path(last) if last else None
        self.state = processes.first_tree(self._restored, self.state)
        if self.last is not None:
            last = self.last
            meta: Any = processes.first(lambda: checkpoint.read_meta(last))
            self.earlier = meta["seconds"]
            self.history = meta["history"]
            self.tally = Tally(**meta.get("tally", {}))

    def _restored(self):
        if self.last is None:
            return self.state
        return checkpoint.restore(self.last, self.state)[0]

    @property
    def epoch(self) -> int:
        """Returns the number of finished epochs."""
        return len(self.history)

    @property
    def taken(self) -> int:
        """Returns the number of steps taken in the unfinished epoch."""
        return self.tally.steps

    @property
    def step(self) -> int:
        """Returns the number of steps taken."""
        return self.epoch * self.steps + self.taken

    @property
    def seconds(self) -> float:
        """Returns the seconds spent, including those of earlier commands."""
        return self.earlier + time.monotonic() - self.began

    def take(self, metrics: Mapping, *, stop: bool) -> None:
        """Counts the steps of a dispatch; ``stop`` raises if one is not finite."""
        bad = _first_not_finite(metrics) if stop else None
        if bad is not None:
            raise RunError(self._not_finite(*bad))
        self.tally.add(metrics)

    def _not_finite(self, place, terms):
        taught = terms.pop("teacher_finite", True)
        said = ", ".join(f"{name} {value:.6g}" for name, value in terms.items())
        step = self.step + place + 1
        last = f"last checkpoint: {self.last}" if self.last else "no checkpoint yet"
        return (
            f"{self.title}: {_cause(taught)} at step {step} ({said}); {_fix(taught)}, "
            f"or leave such steps out by --on-nonfinite skip; {last}"
        )

    def means(self) -> dict[str, float]:
        """Returns means over the epoch's steps, and warns about problems in them."""
        epoch = self.epoch + 1
        if self.tally.skipped == self.tally.steps:
            taught = self.tally.untaught < self.tally.skipped
            raise RunError(
                f"{self.title}: {_cause(taught)} at any of the {self.taken} steps of "
                f"epoch {epoch}; {_fix(taught)}"
            )
        for complaint in self.tally.complaints():
            warnings.warn(f"{self.title}: epoch {epoch}: {complaint}", stacklevel=3)
        return self.tally.means()

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Records the epoch and starts an empty tally."""
        self.history.append(record)
        self.tally = Tally()

    def due(self, seconds: float) -> bool:
        """Returns whether the last checkpoint is at least ``seconds`` old."""
        return time.monotonic() - self.saved >= seconds

    def save(self) -> None:
        """Writes a checkpoint."""
        meta = {
            **self.about,
            "history": self.history,
            "tally": asdict(self.tally),
            "seconds": self.seconds,
        }
        save = lambda: checkpoint.save(self.folder, self.step, self.state, meta)
        self.last = Path(processes.first(lambda: str(save())))
        self.saved = time.monotonic()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Measures the time of a run; saves on SIGTERM at the next `signals.check`."""
        self.began = self.saved = time.monotonic()
        with signals.held():
            try:
                yield
            except signals.Terminated:
                self.save()
                raise
            if processes.any_of(signals.asked()):  # since the processes last agreed
                signals.ask()  # raised at the end of `held`, when all is saved
