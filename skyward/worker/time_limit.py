"""The time limit of a chunk: it counts while the chunk runs, and not while a generator waits for its consumer."""

from __future__ import annotations

import contextlib
import faulthandler
import threading
import time
from collections.abc import Iterator

from skyward.transfer.wire import Kind
from skyward.worker import interrupts

_local = threading.local()  # the limit of the chunk that runs in this thread


_MARGIN_S = 0.5
"""Seconds after which a process that had to end by itself is ended from outside of Python. Chosen, not measured."""
_ends: dict[_TimeLimit, float] = {}
"""When the chunks with a limit that run here have to have ended, by `time.monotonic`."""
_lock = threading.Lock()


class _TimeLimit:
    """Interrupts the chunk `key` when it has run for `seconds`, and ends this process if it does not stop then.

    If native code holds the interpreter lock, no Python code can do that: `faulthandler` can. It prints where the code
    hangs. On a joined cluster the process is left alone.
    """

    def __init__(self, key: str, seconds: float) -> None:
        self._key = key
        self._left = seconds

    def start(self) -> None:
        self._began = time.monotonic()
        self._timer = threading.Timer(self._left, interrupts.interrupt, [[self._key], Kind.TIMEOUT])
        self._timer.daemon = True
        self._timer.start()
        with _lock:
            _ends[self] = self._began + self._left + interrupts.GRACE_S + _MARGIN_S
            _watch()

    def stop(self) -> None:
        with _lock:
            _ends.pop(self, None)
            _watch()
        self._timer.cancel()
        self._left = max(0.0, self._left - (time.monotonic() - self._began))


def _watch() -> None:
    """Have this process ended when the first of the chunks has to have ended."""
    if not interrupts.may_restart:
        return
    faulthandler.cancel_dump_traceback_later()
    if _ends:
        faulthandler.dump_traceback_later(max(0.001, min(_ends.values()) - time.monotonic()), exit=True, file=2)


@contextlib.contextmanager
def limited(key: str, seconds: float | None) -> Iterator[None]:
    """Interrupt the chunk `key`, which runs in this thread, after so many seconds in the block; None: no limit."""
    if seconds is None:
        yield
        return
    limit = _local.limit = _TimeLimit(key, seconds)
    limit.start()
    try:
        yield
    finally:
        _local.limit = None
        limit.stop()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Stop the time of this thread's chunk inside the block."""
    limit: _TimeLimit | None = getattr(_local, "limit", None)
    if limit is None:
        yield
        return
    limit.stop()
    try:
        yield
    finally:
        limit.start()
