"""Keeps the agent's log from filling the disk, whatever is written into it again and again."""

from __future__ import annotations

import asyncio
from pathlib import Path

MOST_BYTES = 64 << 20
"""Bytes from which on the log loses its beginning. Chosen, not measured: a pool that works writes some kB."""
KEPT_BYTES = 1 << 20
_LOOK_S = 5.0


async def watch(log: Path) -> None:
    """Keep a log short until this is cancelled."""
    while True:
        await asyncio.sleep(_LOOK_S)
        await asyncio.to_thread(shorten, log)


def shorten(log: Path, most: int = MOST_BYTES, kept: int = KEPT_BYTES) -> None:
    """Leave only the end of a log that has grown too large. Processes that append to it go on doing so."""
    size = log.stat().st_size
    if size <= most:
        return
    with log.open("rb") as file:
        file.seek(size - kept)
        end = file.read().partition(b"\n")[2]
    with log.open("ab") as file:
        file.truncate(0)
        file.write(b"... the first %d MB of this log were removed\n" % ((size - len(end)) // 1_000_000) + end)
