"""What travels between a caller far away and the scheduler of its pool: compressed, with all of lately in view.

A chunk's pickle has much in common with those before it: the same functions, estimators, index arrays, tables below
1 MiB. Both sides of a connection remember what went over it, so that a repetition costs a few bytes, wherever in a
pickle it is. That is what zstandard's streaming mode does (RFC 8878).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import zstandard

LINK = "skyward_link"
"""What the scheduler is asked for, to be asked through the same connection from then on."""
_WINDOW_LOG = 25
"""32 MiB are remembered on each side of each direction. Chosen, not measured: some dozen chunks of a large search."""
_APART_BYTES = 256 << 10
"""What is larger is compressed in a thread: 0.5 ms at 500 MB/s (2026-11-29)."""


class Link:
    """Both directions of a connection: what is sent arrives in the same order. For one event loop.

    `hear` is called with each message and its data.
    """

    def __init__(self, comm: Any, hear: Callable[[dict[str, Any], bytes], None]) -> None:
        self._comm = comm
        self._hear = hear
        self._waiting: asyncio.Queue[tuple[dict[str, Any], bytes, Callable[[], bool]]] = asyncio.Queue()
        # Level 1 is the fastest, and long-distance matching finds what was sent many messages ago.
        options = zstandard.ZstdCompressionParameters.from_level(1, window_log=_WINDOW_LOG, enable_ldm=True)
        self._compress = zstandard.ZstdCompressor(compression_params=options).compressobj()
        self._decompress = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG).decompressobj()

    def send(self, message: dict[str, Any], data: bytes, begin: Callable[[], bool] = lambda: True) -> None:
        """Send a message. `begin` is called when its turn has come; False: it is not wanted any more."""
        self._waiting.put_nowait((message, data, begin))

    async def run(self) -> None:
        """Send and receive until the connection is closed, by either side or by the end of this task."""
        writing = asyncio.create_task(self._write())
        try:
            while True:
                message = await self._comm.read()
                self._hear(message, await _apart(self._decompress.decompress, message.pop("data")))
        except OSError:  # it is closed
            pass
        finally:
            self._comm.abort()
            writing.cancel()
            await asyncio.wait([writing])

    async def _write(self) -> None:
        with contextlib.suppress(OSError):  # it is closed, and the reader knows
            while True:
                message, data, begin = await self._waiting.get()
                if begin():
                    await self._comm.write({**message, "data": await _apart(self._pack, data)})

    def _pack(self, data: bytes) -> bytes:
        packed: bytes = self._compress.compress(data) + self._compress.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        return packed


async def _apart(work: Callable[[bytes], bytes], data: bytes) -> bytes:
    """Do `work` with data; in a thread, if they are large."""
    return await asyncio.to_thread(work, data) if len(data) > _APART_BYTES else work(data)
