"""Connections that outlive the network between their ends: it is cut between two relays, at any byte."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from skyward.node.relay import Relay, RelayServer, StreamEnded, meet_as_caller


class Way:
    """Two ends joined by connections that the test cuts: a local port whose connections end at `target`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.relay_server = RelayServer()
        self.connections: list[asyncio.StreamWriter] = []
        self.carried = 0
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.ended: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            hello = json.loads(await reader.readline())
            await self.relay_server.serve(hello, reader, writer)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay = Relay(reader, writer)
        with contextlib.closing(relay), contextlib.suppress(StreamEnded):
            while not relay.closed.is_set():
                await self.is_open.wait()
                await self.carry(relay)

    async def carry(self, relay: Relay) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.connections.append(writer)
        self.carried += 1
        with contextlib.closing(writer), contextlib.suppress(OSError):
            try:
                confirmed = await meet_as_caller(relay, reader, writer, stream="s", target=f"127.0.0.1:{self.target}")
            except StreamEnded as exc:
                self.ended.append(str(exc))
                raise
            await relay.carry(reader, writer, confirmed)

    def cut(self) -> None:
        for connection in self.connections:
            connection.transport.abort()
        self.connections.clear()

    port: int
    entry: int


@asynccontextmanager
async def way_to(handler: Any) -> AsyncIterator[Way]:
    async with await asyncio.start_server(handler, "127.0.0.1", 0) as target:
        way = Way(target.sockets[0].getsockname()[1])
        async with (
            await asyncio.start_server(way.serve, "127.0.0.1", 0) as far,
            await asyncio.start_server(way.accept, "127.0.0.1", 0) as near,
        ):
            way.port = far.sockets[0].getsockname()[1]
            way.entry = near.sockets[0].getsockname()[1]
            yield way
            way.relay_server.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


def test_bytes_arrive_once_and_in_order_over_any_number_of_connections() -> None:
    payload = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(200_000))

    async def run() -> tuple[bytes, int]:
        async with way_to(echo) as way:
            reader, writer = await asyncio.open_connection("127.0.0.1", way.entry)

            async def send() -> None:
                for start in range(0, len(payload), 50_000):
                    writer.write(payload[start : start + 50_000])
                    await writer.drain()

            sending = asyncio.create_task(send())
            received = b""
            while len(received) < len(payload):
                received += await reader.readexactly(min(500_000, len(payload) - len(received)))
                way.cut()
            await sending
            writer.close()
            return received, way.carried

    received, carried = asyncio.run(run())

    assert received == payload
    assert carried > 5


def test_what_is_said_while_there_is_no_connection_arrives_later() -> None:
    async def run() -> bytes:
        async with way_to(echo) as way:
            reader, writer = await asyncio.open_connection("127.0.0.1", way.entry)
            writer.write(b"before ")
            await reader.readexactly(7)
            way.is_open.clear()
            way.cut()
            writer.write(b"during")
            await writer.drain()
            way.is_open.set()
            during = await reader.readexactly(6)
            writer.close()
            return during

    assert asyncio.run(run()) == b"during"


@pytest.mark.parametrize("who", ["caller", "target"])
def test_the_end_of_one_side_ends_the_other(who: str) -> None:
    async def answer_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"last words")
        writer.close()

    ended = asyncio.Event()

    async def wait_for_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        ended.set()
        writer.close()

    async def run() -> None:
        async with way_to(answer_and_close if who == "target" else wait_for_end) as way:
            reader, writer = await asyncio.open_connection("127.0.0.1", way.entry)
            if who == "target":
                assert await asyncio.wait_for(reader.read(), 10) == b"last words"
            else:
                writer.write(b"x")
                await writer.drain()
            writer.close()
            if who == "caller":
                await asyncio.wait_for(ended.wait(), 10)

    asyncio.run(run())


def test_a_target_that_is_not_there_ends_the_stream_at_once() -> None:
    async def run() -> list[str]:
        async with way_to(echo) as way:
            way.target = 1  # nobody listens there
            reader, writer = await asyncio.open_connection("127.0.0.1", way.entry)
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
            return way.ended

    (why,) = asyncio.run(run())

    assert "127.0.0.1:1 can't be reached" in why


def test_a_stream_that_the_far_end_has_forgotten_is_not_begun_anew() -> None:
    async def run() -> list[str]:
        async with way_to(echo) as way:
            reader, writer = await asyncio.open_connection("127.0.0.1", way.entry)
            writer.write(b"hello")
            await reader.readexactly(5)
            way.relay_server.close()
            way.cut()
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
            return way.ended

    assert asyncio.run(run()) == ["the stream has ended"]
