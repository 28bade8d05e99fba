"""Profiles some training steps of a run by JAX's profiler."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from kddm_jax.experiment.machine import processes


@contextlib.contextmanager
def profiling(
    program: Callable[..., Any], length: int, folder: Path, steps: int
) -> Iterator[Callable[..., Any]]:
    """Profiles steps inside a ``with`` block, in the first process.

    The first call is left out, because it compiles. Calls are profiled whole, so there
    may be more steps than asked for. If the block ends early, there are fewer.
    If a trace cannot be made or written, there is a warning, and the block goes on.

    Args:
      program: a function that takes steps, such as one of `train_step.parallel`.
      length: number of steps in a call.
      folder: folder in which the trace is written, in ``plugins/profile``.
      steps: number of steps to profile; 0 profiles nothing.

    Yields:
      The program, to call in the block.
    """
    left, running = steps, False
    options = jax.profiler.ProfileOptions()
    # The calls of Python functions fill a trace: writing one with imports took 47 s.
    options.python_tracer_level = 0

    def attempt(call, *arguments, **options):
        """Calls a function of the profiler and returns whether it worked."""
        nonlocal left
        try:
            call(*arguments, **options)
        except Exception as error:
            warnings.warn(f"no trace in {folder}: {error}", stacklevel=2)
            left = 0
            return False
        return True

    def stop():
        nonlocal running
        running = False
        attempt(jax.profiler.stop_trace)

    def profiled(*arguments):
        nonlocal left, running
        found = program(*arguments)
        if running:
            left -= length
            if left <= 0:
                jax.block_until_ready(found)
                stop()
        elif left > 0:
            jax.block_until_ready(found)
            running = attempt(
                jax.profiler.start_trace,
                folder,
                create_perfetto_trace=True,
                profiler_options=options,
            )
        return found

    try:
        yield profiled if steps and processes.index() == 0 else program
    finally:
        if running:
            stop()
