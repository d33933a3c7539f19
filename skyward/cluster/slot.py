"""What a worker process of ours does before its first task. Loaded by Dask as a preload module."""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import threading
import time
import uuid
from typing import Any

from skyward import inbox, interrupts, logs, runtime, shelf

LOG_TOPIC = "skyward-logs"
_FLUSH_S = 0.1
_AGAIN_S = 1.0
"""Seconds for which lines that were sent go again with outcomes. By feel: events take a few dozen milliseconds."""
_LINES_KEPT = 2_000
"""Lines that wait to be sent; a storm drops the oldest and says how many. By feel: a screenful many times over."""
_LONGEST = 10_000
"""Characters of a line; what is beyond is cut off. By feel: many screens wide."""


async def dask_setup(worker: Any) -> None:
    interrupts.may_restart = True
    inbox.install(worker)
    shelf.install(worker)
    _die_with_parent()
    shipper = _Shipper(worker)
    logs.take_over(shipper.add)
    runtime.take_output = shipper.take


def _die_with_parent() -> None:
    """Ask Linux to end this process with the one that forked it: covers a nanny that was killed outright."""
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1  # linux/prctl.h
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class _Shipper:
    """Sends lines to the caller, in order, a batch at a time: through Dask's event stream, and with outcomes.

    Outcomes may be faster than events. So they bring the last second's lines again, and the caller, who knows by the
    lines' numbers which it has, leaves out the others.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._node = int(os.environ.get("SKYWARD_NODE", "0"))
        self._lines: collections.deque[tuple[float, str]] = collections.deque()
        self._dropped = 0
        self._sent: collections.deque[tuple[float, float, str]] = collections.deque(maxlen=_LINES_KEPT)  # lately
        self._count = 0
        self._id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        threading.Thread(target=self._run, name="skyward-logs", daemon=True).start()

    def add(self, line: str) -> None:
        if len(line) > _LONGEST:
            line = f"{line[:_LONGEST]} ... {len(line) - _LONGEST} characters dropped"
        with self._lock:
            self._lines.append((time.time(), line))
            if len(self._lines) > _LINES_KEPT:
                self._lines.popleft()
                self._dropped += 1
        self._wanted.set()

    def flush(self) -> None:
        with self._lock:
            if message := self._take(again=False):
                # Under the lock: two flushes must not change the order of lines.
                self._worker.log_event(LOG_TOPIC, message)

    def take(self) -> dict[str, Any] | None:
        """Return what has not been sent, and what was sent just now."""
        with self._lock:
            return self._take(again=True)

    def _take(self, *, again: bool) -> dict[str, Any] | None:
        now = time.monotonic()
        while self._sent and self._sent[0][0] < now - _AGAIN_S:
            self._sent.popleft()
        old = list(self._sent) if again else []
        new = [(now, *line) for line in self._lines]
        self._lines.clear()
        self._sent.extend(new)
        first = self._count - len(old)
        self._count += len(new)
        dropped, self._dropped = self._dropped, 0
        if not (old or new):
            return None
        lines = [entry[1:] for entry in (*old, *new)]
        return {"node": self._node, "process": self._id, "first": first, "dropped": dropped, "lines": lines}

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            time.sleep(_FLUSH_S)
            self._wanted.clear()
            self.flush()
