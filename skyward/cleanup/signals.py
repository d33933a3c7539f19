"""SIGTERM and SIGHUP that end a pool's block as Ctrl-C does, so that what it has started is ended too.

Only in the process that has the pool: one forked from it, as multiprocessing does, dies of them as usual.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def unwind_on_termination() -> Callable[[], None]:
    """Raise `SystemExit` where the main thread is when such a signal comes; return what undoes this.

    Does nothing outside the main thread, and for a signal that the program handles or ignores itself.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    ours = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _unwind)
    return _undo if ours else lambda: None


def _undo() -> None:
    with contextlib.suppress(ValueError):  # a pool that ends by its time-out does so in another thread
        for number in _SIGNALS:
            if signal.getsignal(number) is _unwind:
                signal.signal(number, signal.SIG_DFL)


def _unwind(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


# Python forgets the signals that come while a child is being made: they wait until the child has no handler any more.
_mask = threading.local()


def _block_signals() -> None:
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _after_fork_in_child() -> None:
    _undo()
    _unblock_signals()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_after_fork_in_child)
