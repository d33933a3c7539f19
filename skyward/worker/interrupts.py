"""Which chunks of calls run in this worker process, and how they are stopped: by an exception raised inside them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from skyward.transfer.wire import Kind

GRACE_S = 2.0
"""Seconds that an interrupted call has to end before its worker process is restarted."""

may_restart = False
"""Whether this process may end itself to get rid of a call that does not stop; only our own workers may."""


class Interrupted(BaseException):
    """Raised inside a task by `interrupt`. Not an Exception, so that user code does not swallow it."""


class Closed(Interrupted, GeneratorExit):
    """The same in a generator that computes: its code hears of its end as it does at a ``yield``."""


@dataclass(slots=True)
class Running:
    """A chunk that runs here. `why` is set once it is to stop; nothing is raised in one that is `watched` for that."""

    thread: int
    why: Kind | None = None
    watched: bool = False
    raises: type[Interrupted] = Interrupted

    def check(self) -> None:
        """Raise if it is to stop: user code may have caught what was raised in it."""
        if self.why is not None:
            raise self.raises


_running: dict[str, Running] = {}
_lock = threading.Lock()
_early: OrderedDict[str, None] = OrderedDict()
"""Chunks that were interrupted before they began: they may be on their way to a thread here."""
_EARLY_KEPT = 4096
_AGAIN_S = 0.01
_WAKE = signal.SIGURG
"""Sent to the main thread so that it notices an exception while it waits, in `time.sleep` say. Chosen for the reasons
that Go gives for its `sigPreempt`: it is ignored by default, libc does not use it, and applications seldom do
(src/runtime/signal_unix.go, read 2026-11-28)."""
_wakes = False


def wake_main_thread() -> None:
    """Let calls in the main thread be interrupted while they wait. Called there."""
    global _wakes
    _wakes = True
    signal.signal(_WAKE, lambda *_: None)  # the exception is raised as it begins to run


@contextlib.contextmanager
def running(key: str, *, watched: bool = False) -> Iterator[Running]:
    """Let the chunk `key`, which runs in this thread, be interrupted inside the block."""
    me = Running(threading.get_ident(), watched=watched)
    with _lock:
        _running[key] = me
        if key in _early:
            me.why = Kind.CANCELLED
    try:
        yield me
    finally:
        with _lock:
            _running.pop(key, None)
            # An interrupt that was sent but has not arrived would hit whatever this thread does next.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(me.thread), None)


def interrupt(keys: list[str], why: int = Kind.CANCELLED) -> int:
    """Stop the chunks `keys` if they run here: raise inside them, and after `GRACE_S` end this process.

    A call that is inside C code does not notice the exception, but for waits that signals end. On our own workers the
    process then ends, and its nanny starts another; on workers of a joined cluster the call is left to end by itself.
    Returns how many of them ran here. Called by the engine through Dask, in the worker's event loop.
    """
    hit = 0
    for key in keys:
        with _lock:
            found = _running.get(key)
            if found is None:
                _early[key] = None
                while len(_early) > _EARLY_KEPT:
                    _early.popitem(last=False)
                continue
            if found.why is not None:
                continue
            found.why = Kind(why)
        hit += 1
        if not found.watched and not _raise_in(key, found):
            threading.Thread(target=_raise_when_possible, args=[key, found], daemon=True).start()
        if may_restart:
            timer = threading.Timer(GRACE_S, _end_process_if_running, [key, found])
            timer.daemon = True
            timer.start()
    return hit


def current() -> Running:
    """Return the chunk that runs in this thread."""
    with _lock:
        return next(running for running in _running.values() if running.thread == threading.get_ident())


def runs_one_of(keys: list[str]) -> bool:
    """Tell whether one of the chunks `keys` runs here."""
    return any(key in _running for key in keys)


def runs_any() -> bool:
    """Tell whether a chunk runs here."""
    return bool(_running)


def _raise_in(key: str, found: Running) -> bool:
    """Raise in the chunk's thread, and tell whether that is settled; not while it imports a module.

    An import that is cut short leaves its submodules behind without their package, and code that imports that package
    later in this process gets a broken one.
    """
    with _lock:
        if _running.get(key) is not found:
            return True
        if _is_importing(found.thread):
            return False
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(found.thread), ctypes.py_object(found.raises))
        if _wakes and found.thread == threading.main_thread().ident:
            signal.pthread_kill(found.thread, _WAKE)
        return True


def _raise_when_possible(key: str, found: Running) -> None:
    while not _raise_in(key, found):
        time.sleep(_AGAIN_S)


def _is_importing(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _end_process_if_running(key: str, found: Running) -> None:
    if _running.get(key) is found:
        os._exit(77)  # any non-zero status: the nanny sees an unexpected end and starts another process
