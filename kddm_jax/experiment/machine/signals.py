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
    """SIGTERM came; no handler of errors sees it, as with KeyboardInterrupt."""


_asked = threading.Event()
_held = threading.Event()


def _on_sigterm(number, frame):
    _asked.set()
    if not _held.is_set():
        raise Terminated


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated`; only the main thread can ask for it."""
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
    """Within, SIGTERM waits for `check`, or for the end."""
    _held.set()
    try:
        yield
    finally:
        _held.clear()
    check()


def asked() -> bool:
    """Whether SIGTERM came."""
    return _asked.is_set()


def ask() -> None:
    """Takes another process's SIGTERM for one's own."""
    _asked.set()


def check() -> None:
    """Raises `Terminated` if SIGTERM came."""
    if asked():
        raise Terminated
