"""Large buffers on their way to nodes that share no files with the caller: each once per node.

The caller sends a buffer to one node. Each node passes it on to two others at a time, piece by piece as it arrives:
many nodes have it little later than one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, NamedTuple, cast

from skyward.engine.store import Store
from skyward.transfer.wire import DROP, FETCH, KEEP, PIECE

_PIECES = 3
"""Pieces that are on their way to a node at once. Chosen, not measured: the link does not idle between two of them."""
_READERS = 2
"""Nodes that a node sends a buffer to at once. Chosen, not measured: more would share its line."""


class _Source(NamedTuple):
    """A worker that sends a buffer on, and what receives it there."""

    address: str
    receiving: asyncio.Task[str]

    def is_usable(self) -> bool:
        return not self.receiving.done() or succeeded(self.receiving)


class Delivery:
    """Brings buffers of `store` to nodes. `send` calls a handler of the worker at an address. In the event loop."""

    def __init__(self, store: Store, send: Callable[..., Awaitable[Any]]) -> None:
        self._store = store
        self._send = send
        self._there: dict[tuple[int, str], asyncio.Task[str]] = {}  # by node and digest; the worker that received it
        self._sources: dict[str, asyncio.Queue[_Source | None]] = {}  # who may send it next; None: the caller
        self._alive: Collection[str] = ()
        self._removals: dict[tuple[int, str], asyncio.Task[None]] = {}

    async def bring(self, digests: Iterable[str], node: int, address: str) -> None:
        """Return when the node has the buffers; the worker at `address`, on that node, receives those it lacks.

        Raises
        ------
        OSError
            A buffer did not arrive.
        RuntimeError
            There is no room for it.
        """
        coming = []
        for digest in digests:
            task = self._there.get((node, digest))
            if task is None or (task.done() and not succeeded(task)):
                task = self._there[node, digest] = asyncio.ensure_future(self._bring(digest, node, address))
            coming.append(task)
        for task in coming:
            await asyncio.shield(task)

    async def _bring(self, digest: str, node: int, address: str) -> str:
        if removal := self._removals.get((node, digest)):
            await asyncio.wait([removal])  # or it would remove the new one
        sources = self._sources.get(digest)
        if sources is None:
            sources = self._sources[digest] = asyncio.Queue()
            sources.put_nowait(None)
        source = await sources.get()
        if source is not None and not (source.address in self._alive and source.is_usable()):
            source = None
        itself = _Source(address, cast(asyncio.Task[str], asyncio.current_task()))
        for _ in range(_READERS):
            sources.put_nowait(itself)
        try:
            if source is None:
                await self._upload(digest, address)
            else:
                await self._fetch(digest, address, source)
                sources.put_nowait(source)
        except BaseException:
            sources.put_nowait(None)  # the next one has it from the caller
            raise
        return address

    async def _fetch(self, digest: str, address: str, source: _Source) -> None:
        """Have a worker fetch a buffer from another one, which may itself be receiving it."""
        total = len(self._store.data(digest))
        fetching = asyncio.ensure_future(self._ask(address, FETCH, digest=digest, total=total, source=source.address))
        try:
            await asyncio.wait([fetching, source.receiving], return_when=asyncio.FIRST_COMPLETED)
            if not fetching.done() and not source.is_usable():
                raise OSError(f"{source.address} has not received an argument")
            await fetching
        finally:
            fetching.cancel()

    async def _upload(self, digest: str, address: str) -> None:
        from distributed.protocol import to_serialize
        from distributed.protocol.compression import maybe_compress

        data = memoryview(self._store.data(digest))
        is_free = asyncio.Semaphore(_PIECES)
        failures: list[Exception] = []

        async def send(start: int) -> None:
            async with is_free:
                if failures:
                    return
                piece = data[start : start + PIECE]
                name, packed = await asyncio.to_thread(maybe_compress, piece, compression="zstd")  # if that pays
                what = {"start": start, "total": data.nbytes, "data": to_serialize(packed), "compression": name}
                try:
                    await self._ask(address, KEEP, digest=digest, **what)
                except (OSError, RuntimeError) as exc:
                    failures.append(exc)

        *starts, last = range(0, data.nbytes, PIECE)
        await asyncio.gather(*map(send, starts))
        await send(last)  # with it the buffer is complete
        if failures:
            if isinstance(failures[0], RuntimeError):
                await self._remove(address, digest)  # pieces that came after the one for which there was no room
            raise failures[0]

    async def _ask(self, address: str, op: str, **what: Any) -> None:
        refusal = await self._send(address, op, **what)
        if refusal is not None:
            kind, text = refusal
            raise OSError(text) if kind == "source" else RuntimeError(text)

    def update(self, nodes: Collection[int], workers: Collection[str]) -> None:
        """Take note of the nodes and workers that there are now: what others had is forgotten."""
        self._alive = workers
        for key in [key for key in self._there if key[0] not in nodes]:
            del self._there[key]

    def drop(self, digests: Collection[str]) -> None:
        """Let nodes remove buffers that the store has dropped."""
        for key in [key for key in self._there if key[1] in digests]:
            task = self._there.pop(key)
            if task.done() and succeeded(task):
                removal = asyncio.ensure_future(self._remove(task.result(), key[1]))
                self._removals[key] = removal
                removal.add_done_callback(functools.partial(self._removed, key))
        for digest in digests:
            self._sources.pop(digest, None)

    def _removed(self, key: tuple[int, str], removal: asyncio.Task[None]) -> None:
        if self._removals.get(key) is removal:
            del self._removals[key]

    async def _remove(self, address: str, digest: str) -> None:
        with contextlib.suppress(OSError):  # the worker is gone; the node removes all of the pool's files at its end
            await self._send(address, DROP, digests=[digest])

    def close(self) -> None:
        """Stop whatever is on its way."""
        for task in (*self._there.values(), *self._removals.values()):
            task.cancel()
        self._there.clear()


def succeeded(done: asyncio.Future[Any]) -> bool:
    """Tell whether a future that is done has a result."""
    return not done.cancelled() and done.exception() is None
