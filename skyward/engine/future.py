"""The future of a call."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from skyward import guard
from skyward.engine.calls import Item
from skyward.errors import PoolError
from skyward.transfer.wire import Outcome

logger = logging.getLogger(__name__)


ItemOutcomes = Sequence[tuple[Item, "Outcome | BaseException"]]


class CallFuture(concurrent.futures.Future[Any]):
    """A future whose `cancel` also ends a call that runs already."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = False
        self.on_cancel: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()

    def result(self, timeout: float | None = None) -> Any:
        self._check_process()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check_process()
        return super().exception(timeout)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise PoolError(
                f"this future belongs to process {self._process}, from which this process was forked: ask for its "
                "result there"
            )

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Any]], object]) -> None:
        super().add_done_callback(functools.partial(_call_back, fn))

    def running(self) -> bool:
        return self.sent and not self.done()

    def cancel(self) -> bool:
        with self._lock:
            if self.cancelled():
                return True
            if not super().cancel():
                return False
            self.set_running_or_notify_cancel()  # tells those who wait
            on_cancel, self.on_cancel = self.on_cancel, None
        if on_cancel is not None:
            on_cancel()
        return True

    def set_outcome(self, ok: bool, value: Any) -> None:
        """Set the result or exception, unless cancelled meanwhile."""
        with self._lock:
            if self.done() or not self.set_running_or_notify_cancel():
                return
            self.on_cancel = None  # it refers back to this future
        if ok:
            self.set_result(value)
        else:
            self.set_exception(value)


def _call_back(fn: Callable[[concurrent.futures.Future[Any]], object], future: CallFuture) -> None:
    """Call a callback of a future. The standard library logs an Exception; anything else would end the thread."""
    try:
        fn(future)
    except BaseException as exc:
        if isinstance(exc, Exception) or guard.ends_program(exc):
            raise
        guard.log(logger, "exception calling callback for %r", future)
