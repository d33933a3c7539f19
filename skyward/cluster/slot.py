"""What a worker process of ours does before its first task. Loaded by Dask as a preload module."""

from __future__ import annotations

import collections
import contextlib
import io
import logging
import os
import sys
import threading
import time
import warnings
from typing import Any

from skyward import inbox, interrupts, runtime, shelf

LOG_TOPIC = "skyward-logs"
_FLUSH_S = 0.1
_LINES_KEPT = 2_000
"""Lines that wait to be sent; a storm drops the oldest and says how many. By feel: a screenful many times over."""


async def dask_setup(worker: Any) -> None:
    interrupts.may_restart = True
    inbox.install(worker)
    shelf.install(worker)
    _die_with_parent()
    # Every warning goes to the caller, whose own filters then decide what is shown.
    warnings.simplefilter("always")
    shipper = _Shipper(worker)
    sys.stdout = _Lines(shipper)
    sys.stderr = _Lines(shipper)
    runtime.before_result.append(shipper.flush)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


def _die_with_parent() -> None:
    """Ask Linux to end this process with the one that forked it: covers a nanny that was killed outright."""
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1  # linux/prctl.h
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class _Shipper:
    """Sends lines to the caller through Dask's event stream, in order, a batch at a time."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._node = int(os.environ.get("SKYWARD_NODE", "0"))
        self._slot = int(os.environ.get("SKYWARD_SLOT", "0"))
        self._lines: collections.deque[tuple[float, str]] = collections.deque()
        self._dropped = 0
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        threading.Thread(target=self._run, name="skyward-logs", daemon=True).start()

    def add(self, line: str) -> None:
        with self._lock:
            self._lines.append((time.time(), line))
            if len(self._lines) > _LINES_KEPT:
                self._lines.popleft()
                self._dropped += 1
        self._wanted.set()

    def flush(self) -> None:
        with self._lock:
            lines, dropped = list(self._lines), self._dropped
            self._lines.clear()
            self._dropped = 0
            if lines:
                message = {"node": self._node, "slot": self._slot, "dropped": dropped, "lines": lines}
                # Under the lock: two flushes must not change the order of lines.
                self._worker.log_event(LOG_TOPIC, message)

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            time.sleep(_FLUSH_S)
            self._wanted.clear()
            self.flush()


class _Lines(io.TextIOBase):
    """A text stream that hands over whole lines."""

    encoding = "utf-8"

    def __init__(self, shipper: _Shipper) -> None:
        self._shipper = shipper
        self._rest = threading.local()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        # Half a line waits for its end, per thread, so that threads do not cut each other's lines.
        *lines, rest = (getattr(self._rest, "text", "") + text).split("\n")
        self._rest.text = rest
        for line in lines:
            self._shipper.add(line)
        return len(text)

    def flush(self) -> None:
        rest = getattr(self._rest, "text", "")
        if rest:
            self._rest.text = ""
            self._shipper.add(rest)
