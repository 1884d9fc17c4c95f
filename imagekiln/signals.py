"""Stopping politely: the first signal ends the work where it is safe, the second one ends it now.

Outside `deferred()` the first SIGINT, SIGTERM or SIGHUP raises `Interrupted` at once, so every loop of the program can
be left. Inside `deferred()` it only sets a flag; the loop asks `pending()` where its state is whole, saves, and leaves.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from imagekiln.errors import Interrupted

_names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
_received: list[str] = []
_depth = 0


def pending() -> str | None:
    """The name of the signal that asked us to stop, or None."""
    return _received[0] if _received else None


def raise_if_pending() -> None:
    """Raise `Interrupted` when a signal has come in."""
    if _received:
        raise Interrupted(f"Stopped by {_received[0]}. Run the same command again to continue.")


def _handle(number: int, frame: object) -> None:
    _received.append(signal.Signals(number).name)
    if any(name != "SIGHUP" for name in _received[1:]):  # a terminal that closes hangs up after its Ctrl-C
        os._exit(130)  # the user insists; what is on disk is whole, because every file is written aside and renamed
    if _depth == 0:
        raise_if_pending()


@contextmanager
def handled() -> Iterator[None]:
    """Install the handlers for the duration of a command (main thread only; elsewhere this does nothing)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.signal(getattr(signal, name), _handle) for name in _names}
    _received.clear()
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
        _received.clear()


@contextmanager
def deferred() -> Iterator[None]:
    """Hold a signal back until the block ends; the block asks `pending()` itself."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
