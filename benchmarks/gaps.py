"""Milliseconds a step in which a device has nothing to do, from a profiler's trace."""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

# Lines of a trace on which a device's own work stands: a GPU's streams, a TPU's
# operations, the threads in which XLA computes on a CPU.  Others repeat the same work
# under other names, whole programs among them, and would hide what lies between.
LINES = {
    "gpu": ("/device:GPU:", re.compile(r"Stream #")),
    "tpu": ("/device:TPU:", re.compile(r"XLA Ops$")),
    "cpu": ("/host:CPU", re.compile(r"tf_XLA")),
}


def idle_ms(dispatch: Callable[[], object], dispatches: int) -> float | None:
    """Time between the first and the last piece of work in which there is none.

    Dispatches follow each other as in training: none is awaited but the last.

    Args:
      dispatch: queues the work of one dispatch and returns what it gives.
      dispatches: how many, at least two.

    Returns:
      Milliseconds a dispatch, of those that follow another; None where the trace says
      nothing of the device.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(dispatches):
                last = dispatch()
            jax.block_until_ready(last)
        work = []
        for file in Path(folder).rglob("*.xplane.pb"):
            work += _intervals(jax.profiler.ProfileData.from_file(str(file)))
    return idle_ns(sorted(work)) / (dispatches - 1) / 1e6 if work else None


def _intervals(trace) -> Iterator[tuple[float, float]]:
    planes, lines = LINES.get(jax.default_backend(), ("none", None))
    for plane in trace.planes:
        for line in plane.lines if plane.name.startswith(planes) else ():
            if lines.match(line.name):
                for event in line.events:
                    if event.duration_ns:
                        yield event.start_ns, event.start_ns + event.duration_ns


def idle_ns(work: Iterable[tuple[float, float]]) -> float:
    """Length of what no interval covers, from the first's start to the last's end.

    Args:
      work: ``(start, end)``, sorted by start.

    Returns:
      Its length, in their unit.
    """
    idle, until = 0.0, None
    for start, end in work:
        if until is not None and start > until:
            idle += start - until
        until = end if until is None else max(until, end)
    return idle
