"""Runs one study over the devices of several hosts, with a process on each.

All processes run the same command and compute their devices' share of each batch. Only
the first process reads and writes the folder of results. It broadcasts what it reads,
so that all processes continue with the same numbers from the same step, even if they
cannot access that folder. Every process reads the data and the weights. With a single
process, the functions here only call their arguments.
"""

import hashlib
import importlib.util
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import serialization
from jax.experimental import multihost_utils

from kddm_jax import checkpoint, data
from kddm_jax.experiment.machine import signals
from kddm_jax.experiment.machine.errors import UserError

T = TypeVar("T")
Tree = TypeVar("Tree")
PATIENCE = 120.0  # seconds that the first process may start after others
LEAVE = 30  # seconds in which all processes must end after one has ended
SECOND = 1.0  # seconds between two agreements
CHUNK = 2**26  # bytes of a broadcast, which passes through the devices
_telling = False  # whether this process runs a function of `first`, without the others


def index() -> int:
    """Returns the index of this process; the first is 0."""
    return jax.process_index()


def count() -> int:
    """Returns the number of processes."""
    return jax.process_count()


def quiet() -> bool:
    """Returns whether another process does the printing; does not use devices."""
    return jax.distributed.is_initialized() and index() > 0


# ---------------------------------------------------------------------------
# Start.


def _on_slurm() -> bool:
    """Returns whether this is one of several tasks that `srun` started."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    several = int(os.environ.get("SLURM_NTASKS", 1)) > 1
    return several and all(name in os.environ for name in needed)


def _on_cloud_tpu(devices: Path = Path("/dev")) -> bool:
    """Returns whether there are TPU chips and their library."""
    allowed = os.environ.get("JAX_PLATFORMS") or "tpu"
    if "tpu" not in allowed.split(","):
        return False
    chips = [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


CLUSTERS = {"Slurm": _on_slurm, "Cloud TPU": _on_cloud_tpu}


def _meet(coordinator: str, process: int, seconds: float) -> None:
    """Raises an error if the port is taken or nobody answers; JAX would abort."""
    host, _, port = coordinator.rpartition(":")
    if process == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except (OSError, OverflowError) as error:
                raise UserError(
                    f"--coordinator {coordinator}: {error}; choose another port"
                ) from error
        return
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            if time.monotonic() > end:
                raise UserError(
                    f"--coordinator {coordinator}: {error}; it is the host of the "
                    "first process, which must run there"
                ) from error
            time.sleep(0.2)
        else:
            return


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Joins the other processes, if there are any, before JAX computes anything.

    Without a coordinator, Slurm and Cloud TPU are detected; ``--processes 1`` prevents
    this.

    Args:
      coordinator: HOST:PORT of the first process; None detects Slurm and Cloud TPU.
      processes: number of processes; 1 runs this process alone.
      process: index of this process.

    Raises:
      UserError: the processes do not find each other.
    """
    if jax.distributed.is_initialized() or processes == 1:
        return
    arguments = coordinator, processes, process
    place = f"--coordinator {coordinator}"
    if coordinator is None:
        place = next((name for name, found in CLUSTERS.items() if found()), None)
        if place is None:
            return
    else:
        _meet(coordinator, process or 0, PATIENCE)
    # JAX would catch SIGTERM, on which runs must write a checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(*arguments, shutdown_timeout_seconds=LEAVE)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{place}: {str(error).splitlines()[0]}; run the same command on every "
            "host, with --coordinator, --processes and --process if need be "
            "(--processes 1: this one alone)"
        ) from error


# ---------------------------------------------------------------------------
# Broadcasts of the first process.


def _tell(message: bytes | None) -> bytes:
    """Returns the first process's message in all processes."""
    # as bytes, because JAX would reduce it to 32 bits
    size = np.frombuffer(np.int64(len(message or b"")).tobytes(), np.uint8)
    size = int(np.asarray(multihost_utils.broadcast_one_to_all(size)).view(np.int64)[0])
    told, parts = np.frombuffer(message or bytes(size), np.uint8), []
    for start in range(0, size, CHUNK):
        part = told[start : start + CHUNK]
        # in few different sizes, because a program is compiled for each
        room = 1 << max(8, (len(part) - 1).bit_length())
        whole = multihost_utils.broadcast_one_to_all(
            np.pad(part, (0, room - len(part)))
        )
        parts.append(np.asarray(whole)[: len(part)].tobytes())
    return b"".join(parts)


def _outcome(fn: Callable[[], Any]) -> tuple[Any, Any]:
    """Returns ``(value, None)``, or ``(None, error)`` if the call failed."""
    try:
        return fn(), None
    except BaseException as error:
        return None, error


ERRORS = {
    kind.__name__: kind
    for kind in (
        *(UserError, data.DataError, checkpoint.CheckpointError),
        *(OSError, KeyboardInterrupt, signals.Terminated),
    )
}


def _written(value, error) -> bytes:
    """Serializes a value or an error."""
    if error is None:
        return serialization.msgpack_serialize({"value": value})
    kinds = (kind.__name__ for kind in type(error).__mro__)
    kind = next((name for name in kinds if name in ERRORS), "RuntimeError")
    return serialization.msgpack_serialize({"error": [kind, str(error)]})


def _read(message: bytes) -> tuple[Any, Any]:
    found = serialization.msgpack_restore(message)
    if "value" in found:
        return found["value"], None
    kind, text = found["error"]
    error: Any = ERRORS.get(kind, RuntimeError)(text)
    error.told = True
    return None, error


def first(fn: Callable[[], T]) -> T:
    """Calls a function in the first process and broadcasts its value or its error.

    All processes must make these calls in the same order.

    Args:
      fn: function that is called in the first process only; it returns NumPy arrays,
        numbers, strings, None, or lists and dictionaries of them.

    Returns:
      The value of the function.
    """
    global _telling
    if count() == 1 or _telling:
        return fn()
    if index() == 0:
        _telling = True
        value, error = _outcome(fn)
        _telling = False
        message, unwritten = _outcome(lambda: _written(value, error))
        _tell(message or _written(None, unwritten))
        error = error or unwritten
    else:
        value, error = _read(_tell(None))
    if error is not None:
        raise error
    return value


def first_tree(fn: Callable[[], Tree], like: Tree) -> Tree:
    """Does the same as `first` for a function that returns a tree of arrays.

    Args:
      fn: function that is called in the first process only.
      like: a tree of the same structure, in all processes.

    Returns:
      The function's tree, on the host.
    """
    if count() == 1:
        return fn()
    shared: Any = first(lambda: serialization.to_state_dict(jax.device_get(fn())))
    whole: Any = serialization.from_state_dict(like, shared)
    return whole


def together(fn: Callable[[], T]) -> T:
    """Calls a function in every process; if it fails in one, all stop.

    Args:
      fn: function that is called in all processes.

    Returns:
      The value of the function in this process.

    Raises:
      UserError: the function failed in another process, which prints the reason.
    """
    if count() == 1:
        return fn()
    value, error = _outcome(fn)
    failed = multihost_utils.process_allgather(np.array(error is not None))
    if error is not None:
        raise error
    if np.any(failed):
        raise UserError(f"process {int(np.argmax(failed))} stopped; see its error")
    return value


def any_of(value: bool) -> bool:
    """Returns whether a value is true in any process; all processes must call it."""
    if count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


def was_told(error: BaseException) -> bool:
    """Returns whether another process has printed this error."""
    return getattr(error, "told", False)


SAMPLE = 1000  # number of images that are compared


def agree_on(
    shared: Mapping[str, Any], dataset: data.Dataset, weights: Mapping[str, str]
) -> None:
    """Stops all processes unless they have the same settings, images and weights.

    Args:
      shared: the settings that all processes must share.
      dataset: the data set that this process has read; only some of its images are
        compared.
      weights: SHA-256 of the files that networks start from.

    Raises:
      UserError: a process has other settings, images or weights than the first.
    """
    if count() == 1:
        return
    images = dataset.train_images
    some = np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(int)
    others = dataset.test_images[:SAMPLE]
    arrays = images[some], others, dataset.train_labels, dataset.test_labels
    of_images = [(a.shape, hashlib.sha256(a.tobytes()).digest()) for a in arrays]
    _agree("settings", dict(shared), "give all the same command")
    _agree("images or labels", of_images, "give all the same data")
    _agree("weights", dict(weights), "give all the same files")


def _agree(what, value, cure):
    value = repr(value).encode()
    digest = np.frombuffer(hashlib.sha256(value).digest(), np.uint8)
    every = multihost_utils.process_allgather(digest)
    others = np.flatnonzero(np.any(every != every[0], axis=1))
    if others.size:
        error: Any = UserError(
            f"process {others[0]} has other {what} than process 0; {cure}"
        )
        error.told = index() > 0
        raise error


class Watch:
    """Decides after which dispatches all processes check for signals and checkpoints.

    Clocks and signals differ between processes, but all must stop after the same step,
    or the others would wait for ever. Devices wait during an agreement, so there is one
    about every second; the first process decides after how many dispatches.
    """

    def __init__(self):
        self.span = self.left = 1
        self.began = time.monotonic()

    def looks(self, ready: bool) -> bool:
        """Returns whether to check now; with a single process, returns ``ready``."""
        self.left -= 1
        return ready if count() == 1 else self.left == 0

    def agree(self, asked: bool, due: bool) -> tuple[bool, bool]:
        """Returns whether any process must stop, and whether a checkpoint is due."""
        if count() == 1:
            return asked, due
        if self.left:
            return False, False
        fitting = self.span * SECOND / max(time.monotonic() - self.began, 1e-6)
        span = min(max(int(fitting), 1), 2 * self.span)
        own = np.array([asked, due, span], np.int32)
        every = multihost_utils.process_allgather(own)  # [processes, 3]
        self.span = self.left = int(every[0, 2])
        self.began = time.monotonic()
        return bool(np.any(every[:, 0])), bool(every[0, 1])


# ---------------------------------------------------------------------------
# Devices.


def choose_devices(wanted: int | None) -> list[Any]:
    """Returns the devices of a run, the same number from each process, in order.

    Args:
      wanted: number of devices of all processes; None uses all.

    Returns:
      The devices, the same list in every process.

    Raises:
      UserError: there are fewer devices, or they do not divide among the processes.
    """
    by_process = [
        [device for device in jax.devices() if device.process_index == process]
        for process in range(count())
    ]
    fewest, most = min(map(len, by_process)), max(map(len, by_process))
    if wanted is None and fewest < most:
        raise UserError(
            f"processes have {fewest} to {most} devices; pass --devices "
            f"{fewest * count()}, as many of each"
        )
    wanted = fewest * count() if wanted is None else wanted
    if wanted > fewest * count():
        has = "this machine has" if count() == 1 else f"{count()} processes have"
        raise UserError(f"--devices {wanted}: {has} {fewest * count()}; lower it")
    if wanted % count():
        raise UserError(
            f"--devices {wanted} does not divide among {count()} processes; choose a "
            f"multiple of {count()}"
        )
    return [device for own in by_process for device in own[: wanted // count()]]


def mine(devices: Sequence[Any]) -> range:
    """Returns the range of this process's devices."""
    own = [i for i, device in enumerate(devices) if device.process_index == index()]
    return range(own[0], own[-1] + 1)
