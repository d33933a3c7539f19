"""A generator that runs as a call: its values wait here until the caller fetches them, and it waits for the caller.

The call's thread makes values, and the worker's event loop has them; each waits for the other without a lock, because
an interrupt may end the thread anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import pickle
import queue
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

from skyward.transfer import pickling
from skyward.transfer.wire import AHEAD_BYTES, AHEAD_VALUES, VALUES, Kind, Outcome, Outcomes
from skyward.worker import call_warnings, interrupts, raised, runtime, time_limit

_WAIT_S = 5.0
"""Seconds after which a request is answered although there is no value. Chosen, not measured."""
_LOOK_S = 0.5
"""Seconds between two chances for an interrupt, in a thread that no signal wakes. Chosen, not measured."""

_streams: dict[str, Stream] = {}  # that run in this process
_awaited: dict[str, asyncio.Event] = {}  # set when the stream has begun


class Generating:
    """A generator function as a call, whose values go to the stream `key`. Travels like any function.

    On a joined cluster, an event of `topic` says which worker runs it.
    """

    def __init__(self, fn: Callable[..., Any], key: str, topic: str | None) -> None:
        self.__wrapped__: Callable[..., Any] = fn
        self.__name__: str = getattr(fn, "__name__", type(fn).__name__)
        self.__qualname__: str = getattr(fn, "__qualname__", self.__name__)
        self._key = key
        self._topic = topic

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        worker = runtime.current_worker()
        running = interrupts.current()
        running.raises = interrupts.Closed
        stream = Stream(self._key, worker.loop.asyncio_loop, running)
        try:
            if self._topic is not None:
                install(worker)
                worker.log_event(self._topic, {"key": self._key, "address": worker.address})
            # Dask may run this again after its worker has died; nothing is fetched then, so no value is made twice.
            stream.wait()
            values = iterate(self.__wrapped__(*args, **kwargs))
            try:
                for value in values:
                    stream.put(self._pack(value))
            finally:
                values.close()
        except interrupts.Interrupted:
            raise
        except BaseException:  # the user's: the values before it are fetched first
            stream.put(None)
            raise
        else:
            stream.put(None)
        finally:
            stream.leave()

    def _pack(self, value: Any) -> Outcome:
        try:
            data, buffers = pickling.dumps(value)
        except interrupts.Interrupted:
            raise
        except BaseException as exc:  # whatever a value's own __reduce__ raises
            raise raised.not_sendable(self, "yielded", value, exc) from None
        # Copied, because the generator may change an array after it has yielded it.
        copies = tuple(bytearray(buffer.raw()) for buffer in buffers)
        return Outcome(Kind.VALUE, data, copies, warnings=call_warnings.take())


def iterate(values: Generator[Any, Any, Any] | AsyncGenerator[Any, Any]) -> Generator[Any, Any, Any]:
    """Return the generator, or one that runs an async generator in an event loop of this thread."""
    return _iterate_async(values) if inspect.isasyncgen(values) else values  # type: ignore[return-value]


def _iterate_async(values: AsyncGenerator[Any, Any]) -> Generator[Any, None, None]:
    end = object()

    async def step() -> Any:
        return await anext(values, end)

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:  # whose end closes `values`
        while (value := runner.run(step())) is not end:
            yield value


class Stream:
    """The values of a generator that have not been fetched. `wait`, `put` and `leave` are for the call's thread."""

    def __init__(self, key: str, loop: asyncio.AbstractEventLoop, running: interrupts.Running) -> None:
        self.values: deque[Outcome] = deque()
        self.news: asyncio.Event = asyncio.Event()
        self.is_over: bool = False
        self._key = key
        self._loop = loop
        self._running = running
        self._first = 0  # index of the first of the values
        self._consumed = 0  # values that the caller has taken
        self._sizes: deque[int] = deque()  # of those that it has not
        self._is_wanted = False  # has been asked for
        self._has_ended = False
        self._waits = True  # the thread, to go on
        self._may_go: queue.SimpleQueue[None] = queue.SimpleQueue()
        loop.call_soon_threadsafe(self._begin)

    # --- in the call's thread -------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until the caller has asked for values, and has taken all but a few of those that it got."""
        with contextlib.suppress(queue.Empty):
            return self._may_go.get(timeout=0.001)  # most waits end here, and spare the time limit its pause
        with time_limit.paused():
            while True:
                self._running.check()
                with contextlib.suppress(queue.Empty):
                    return self._may_go.get(timeout=_LOOK_S)

    def put(self, value: Outcome | None) -> None:
        """Add a value, and wait for room for the next one. None: it was the last, so wait until all are fetched."""
        self._running.check()
        self._loop.call_soon_threadsafe(self._add, value)
        self.wait()

    def leave(self) -> None:
        """Drop what has not been fetched."""
        self._loop.call_soon_threadsafe(self._leave)

    # --- in the event loop ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        _streams[self._key] = self
        if (awaited := _awaited.pop(self._key, None)) is not None:
            awaited.set()

    def _add(self, value: Outcome | None) -> None:
        self._waits = True
        if value is None:
            self._has_ended = True
        else:
            self.values.append(value)
            self._sizes.append(value.size)
            self.news.set()
        self._let_go()

    def _leave(self) -> None:
        self.is_over = True
        del _streams[self._key]
        self.news.set()

    def fetched(self, received: int, consumed: int) -> None:
        """Note how many values have reached the caller, and how many of these it has taken."""
        self._is_wanted = True
        for _ in range(min(received - self._first, len(self.values))):
            self.values.popleft()
            self._first += 1
        for _ in range(consumed - self._consumed):
            self._sizes.popleft()
        self._consumed = max(consumed, self._consumed)
        self._let_go()

    def _let_go(self) -> None:
        has_room = len(self._sizes) < AHEAD_VALUES and sum(self._sizes) < AHEAD_BYTES
        if self._waits and self._is_wanted and (not self.values if self._has_ended else has_room):
            self._waits = False
            self._may_go.put(None)


def install(worker: Any) -> None:
    """Let the caller fetch values from `worker`, a Dask worker in this process."""
    worker.handlers[VALUES] = fetch


async def fetch(key: str, received: int, consumed: int) -> Any:
    """Return, packed, the values of a stream after the first `received`; None: there is none within some seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_WAIT_S):
            if (stream := _streams.get(key)) is None:
                await _awaited.setdefault(key, asyncio.Event()).wait()
                if (stream := _streams.get(key)) is None:  # it has begun, and left already
                    return None
            stream.fetched(received, consumed)
            while not stream.values and not stream.is_over:
                stream.news.clear()
                await stream.news.wait()
            return packed(Outcomes(list(stream.values))) if stream.values else None
    _awaited.pop(key, None)
    return None


def packed(outcomes: Outcomes) -> Any:
    """Return outcomes as a Dask message takes them best."""
    from distributed.protocol import to_serialize

    if any(outcome.buffers for outcome in outcomes.items):
        return to_serialize(outcomes)  # which keeps large buffers out of the pickle
    return pickle.dumps(outcomes, 5)
