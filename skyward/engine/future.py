"""Futures of calls, and the threads in which they get their results and run their callbacks, away from the loop."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from skyward import user_errors
from skyward.engine.calls import Item
from skyward.engine.decoder import Decoder
from skyward.errors import PoolError
from skyward.transfer.wire import Kind, Outcome

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
        if isinstance(exc, Exception) or user_errors.ends_program(exc):
            raise
        user_errors.log(logger, "exception calling callback for %r", future)


class Callbacks:
    """A thread that sets the results of futures, started by the first delivery. Callbacks may submit more calls, but
    must not wait for them.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._queue: queue.SimpleQueue[ItemOutcomes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def put(self, delivery: ItemOutcomes) -> None:
        self._queue.put(delivery)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="skyward-callbacks", daemon=True)
                    self._thread.start()

    def close(self, *, wait: bool = True) -> None:
        """End the thread when it has run what was put before this."""
        self._queue.put(None)
        if wait and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while (delivery := self._queue.get()) is not None:
            for item, outcome in delivery:
                try:
                    self._set(item, outcome)
                except BaseException:  # other calls must still get their outcomes
                    user_errors.log(logger, "the outcome of %s() was not delivered", item.call.label)
            del delivery, item, outcome  # must not live on while this waits for the next

    def _set(self, item: Item, outcome: Outcome | BaseException) -> None:
        future: CallFuture = item.sink
        if isinstance(outcome, Outcome) and outcome.kind is Kind.CANCELLED:
            future.on_cancel = None
            future.cancel()
        elif not future.cancelled():
            try:
                ok, value = self._decoder.decode(item.call, outcome)
            except BaseException as exc:  # KeyboardInterrupt or SystemExit, of user code that runs in it
                ok, value = False, exc
            future.set_outcome(ok, value)
