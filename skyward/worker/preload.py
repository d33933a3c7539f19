"""What a worker process of ours does before its first task. Loaded by Dask as a preload module."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import sys
import threading
import time
import uuid
from collections.abc import Iterable
from typing import Any

from skyward.worker import buffer_files, capture, handlers, interrupts, nanny, runtime, shared_values

_FLUSH_S = 0.1
_AGAIN_S = 1.0
"""Seconds for which lines that were sent go again with outcomes.
Chosen, not measured: events take a few dozen milliseconds."""
_LINES_KEPT = 2_000
"""Lines that wait to be sent; a storm drops the oldest and says how many.
Chosen, not measured: a screenful many times over."""
_LOOK_S = 0.005
"""Seconds between two looks whether a pipe fills up, while there is output. Chosen: a print of 64 KiB takes longer."""
_BEGUN_S = 1.0
"""Seconds for which a line that has only begun, as a bar has, waits for its end."""


async def dask_setup(worker: Any) -> None:
    interrupts.may_restart = True
    nanny.run_in_main_thread(worker)
    handlers.install(worker)
    buffer_files.install(worker)
    shared_values.install(worker)
    die_with_parent()
    runtime.take_output = _Shipper(worker, capture.take_over(os.environ.get(capture.VARIABLE))).take


def die_with_parent() -> None:
    """Ask Linux to end this process with the one that forked it: covers an agent that was killed outright."""
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1  # linux/prctl.h
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class _Shipper:
    """Sends lines to the caller, in order, a batch at a time: through Dask's event stream, and with outcomes.

    Lines stay in their pipes until they are sent, so that they are not lost with this process.

    Outcomes may be faster than events. So they bring the last second's lines again, and the caller, who knows by the
    lines' numbers which it has, leaves out the others.
    """

    def __init__(self, worker: Any, reader: capture.Reader) -> None:
        self._worker = worker
        self._reader = reader
        self._node = int(os.environ.get("SKYWARD_NODE", "0"))
        self._lines: collections.deque[tuple[float, str, str]] = collections.deque()
        self._dropped = 0
        self._sent: collections.deque[tuple[float, float, str, str]] = collections.deque(maxlen=_LINES_KEPT)  # lately
        self._count = 0
        self._id = uuid.uuid4().hex
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="skyward-logs", daemon=True).start()

    def _read(self, lines: Iterable[capture.Line]) -> None:
        now = time.time()
        for stream, line in lines:
            self._lines.append((now, stream, line))
            if len(self._lines) > _LINES_KEPT:
                self._lines.popleft()
                self._dropped += 1

    def flush(self) -> None:
        with self._lock:
            self._read(self._reader.read())
            if message := self._take(again=False):
                # Under the lock: two flushes must not change the order of lines.
                self._worker.log_event(runtime.LOG_TOPIC, message)

    def take(self) -> dict[str, Any] | None:
        """Return what was written until now and has not been sent, and what was sent just now."""
        capture.flush()  # not under the lock: a pipe that is full has to be read meanwhile
        with self._lock:
            self._read(self._reader.read())
            self._read(self._reader.rest())
            return self._take(again=True)

    def _take(self, *, again: bool) -> dict[str, Any] | None:
        now = time.monotonic()
        while self._sent and self._sent[0][0] < now - _AGAIN_S:
            self._sent.popleft()
        old = list(self._sent) if again else []
        if self._dropped:
            self._lines.appendleft((time.time(), capture.DROPPED, str(self._dropped)))
            self._dropped = 0
        new = [(now, *line) for line in self._lines]
        self._lines.clear()
        self._sent.extend(new)
        first = self._count - len(old)
        self._count += len(new)
        if not (old or new):
            return None
        lines = [entry[1:] for entry in (*old, *new)]
        return {"node": self._node, "process": self._id, "first": first, "lines": lines}

    def _run(self) -> None:
        pipes = select.poll()
        for fd in self._reader.descriptors:
            pipes.register(fd, select.POLLIN)
        begun_at: float | None = None  # when a line began that has not ended
        while True:
            pipes.poll(None if begun_at is None else _BEGUN_S * 1000)
            until = time.monotonic() + _FLUSH_S
            while time.monotonic() < until:
                time.sleep(_LOOK_S)
                if self._reader.size() > capture.HALF_FULL:
                    with self._lock:
                        self._read(self._reader.read())
            if begun_at is not None and time.monotonic() - begun_at > _BEGUN_S:
                with self._lock:
                    self._read(self._reader.read())
                    self._read(self._reader.rest())
            self.flush()
            if not self._reader.has_begun:
                begun_at = None
            elif begun_at is None:
                begun_at = time.monotonic()
