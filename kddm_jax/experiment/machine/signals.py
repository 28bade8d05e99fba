"""Handles SIGTERM, which a scheduler or a spot machine sends before it kills.

Within `listening`, SIGTERM raises `Terminated` immediately. Within `held`, it is raised
only by `check`, so that operations that belong together are not interrupted.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

STATUS = 128 + signal.SIGTERM  # a shell's exit status for a process ended by SIGTERM


class Terminated(BaseException):
    """Is raised on SIGTERM; like KeyboardInterrupt, it is not an Exception."""


_asked = threading.Event()
_held = threading.Event()


def _on_sigterm(number, frame):
    _asked.set()
    if not _held.is_set():
        raise Terminated


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Raises `Terminated` on SIGTERM within the context, in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _asked.clear()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delays `Terminated` until `check` is called, or to the end of the context."""
    _held.set()
    try:
        yield
    finally:
        _held.clear()
    check()


def asked() -> bool:
    """Returns whether SIGTERM was received."""
    return _asked.is_set()


def ask() -> None:
    """Treats another process's SIGTERM as this process's own."""
    _asked.set()


def check() -> None:
    """Raises `Terminated` if SIGTERM was received."""
    if asked():
        raise Terminated
