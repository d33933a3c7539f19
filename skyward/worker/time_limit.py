"""The time limit of a chunk: it counts while the chunk runs, and not while a generator waits for its consumer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from skyward.transfer.wire import Kind
from skyward.worker import interrupts

_local = threading.local()  # the limit of the chunk that runs in this thread


class _TimeLimit:
    """Interrupts the chunk `key` when it has run for `seconds`."""

    def __init__(self, key: str, seconds: float) -> None:
        self._key = key
        self._left = seconds

    def start(self) -> None:
        self._began = time.monotonic()
        self._timer = threading.Timer(self._left, interrupts.interrupt, [[self._key], Kind.TIMEOUT])
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        self._timer.cancel()
        self._left = max(0.0, self._left - (time.monotonic() - self._began))


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
