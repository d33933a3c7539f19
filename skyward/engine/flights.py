"""A chunk on its way to a worker and back, and what has become of one whose worker is gone."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from skyward.engine.calls import Estimates, Item, now
from skyward.engine.group import Group
from skyward.engine.placement import Placement
from skyward.engine.transport import Transport, UnreachableError, WorkerGoneError
from skyward.transfer.wire import Chunk, Outcomes

UNREACHABLE_S = 1.0
"""Seconds for which a worker that could not be reached gets nothing more. By feel: it is back by then, or gone."""
_ATTEND_S = 1.5 * Estimates.BUDGET_S
"""Seconds after which the scheduler is told of a chunk that runs: only calls that are long themselves take so long."""


@dataclass(slots=True, eq=False)
class Flight:
    """A chunk that was sent to a worker, or to the scheduler for any worker."""

    key: str
    group: Group
    items: list[Item]
    wanted: int  # calls that have not been cancelled
    address: str | None  # of the worker that it was sent to; None: the scheduler chooses
    waiting: asyncio.Task[Any] | None = None  # what waits for the outcomes of a chunk that was sent directly
    is_direct: bool = False
    is_sent: bool = False
    is_recalled: bool = False
    is_lost: bool = False  # its worker is gone
    is_dropped: bool = False  # nobody waits for it any more
    has_ended: bool = False  # with outcomes
    behind: tuple[Flight, ...] = ()  # those that were sent to the same worker before, and have to end first
    attended: Any = None  # the Dask future by which the scheduler knows of it


class Flights:
    """Brings chunks to their workers. Used in the event loop of the Dask client only."""

    def __init__(
        self, transport: Transport, placement: Placement, was_taken: Callable[[str], Awaitable[bool]] | None
    ) -> None:
        self._transport = transport
        self._placement = placement
        self._was_taken = was_taken
        self._at: dict[str, list[Flight]] = defaultdict(list)  # in the order in which they were sent there

    def take_off(self, flight: Flight) -> None:
        """Count a chunk as one of its worker's. Whoever calls also calls `land`."""
        if flight.address is not None:
            self._placement.add(flight.address)
            flight.behind = tuple(self._at[flight.address])
            self._at[flight.address].append(flight)

    async def land(self, flight: Flight, chunk: Chunk) -> Outcomes | BaseException:
        """Return the outcomes of a chunk, or why there are none."""
        try:
            outcomes = await self._outcomes(flight, chunk)
        except asyncio.CancelledError as exc:
            return WorkerGoneError(flight.address or "") if flight.is_lost else exc
        except Exception as exc:  # Dask's own errors: worker killed, scheduler lost, chunk unreadable over there
            return exc
        finally:
            if flight.address is not None:
                self._placement.remove(flight.address)
                self._at[flight.address].remove(flight)
                if not self._at[flight.address]:
                    del self._at[flight.address]
            if flight.attended is not None:
                flight.attended.release()
        flight.has_ended, flight.behind = True, ()
        return outcomes

    async def _outcomes(self, flight: Flight, chunk: Chunk) -> Outcomes:
        if flight.address is None:
            arguments = await self._transport.arguments(chunk)
            if flight.is_dropped:
                raise asyncio.CancelledError
            return await self._transport.run(flight.key, arguments)
        await self._transport.prepare(chunk, self._placement.node(flight.address), flight.address)
        if flight.is_dropped:
            raise asyncio.CancelledError
        flight.is_direct = True

        def when_sent() -> None:
            flight.is_sent = True

        timer = asyncio.get_running_loop().call_later(_ATTEND_S, self._attend, flight)
        flight.waiting = asyncio.current_task()
        try:
            return await self._transport.send(flight.address, chunk, when_sent)
        finally:
            flight.waiting = None
            timer.cancel()

    def _attend(self, flight: Flight) -> None:
        assert flight.address is not None
        if not flight.is_dropped and self._transport.client.status == "running":
            flight.attended = self._transport.attend(flight.key, flight.address)

    def lose(self, flights: Iterable[Flight], alive: Collection[str]) -> None:
        """End the wait for what is with workers that are not alive any more."""
        for flight in flights:
            if flight.waiting is not None and flight.address not in alive:
                flight.is_lost = True
                flight.waiting.cancel()

    async def is_excused(self, flight: Flight, result: Outcomes | BaseException) -> bool:
        """Tell whether a chunk that has no outcomes is to run again, whatever it has lost before."""
        behind, flight.behind = flight.behind, ()
        if flight.address is not None and isinstance(result, UnreachableError):
            self._placement.shun(flight.address, now() + UNREACHABLE_S)
            return True
        if not isinstance(result, WorkerGoneError):
            return False
        self._placement.shun(result.address, math.inf)
        # It has not begun when it was still on its way, or behind another one.
        if flight.is_direct and not (flight.is_sent and all(f.has_ended for f in behind)):
            return True
        return self._was_taken is not None and await self._was_taken(result.address)

    def recall(self) -> Sequence[Awaitable[None]]:
        """Have chunks that wait behind others on one worker given back, if another worker has nothing to do."""
        if not self._placement.has_idle():
            return []
        requests = []
        for address in self._placement.crowded():
            last = self._at[address][-1] if address in self._at else None
            if last is not None and last.is_direct and not last.is_recalled:
                last.is_recalled = True
                requests.append(self._transport.take_back(address, [last.key]))
        return requests
