"""A generator's values on their way to the caller: fetched from its worker ahead of the consumer, a few at most."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import uuid
from types import MethodType
from typing import Any

from skyward.engine.calls import Call
from skyward.engine.failures import lost_midway, not_run
from skyward.engine.future import ItemOutcomes
from skyward.engine.graph import Graph
from skyward.engine.group import Group, Server
from skyward.engine.loop import Loop
from skyward.engine.roster import Roster
from skyward.engine.transport import Transport
from skyward.transfer.wire import AHEAD_BYTES, AHEAD_VALUES, Outcome
from skyward.worker import interrupts
from skyward.worker.value_stream import Generating

logger = logging.getLogger(__name__)

_AGAIN_S = 0.2
"""Seconds after which values are asked for again when a request failed. Chosen, not measured."""
_TRIES = 5
"""Requests that may fail in a row, other than for want of a connection. Chosen, not measured."""
_CLOSE_S = interrupts.GRACE_S + 3.0
"""Seconds to wait for the end of a generator that is closed: what it has to end by itself, and its process to end."""


class ValueStream:
    """The values of one call of a generator function, which is alone in its group."""

    def __init__(self, call: Call, server: Server, loop: Loop, transport: Transport, roster: Roster) -> None:
        self.received: int = 0  # values that have arrived from the worker
        self._received_bytes = 0
        self._consumed = self._consumed_bytes = 0  # written by the consumer's thread
        self._arrived: queue.SimpleQueue[tuple[bool, Outcome | BaseException]] = queue.SimpleQueue()
        self._key = uuid.uuid4().hex
        self._loop = loop
        self._transport = transport
        self._roster = roster
        self._address: str | None = None  # of the worker that has the call
        self._fetching: asyncio.Task[None] | None = None
        self._is_sent = False
        self._is_over = False
        self._has_left = threading.Event()  # it is over, and nothing of it is on a worker any more
        self.graph: Graph | None = None  # of the calls whose values it needs
        self.group: Group = Group(server, self._deliver, size=1)
        self.call: Call = self._as_sent(call)

    def _as_sent(self, call: Call) -> Call:
        fn: Any = call.fn
        args, owner = call.args, None
        if isinstance(fn, MethodType):
            fn, owner = fn.__func__, fn.__self__
            args = (owner, *args)
        topic = self._transport.streams_topic if self._roster.is_joined else None
        fn = Generating(fn, self._key, topic)
        name = call.label
        return Call(fn, args, call.kwargs, timeout=call.timeout, alone=True, name=name, owner=owner, stream=self)

    # --- in the consumer's thread ---------------------------------------------------------------------------

    def get(self) -> tuple[bool, Outcome | BaseException]:
        """Wait for the next value, still pickled, and return it with False, or the outcome of the call with True."""
        is_last, outcome = self._arrived.get()
        if not is_last:
            assert isinstance(outcome, Outcome)
            self._consumed_bytes += outcome.size
            self._consumed += 1
            if self._arrived.qsize() <= AHEAD_VALUES // 2:
                self._loop.call_soon(self._fetch_more)
        return is_last, outcome

    def close(self) -> None:
        """Cancel the call, and wait until the generator has ended, which its own `finally` may delay a little."""
        self.group.cancel()
        if not self._loop.is_here:
            self._has_left.wait(_CLOSE_S)

    def release(self) -> None:
        """Let go of the values that the call needs."""
        if self.graph is not None:
            self.graph.cancel()

    # --- in the loop ----------------------------------------------------------------------------------------

    def sent(self, address: str | None) -> None:
        """Note that the call goes to this worker. None: the scheduler chooses one, which will say so."""
        self._is_sent = True
        if address is None:
            self._transport.when_begun(self._key, self._begun)
        else:
            self._begun(address)

    def _begun(self, address: str) -> None:
        if self.received and address != self._address:  # its worker has died, and Dask runs it once more
            self._fail(lost_midway(self.call, self.received, self._address or ""))
        else:
            self._address = address
            self._fetch_more()

    def left(self) -> None:
        """Note that the call is on no worker any more."""
        self._is_sent, self._address = False, None
        self._transport.when_begun(self._key, None)
        self._check_left()

    def _deliver(self, delivery: ItemOutcomes) -> None:
        ((_, outcome),) = delivery
        self._end(outcome)

    def _end(self, outcome: Outcome | BaseException) -> None:
        if not self._is_over:
            self._is_over = True
            self._arrived.put((True, outcome))
            if self._fetching is not None:
                self._fetching.cancel()
        self._check_left()

    def _check_left(self) -> None:
        if self._is_over and not self._is_sent:
            self._has_left.set()

    def _fetch_more(self) -> None:
        if self._fetching is None and not self._is_over:
            self._fetching = self._loop.start(self._fetch())

    def _has_room(self) -> bool:
        """Tell whether the worker may have more: it makes values as long as there is room for those not consumed."""
        few = self.received - self._consumed <= AHEAD_VALUES // 2
        return few and self._received_bytes - self._consumed_bytes < AHEAD_BYTES // 2

    async def _fetch(self) -> None:
        tries = 0
        try:
            while (address := self._address) is not None and self._has_room():
                if self._roster.is_joined and self.received and address not in self._roster.workers():
                    return self._fail(lost_midway(self.call, self.received, address))
                try:
                    outcomes = await self._transport.values(address, self._key, self.received, self._consumed)
                except Exception as exc:  # mostly lost connections: if the worker is gone, the engine is told
                    logger.debug("no values from %s: %s", address, exc)
                    tries += not isinstance(exc, OSError)
                    if tries == _TRIES:
                        return self._fail(not_run(exc))
                    await asyncio.sleep(_AGAIN_S)
                    continue
                tries = 0
                if address == self._address:  # otherwise the call is not there any more, and runs again elsewhere
                    for outcome in outcomes:
                        self.received += 1
                        self._received_bytes += outcome.size
                        self._arrived.put((False, outcome))
        finally:
            self._fetching = None

    def _fail(self, error: BaseException) -> None:
        self._address = None
        self._end(error)
        self.group.cancel()
