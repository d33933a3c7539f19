"""Large buffers on a node that shares no files with the caller: each in one file, which all its workers map.

Handlers of a Dask worker, for the engine and for the workers of other nodes to call. What arrives comes in pieces, so
that neither side holds all of it, and is only seen under its name when it is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from skyward.transfer.wire import DROP, FETCH, KEEP, PIECE, READ

VARIABLE = "SKYWARD_SHARE"
Refusal = tuple[str, str]
"""Why a buffer is not there: "room" or "source", and a text."""
_REACH_S = 5.0
"""Seconds to wait for a connection to another node. Chosen, not measured: nodes are near each other."""
_ARRIVES_S = 600.0
"""Seconds for which another node waits for the next piece of a buffer that is still on its way here. Chosen, not
measured: the caller tells it before if nothing more comes."""
_DIGEST = re.compile(r"[0-9a-f]{32}")


def path_of(digest: str) -> Path:
    """Return where a buffer lies on this node, or will lie."""
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"not the digest of a buffer: {digest!r}")
    return Path(os.environ[VARIABLE]) / digest


def scratch(worker: Any) -> str:
    """Return a folder for files of the pool: that of the node, or one that Dask removes with the worker."""
    return os.environ.get(VARIABLE) or str(worker.local_directory if worker else tempfile.gettempdir())


def install(worker: Any) -> None:
    """Let `worker`, a Dask worker in this process, keep buffers for its node."""
    from distributed.core import rpc
    from distributed.protocol import to_serialize
    from distributed.protocol.compression import compressions

    arriving: dict[str, _Arriving] = defaultdict(_Arriving)

    # What goes wrong is returned: an exception that passes through the scheduler arrives as text alone.
    async def keep(digest: str, start: int, total: int, data: Any, compression: str | None = None) -> Refusal | None:
        try:
            plain = await asyncio.to_thread(compressions[compression].decompress, data)
            await asyncio.to_thread(_write, digest, start, total, memoryview(plain).cast("B"))
        except OSError as exc:
            arriving.pop(digest, None)
            where = f"{socket.gethostname()}, in {path_of(digest).parent}"
            return "room", f"an argument of {total / 1e6:.0f} MB can't be kept on {where}: {exc.strerror or exc}"
        arriving[digest].take(start)
        if path_of(digest).exists():
            del arriving[digest]
        return None

    async def read(digest: str, start: int) -> Any:
        while not path_of(digest).exists() and start not in arriving[digest].pieces:
            await arriving[digest].another()
        return to_serialize(await asyncio.to_thread(_read, digest, start))

    async def fetch(digest: str, total: int, source: str) -> Refusal | None:
        try:
            async with rpc(source, timeout=_REACH_S, connection_args=worker.connection_args) as other:
                for start in range(0, total, PIECE):
                    piece = await getattr(other, READ)(digest=digest, start=start)
                    if refusal := await keep(digest, start, total, piece):
                        return refusal
        except OSError as exc:
            return "source", f"{source} does not send an argument: {exc}"
        return None

    async def drop(digests: list[str]) -> None:
        for digest in digests:
            path = path_of(digest)
            for file in (path, path.with_suffix(".part")):
                file.unlink(missing_ok=True)
            arriving.pop(digest, None)

    worker.handlers |= {KEEP: keep, READ: read, FETCH: fetch, DROP: drop}


class _Arriving:
    """The pieces of a buffer that have arrived, while others have not."""

    def __init__(self) -> None:
        self.pieces: set[int] = set()
        self._next: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, start: int) -> None:
        self.pieces.add(start)
        self._next.set_result(None)
        self._next = asyncio.get_running_loop().create_future()

    async def another(self) -> None:
        """Wait until another piece arrives. Raises TimeoutError, an OSError, when none does."""
        async with asyncio.timeout(_ARRIVES_S):
            await asyncio.shield(self._next)


def _write(digest: str, start: int, total: int, data: memoryview) -> None:
    path = path_of(digest)
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.touch(0o600)
        with part.open("r+b") as file:  # pieces come in any order
            file.seek(start)
            file.write(data)
        if start + data.nbytes >= total:  # sent after all others had arrived
            part.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _read(digest: str, start: int) -> bytes:
    path = path_of(digest)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        file = path.with_suffix(".part").open("rb")
    with file:
        file.seek(start)
        return file.read(PIECE)
