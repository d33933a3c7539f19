"""Threads in which outcomes become results of futures and the futures' callbacks run, away from the loop."""

from __future__ import annotations

import logging
import queue
import threading

from skyward import guard
from skyward.engine.calls import Decoder, Item
from skyward.engine.future import CallFuture, ItemOutcomes
from skyward.transfer.wire import Kind, Outcome

logger = logging.getLogger(__name__)


class Callbacks:
    """One such thread, started by the first delivery. What it runs may submit more, but must not wait for it."""

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
                    guard.log(logger, "the outcome of %s() was not delivered", item.call.label)
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
