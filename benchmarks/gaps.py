"""Measures how long a device is idle in a step, from a profiler's trace."""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

# Lines of a trace that show a device's work: the streams of a GPU, the operations of a
# TPU, the threads of XLA on a CPU.  Other lines repeat the same work under other names,
# for example as whole programs, and would hide the gaps.
LINES = {
    "gpu": ("/device:GPU:", re.compile(r"Stream #")),
    "tpu": ("/device:TPU:", re.compile(r"XLA Ops$")),
    "cpu": ("/host:CPU", re.compile(r"tf_XLA")),
}


def idle_ms(dispatch: Callable[[], object], dispatches: int) -> float | None:
    """Measures the idle time between the first and the last piece of work.

    Dispatches follow each other as in training: only the last one is awaited.

    Args:
      dispatch: function that queues the work of one dispatch and returns its results.
      dispatches: number of dispatches, at least two.

    Returns:
      Milliseconds per dispatch, not counting the first; None if the trace does not
      contain the device.
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
    """Computes the time that no interval covers, from first start to last end.

    Args:
      work: ``(start, end)``, sorted by start.

    Returns:
      The time, in the unit of the intervals.
    """
    idle, until = 0.0, None
    for start, end in work:
        if until is not None and start > until:
            idle += start - until
        until = end if until is None else max(until, end)
    return idle
