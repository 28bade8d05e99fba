"""SIGTERM, which a scheduler or a spot machine sends before it kills.

Within `listening` it raises `Terminated`, at once; within `held` only where `check`
is called, so that what must stay together is never torn.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

STATUS = 128 + signal.SIGTERM  # what a shell calls a process that SIGTERM ended


class Terminated(BaseException):
    """Raised on SIGTERM; like KeyboardInterrupt, it is no Exception."""


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
    """Delays the answer to SIGTERM until `check`, or the end of the context."""
    _held.set()
    try:
        yield
    finally:
        _held.clear()
    check()


def asked() -> bool:
    """Returns whether SIGTERM came."""
    return _asked.is_set()


def ask() -> None:
    """Treats another process's SIGTERM as this process's own."""
    _asked.set()


def check() -> None:
    """Raises `Terminated` if SIGTERM came."""
    if asked():
        raise Terminated
