"""A chunk on its way to a worker and back, and what has become of one whose worker is gone."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from skyward.engine.calls import Item, now
from skyward.engine.estimates import Estimates
from skyward.engine.group import Group
from skyward.engine.placement import Placement
from skyward.engine.transport import Transport, UnreachableError, WorkerGoneError
from skyward.transfer.wire import Chunk, Outcomes
from skyward.worker import interrupts

UNREACHABLE_S = 1.0
"""Seconds for which a worker that could not be reached gets nothing more.
Chosen, not measured: it is back by then, or gone."""
_PLACEHOLDER_S = 1.5 * Estimates.BUDGET_S
"""Seconds after which the scheduler is told of a chunk that runs: only calls that are long themselves take so long."""


@dataclass(slots=True, eq=False)
class SentChunk:
    """A chunk that was sent to a worker, or to the scheduler for any worker."""

    key: str
    group: Group
    items: list[Item]
    wanted: int  # calls that have not been cancelled
    address: str | None  # of the worker that it was sent to; None: the scheduler chooses
    waiting: asyncio.Task[Any] | None = None  # what waits for the outcomes of a chunk that was sent directly
    is_direct: bool = False
    is_sent: bool = False
    is_stolen: bool = False
    is_old: bool = False  # it runs long, or waits behind a Dask task
    is_lost: bool = False  # its worker is gone
    is_dropped: bool = False  # its outcomes are not waited for any more
    has_ended: bool = False  # with outcomes
    behind: tuple[SentChunk, ...] = ()  # those that were sent to the same worker before, and have to end first
    placeholder: Any = None  # the Dask future by which the scheduler knows of it


class SentChunks:
    """Brings chunks to their workers. Used in the event loop of the Dask client only."""

    def __init__(
        self, transport: Transport, placement: Placement, was_reclaimed: Callable[[str], Awaitable[bool]] | None
    ) -> None:
        self._transport = transport
        self._placement = placement
        self._was_reclaimed = was_reclaimed
        self._at: dict[str, list[SentChunk]] = defaultdict(list)  # in the order in which they were sent there
        self._asking: set[asyncio.Task[None]] = set()

    def add(self, sent: SentChunk) -> None:
        """Count a chunk as one of its worker's. The caller also calls `result`."""
        if sent.address is not None:
            self._placement.add(sent.address)
            sent.behind = tuple(self._at[sent.address])
            self._at[sent.address].append(sent)

    async def result(self, sent: SentChunk, chunk: Chunk) -> Outcomes | BaseException:
        """Return the outcomes of a chunk, or why there are none."""
        try:
            outcomes = await self._outcomes(sent, chunk)
        except asyncio.CancelledError as exc:
            return WorkerGoneError(sent.address or "") if sent.is_lost else exc
        except Exception as exc:  # Dask's own errors: worker killed, scheduler lost, chunk unreadable over there
            return exc
        finally:
            if sent.address is not None:
                self._placement.remove(sent.address)
                self._at[sent.address].remove(sent)
                if not self._at[sent.address]:
                    del self._at[sent.address]
            if sent.placeholder is not None:
                sent.placeholder.release()
        sent.has_ended, sent.behind = True, ()
        return outcomes

    async def _outcomes(self, sent: SentChunk, chunk: Chunk) -> Outcomes:
        needs = sent.items[0].needs  # of a generator: other calls that need values are tasks of a graph
        if sent.address is None:
            arguments = await self._transport.arguments(chunk)
            if sent.is_dropped:
                raise asyncio.CancelledError
            return await self._transport.run(sent.key, arguments, needs)
        await self._transport.prepare(chunk, self._placement.node(sent.address), sent.address)
        if sent.is_dropped:
            raise asyncio.CancelledError
        if needs:
            sent.waiting = asyncio.current_task()
            losses = self._transport.scheduler_losses
            try:
                return await self._transport.run(sent.key, [chunk], needs, workers=[sent.address])
            except Exception as exc:
                if self._transport.scheduler_losses != losses:  # all workers are gone with their scheduler
                    raise WorkerGoneError(sent.address) from exc
                raise
            finally:
                sent.waiting = None
        sent.is_direct = True

        def when_sent() -> None:
            sent.is_sent = True

        timer = asyncio.get_running_loop().call_later(_PLACEHOLDER_S, self._start_placeholder, sent)
        sent.waiting = asyncio.current_task()
        try:
            return await self._transport.send(sent.address, chunk, when_sent)
        finally:
            sent.waiting = None
            timer.cancel()

    async def wait_left(self, sent: SentChunk) -> None:
        """Wait until a chunk that was dropped has ended, if it is a task: Dask ends the wait for it before."""
        if sent.is_dropped and not sent.is_direct:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interrupts.GRACE_S):
                    await self._transport.wait_ended({sent.key: sent.address}, tuple)

    def _start_placeholder(self, sent: SentChunk) -> None:
        assert sent.address is not None
        sent.is_old = True
        if not sent.is_dropped and self._transport.client.status == "running":
            if self._placement.has_idle():
                self._asking.add(task := asyncio.ensure_future(self._take_back(sent)))
                task.add_done_callback(self._asking.discard)
            sent.placeholder = self._transport.start_placeholder(sent.key, sent.address)

    def lose(self, chunks: Iterable[SentChunk], alive: Collection[str]) -> None:
        """End the wait for what is with workers that are not alive any more."""
        for sent in chunks:
            if sent.waiting is not None and sent.address not in alive:
                sent.is_lost = True
                sent.waiting.cancel()

    async def is_free_retry(self, sent: SentChunk, result: Outcomes | BaseException) -> bool:
        """Tell whether a chunk that has no outcomes is to run again, whatever it has lost before."""
        behind, sent.behind = sent.behind, ()
        if sent.address is not None and isinstance(result, UnreachableError):
            self._placement.avoid(sent.address, now() + UNREACHABLE_S)
            return True
        if not isinstance(result, WorkerGoneError):
            return False
        self._placement.avoid(result.address, math.inf)
        # It has not begun when it was still on its way, or behind another one.
        if sent.is_direct and not (sent.is_sent and all(f.has_ended for f in behind)):
            return True
        return self._was_reclaimed is not None and await self._was_reclaimed(result.address)

    def steal(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Have chunks that wait behind others, or behind a Dask task, given back if another worker has nothing to do.

        One that has begun is not given back.
        """
        if not self._placement.has_idle():
            return []
        last = [self._at[address][-1] for address in self._placement.overloaded() if address in self._at]
        last += [chunks[0] for chunks in self._at.values() if chunks[0].is_old]
        return [self._take_back(sent) for sent in last if sent.is_direct and not sent.is_stolen]

    async def _take_back(self, sent: SentChunk) -> None:
        assert sent.address is not None
        if not sent.is_stolen:
            sent.is_stolen = True
            await self._transport.take_back(sent.address, [sent.key])
