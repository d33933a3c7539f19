"""A TCP proxy that lets bytes through at a limited rate, as a slow or broken network does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PIECE = 16_384


class SlowProxy:
    """Carries connections to a server. `rate` may be changed at any time.

    Attributes
    ----------
    rate
        Bytes per second that all connections together send to the server; None: no limit; 0: nothing gets through.
    carried
        Bytes that the server was sent.
    """

    def __init__(self, host: str, port: int) -> None:
        self.rate: float | None = None
        self.carried = 0
        self._target = host, port
        self._turn: asyncio.Lock
        self._writers: list[asyncio.StreamWriter] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # CancelledError too: asyncio's streams log it.
        with contextlib.suppress(OSError, asyncio.CancelledError), contextlib.closing(writer):
            there_reader, there_writer = await asyncio.open_connection(*self._target)
            self._writers += [writer, there_writer]
            with contextlib.closing(there_writer):
                await asyncio.gather(self._send(reader, there_writer), self._answer(there_reader, writer))

    async def _send(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_PIECE):
            async with self._turn:
                while self.rate == 0:
                    await asyncio.sleep(0.05)
                if self.rate is not None:
                    await asyncio.sleep(len(data) / self.rate)
            writer.write(data)
            self.carried += len(data)
            await writer.drain()
        writer.write_eof()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_PIECE):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _run(self, listener: socket.socket, ended: asyncio.Event) -> None:
        self._turn = asyncio.Lock()
        server = await asyncio.start_server(self._serve, sock=listener, limit=_PIECE)
        await ended.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # in which their sockets are closed


@contextmanager
def slow_proxy(port: int, host: str = "127.0.0.1") -> Iterator[tuple[SlowProxy, int]]:
    """Carry connections to a server; yield the proxy and the port on which it listens."""
    proxy = SlowProxy(host, port)
    listener = socket.socket()
    # Small, or megabytes would seem to be sent that wait here.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PIECE)
    listener.bind(("0.0.0.0", 0))
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(proxy._run(listener, ended)))
    thread.start()
    try:
        yield proxy, listener.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()
