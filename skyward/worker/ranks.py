"""Processes of their own for parts of a broadcast, as a worker sees them: started, heard, interrupted, ended.

Frameworks for distributed training can be set up once in a process, and what hangs in one of their collectives is only
got rid of with the process. So each part of such a job has one, which begins fresh and ends with the job: when its
part is done it stays, because others may still talk to it, until `end`. `skyward.worker.rank` is what runs there.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Pipe
from typing import Any

from skyward.transfer.wire import Kind, Outcomes

_LOOK_S = 0.05
_GRACE_S = 1.0
"""Seconds that an interrupted part has to end by itself: less than its worker has."""
_LEAVE_S = 5.0
"""Seconds that a process has to leave in good order when its job is over.
Chosen, not measured: enough to write what is left."""

_staying: dict[str, _Child] = {}  # by chunk: parts that are done, in jobs that are not
_lock = threading.Lock()


class DiedError(Exception):
    """The process ended before its part did. `status` is as `subprocess` has it: negative for a signal."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status

    def __str__(self) -> str:
        if self.status >= 0:
            return f"exit status {self.status}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-self.status).name
        return f"signal {-self.status}"

    @property
    def ended_itself(self) -> bool:
        """Whether it ended itself, as some frameworks do when others of the job have gone."""
        return self.status >= 0 or self.status == -signal.SIGABRT


def run(
    key: str,
    work: Any,
    blobs: Sequence[Any],
    *,
    environment: Mapping[str, str],
    stop: Callable[[], Kind | None],
) -> Outcomes | None:
    """Run a chunk in a separate process, and let that stay until `end` names the chunk's `key`.

    It prints where this process prints.

    Parameters
    ----------
    work
        What `skyward.worker.rank` is told.
    environment
        Variables beyond those of this process.
    stop
        Tells why it is to be interrupted, once it is.

    Returns
    -------
    None when it was interrupted and had to be killed.

    Raises
    ------
    DiedError
        It ended by itself.
    """
    child = _Child(environment)
    try:
        child.give(work, blobs)
        outcomes = child.outcomes(stop)
    except BaseException:
        child.kill()
        raise
    with _lock:
        _staying[key] = child
    if stop() is not None:  # its job is over, and `end` may have come before
        end([key], is_good=False)
    return outcomes


def end(keys: list[str], *, is_good: bool = True) -> None:
    """End the processes of these chunks, as far as they are here; at once unless the job has ended well."""
    for key in keys:
        with _lock:
            child = _staying.pop(key, None)
        if child is not None and is_good:
            threading.Thread(target=child.leave, name="skyward-leave", daemon=True).start()
        elif child is not None:
            child.kill()


class _Child:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "skyward.worker.rank", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
            )

    def give(self, work: Any, blobs: Sequence[Any]) -> None:
        try:
            self._connection.send((work, len(blobs)))
            for blob in blobs:
                self._connection.send_bytes(memoryview(blob).cast("B"))
        except OSError:
            raise DiedError(self._process.wait()) from None

    def outcomes(self, stop: Callable[[], Kind | None]) -> Outcomes | None:
        killed_at: float | None = None
        while True:
            if self._connection.poll(_LOOK_S):
                try:
                    data, count = self._connection.recv()
                    buffers = [self._connection.recv_bytes() for _ in range(count)]
                    found: Outcomes = pickle.loads(data, buffers=buffers)
                    return found
                except (EOFError, OSError):
                    status = self._process.wait()
                    if stop() is not None:
                        return None
                    raise DiedError(status) from None
            why = stop()
            if why is None:
                continue
            if killed_at is None:
                killed_at = time.monotonic() + _GRACE_S
                self._tell(("interrupt", int(why)))
            elif time.monotonic() > killed_at:
                return None

    def _tell(self, what: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):  # it has ended, which is seen elsewhere
            self._connection.send(what)

    def leave(self) -> None:
        self._tell(("end", 0))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_S)
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()
