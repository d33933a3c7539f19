"""TCP connections that outlive the network between their two ends.

A connection of the Dask client to the scheduler is cut in two: the client talks to a relay on its own host, the
scheduler to one on its machine, and neither notices when what lies between is lost. The two relays keep what the other
has not confirmed, meet again over whatever connection is made next, and go on at the byte where they were.

What they send each other over one connection after another: a line of JSON each to meet, then frames, whose header is a
type and a length. Imports nothing of skyward; used on both sides, each in its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import struct
from collections import deque
from typing import Any

logger = logging.getLogger(__name__)

INTERPRETER = "python"
"""Name of a link to the agent's Python interpreter, beside its socket: a program there may pass the bytes on."""

_HEADER = struct.Struct(">BI")
_DATA, _ACK, _END = range(3)
_READ_BYTES = 1 << 18
_UNCONFIRMED_BYTES = 16 << 20
"""Bytes kept for a peer that has not confirmed them; nothing more is read until it does. Chosen, not measured."""


class StreamEnded(Exception):  # noqa: N818 - it says what has happened
    """The other end can't go on with this stream, or can't begin it."""


class Relay:
    """One end: a local connection on one side, on the other one to the far end, which comes and goes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._sent = self._confirmed = self._received = 0  # bytes of the stream
        self._kept: deque[bytes] = deque()  # what was sent and not confirmed
        self._room = asyncio.Event()
        self._room.set()
        self._remote: Any = None
        self._ended_here = self._ended_there = False
        self.closed: asyncio.Event = asyncio.Event()  # nothing is left to do in either direction
        self._reading = asyncio.create_task(self._read())

    @property
    def received(self) -> int:
        return self._received

    async def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._reader.read(_READ_BYTES):
                self._kept.append(data)
                self._sent += len(data)
                await self._write(_DATA, data)
                if self._sent - self._confirmed > _UNCONFIRMED_BYTES:
                    self._room.clear()
                await self._room.wait()
        self._ended_here = True
        await self._write(_END)

    async def _write(self, kind: int, data: bytes = b"") -> None:
        remote = self._remote
        if remote is None:
            return  # kept, and sent when there is one
        with contextlib.suppress(Exception):  # whatever a broken connection raises; `carry` sees its end
            remote.write(_HEADER.pack(kind, len(data)) + data)
            await remote.drain()

    async def carry(self, reader: Any, writer: Any, confirmed: int) -> None:
        """Use a connection whose other end has received `confirmed` bytes; return when it is lost or all is done."""
        if self._remote is not None:
            _abort(self._remote)  # it may be stuck, with callers that wait for it
        self._confirm(confirmed)
        writer.write(b"".join(_HEADER.pack(_DATA, len(data)) + data for data in self._kept))
        if self._ended_here:
            writer.write(_HEADER.pack(_END, 0))
        self._remote = writer
        try:
            while True:
                kind, size = _HEADER.unpack(await reader.readexactly(_HEADER.size))
                data = await reader.readexactly(size)
                if self._remote is not writer:
                    return  # another one has taken its place, over which this will come again
                if kind == _DATA:
                    await self._deliver(data)
                    await self._write(_ACK, self._received.to_bytes(8, "big"))
                elif kind == _ACK:
                    self._confirm(int.from_bytes(data, "big"))
                else:
                    self._end()
                if self._ended_here and self._ended_there and not self._kept:
                    self.closed.set()
                    return
        except Exception as exc:  # the connection is lost, in whichever way its library tells; another one will come
            logger.debug("connection lost: %s", exc)
        finally:
            if self._remote is writer:
                self._remote = None

    async def _deliver(self, data: bytes) -> None:
        self._received += len(data)
        if self._ended_there:
            return
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:  # the reader of this is gone: the other side is told by the end of our reading
            self._ended_there = True

    def _end(self) -> None:
        """The other side has no more to say. Dask's connections are never used in one direction only."""
        self._ended_there = True
        self._writer.close()

    def _confirm(self, received: int) -> None:
        while self._kept and self._confirmed + len(self._kept[0]) <= received:
            self._confirmed += len(self._kept.popleft())
        if self._confirmed < received:
            part = received - self._confirmed
            self._kept[0] = self._kept[0][part:]
            self._confirmed = received
        if self._sent - self._confirmed <= _UNCONFIRMED_BYTES:
            self._room.set()

    def close(self) -> None:
        """Drop both connections and what has not been confirmed."""
        self._reading.cancel()
        if self._remote is not None:
            _abort(self._remote)
        self._writer.close()
        self.closed.set()


def _abort(remote: Any) -> None:
    with contextlib.suppress(Exception):  # it may be broken already
        (getattr(remote, "transport", None) or remote.channel).abort()


async def meet_as_caller(relay: Relay, reader: Any, writer: Any, *, stream: str, target: str) -> int:
    """Say over a new connection which stream it is for; return how many of its bytes the other end has.

    Raises
    ------
    StreamEnded
        The other end knows nothing of the stream any more, or can't reach `target`.
    """
    hello = {"relay": stream, "target": target, "received": relay.received}
    writer.write(json.dumps(hello).encode() + b"\n")
    line = await reader.readline()
    if not line:
        raise ConnectionResetError("the connection was lost at once")
    answer = json.loads(line)
    if "error" in answer:
        raise StreamEnded(answer["error"])
    received: int = answer["received"]
    return received


class RelayServer:
    """The far end of many streams: connects each to its target once, and meets those that come back."""

    def __init__(self) -> None:
        self._relays: dict[str, Relay] = {}

    async def serve(self, hello: dict[str, Any], reader: Any, writer: Any) -> None:
        """Carry the stream that `hello` names over this connection, until that ends."""
        name = hello["relay"]
        relay = self._relays.get(name)
        if relay is None:
            if hello["received"]:
                writer.write(b'{"error": "the stream has ended"}\n')
                return
            host, _, port = hello["target"].rpartition(":")
            try:
                relay = Relay(*await asyncio.open_connection(host.strip("[]"), int(port)))
            except OSError as exc:
                writer.write(json.dumps({"error": f"{hello['target']} can't be reached: {exc}"}).encode() + b"\n")
                return
            self._relays[name] = relay
        writer.write(json.dumps({"received": relay.received}).encode() + b"\n")
        await relay.carry(reader, writer, hello["received"])
        if relay.closed.is_set():
            self._relays.pop(name, None)
            relay.close()

    def close(self) -> None:
        """Drop all streams."""
        for relay in self._relays.values():
            relay.close()
        self._relays.clear()
