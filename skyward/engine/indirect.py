"""Requests to workers that the caller does not reach: through the scheduler, by one connection that compresses them."""

from __future__ import annotations

import asyncio
import math
import pickle
import time
from collections.abc import Callable
from typing import Any

from distributed.comm import CommClosedError
from distributed.core import clean_exception
from distributed.protocol.compression import compressions, decompress
from distributed.protocol.serialize import merge_and_deserialize

from skyward.transfer.link import LINK, Link

_PINGS = 3
"""Times that a round trip is measured; the shortest counts. Chosen, not measured: the first is often late."""


class Indirect:
    """Asks workers through the scheduler. For one event loop.

    `measured` hears of the seconds that a round trip to the scheduler takes.
    """

    def __init__(self, client: Any, measured: Callable[[float], None]) -> None:
        self._client = client
        self._measured = measured
        self._opening: asyncio.Task[_Connection] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, worker: str, op: str, when_sent: Callable[[], None] | None = None, **arguments: Any) -> Any:
        """Return what the handler `op` of the worker at an address answers. Cancelling this does not stop the handler.

        Raises
        ------
        CommClosedError
            The connection to the scheduler, or the scheduler's to the worker, has been closed.
        OSError
            There is none.
        """
        data = pickle.dumps({"worker": worker, "op": op, **arguments}, 5)
        return await (await self._connected()).ask(data, when_sent)

    def open(self) -> asyncio.Task[_Connection]:
        """Connect ahead of the first request, if there is no connection."""
        if self._opening is None or (self._opening.done() and not _is_open(self._opening)):
            self._opening = asyncio.ensure_future(self._connect())
            self._opening.add_done_callback(_is_open)  # which takes note of a failure, or asyncio reports it
        return self._opening

    async def _connected(self) -> _Connection:
        return await asyncio.shield(self.open())

    async def _connect(self) -> _Connection:
        comm = await self._client.connect_scheduler()
        await comm.write({"op": LINK, "reply": False})
        connection = _Connection(comm)
        for work in (connection.serve(), self._measure(connection)):
            self._tasks.add(task := asyncio.create_task(work))
            task.add_done_callback(self._tasks.discard)
        return connection

    async def _measure(self, connection: _Connection) -> None:
        shortest = math.inf
        for _ in range(_PINGS):
            began = time.perf_counter()
            try:
                await connection.ask(b"", None)
            except OSError:
                return
            shortest = min(shortest, time.perf_counter() - began)
            self._measured(shortest)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


class _Connection:
    """One connection: its requests and answers are numbered, so many are under way at once."""

    def __init__(self, comm: Any) -> None:
        self.is_closed: bool = False
        self._link = Link(comm, self._heard)
        self._asked: dict[int, asyncio.Future[tuple[dict[str, Any], bytes]]] = {}
        self._count = 0

    async def serve(self) -> None:
        try:
            await self._link.run()
        finally:
            self.is_closed = True
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(CommClosedError("the connection to the Dask scheduler is closed"))

    def _heard(self, message: dict[str, Any], data: bytes) -> None:
        answer = self._asked.get(message["id"])
        if answer is not None and not answer.done():
            answer.set_result((message, data))

    async def ask(self, data: bytes, when_sent: Callable[[], None] | None) -> Any:
        if self.is_closed:
            raise CommClosedError("the connection to the Dask scheduler is closed")
        self._count += 1
        number = self._count
        answer = self._asked[number] = asyncio.get_running_loop().create_future()

        def begin() -> bool:
            if answer.done():
                return False
            if when_sent is not None:
                when_sent()
            return True

        self._link.send({"id": number}, data, begin)
        try:
            message, data = await answer
        finally:
            del self._asked[number]
        if "error" in message:
            _, error, traceback = clean_exception(**message["error"])
            raise error.with_traceback(traceback)
        if "frames" in message:
            return await asyncio.to_thread(_restore, message["header"], message["frames"])
        return message.get("answer", data)


def _restore(header: dict[str, Any], frames: list[tuple[str | None, Any]]) -> Any:
    """Return what Dask has serialized: compressed here, and there too if it is set so, and split where it is large."""
    plain = [compressions[name].decompress(frame) for name, frame in frames]
    if "compression" in header:
        plain = decompress(header, plain)
    return merge_and_deserialize(header, plain)


def _is_open(opening: asyncio.Task[_Connection]) -> bool:
    return not opening.cancelled() and opening.exception() is None and not opening.result().is_closed
