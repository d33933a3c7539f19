"""Broadcasts: one task per node or slot, pinned there, begun together and ended together."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Sequence
from typing import Any

from skyward.engine.calls import Item, make_chunk, now
from skyward.engine.ending import RESTART_S, EndingWorkers
from skyward.engine.failures import WHY_DIED, not_run
from skyward.engine.roster import Roster
from skyward.engine.sources import Sources
from skyward.engine.transport import Transport, WorkerGoneError
from skyward.errors import MachineLostError, WorkerDiedError
from skyward.transfer.wire import Chunk, Kind, Outcome, Outcomes, Participant, barrier_handler

logger = logging.getLogger(__name__)

ISOLATION = "skyward_isolation"
"""Attribute of a function whose broadcasts run in processes of their own: what these need."""
_CAUSE_S = 1.0
"""Seconds after the first failure of a job in which the one that caused it may still arrive: when one ends, all others
see their connections to it break. Chosen, not measured."""


class Broadcaster:
    """Runs the broadcasts of one engine, one after another: two at once would wait for each other's nodes."""

    def __init__(self, roster: Roster, transport: Transport, ending: EndingWorkers, sources: Sources) -> None:
        self._roster = roster
        self._transport = transport
        self._ending = ending
        self._sources = sources
        self._lock = asyncio.Lock()
        self.ended: int = 0  # with all values, so far
        self._expected = 0  # slots, when the present broadcast began

    @property
    def is_busy(self) -> bool:
        return self._lock.locked()

    async def run(self, item: Item, needs: Sequence[Any], every_slot: bool) -> list[Outcome]:
        """Return the outcomes in order, or the first failure alone. In the event loop.

        `needs` are the futures of the values that the call needs from others.
        """
        async with self._lock:
            return await self._run(item, needs, every_slot)

    async def _run(self, item: Item, needs: Sequence[Any], every_slot: bool) -> list[Outcome]:
        await self._complete()
        self._expected = self._roster.expected()
        placed = self._roster.layout
        targets = [
            (address, worker, len(workers))
            for node, slots in enumerate(placed.nodes)
            for workers in [slots if every_slot else placed.workers(node)]
            for worker, address in enumerate(workers)
        ]
        barrier = uuid.uuid4().hex if len(targets) > 1 else None
        addresses = [target[0] for target in targets]  # which change when workers are renewed
        tasks: dict[asyncio.Task[Outcome | BaseException], int] = {}
        keys: list[str] = []
        for index, (_, worker, per_node) in enumerate(targets):
            key = f"{item.call.label}-{uuid.uuid4().hex}"
            keys.append(key)
            part = Participant(index, len(targets), worker, per_node, barrier)
            running = asyncio.create_task(self._run_part(key, item, needs, part, addresses))
            tasks[running] = index
        is_job = getattr(item.call.fn, ISOLATION, None) is not None
        results: dict[int, Outcome] = {}
        failures: list[Outcome | BaseException] = []
        until = math.inf
        pending = set(tasks)
        try:
            while pending and (left := until - now()) > 0:
                finished, pending = await asyncio.wait(
                    pending, timeout=min(0.5, left), return_when=asyncio.FIRST_COMPLETED
                )
                for task in sorted(finished, key=tasks.__getitem__):
                    outcome = task.result()
                    if isinstance(outcome, Outcome) and outcome.kind is Kind.VALUE:
                        results[tasks[task]] = outcome
                    else:
                        failures.append(outcome)
                        until = min(until, now() + (_CAUSE_S if is_job else 0.0))
                gone = set(filter(None, addresses)) - self._roster.workers()
                if pending and gone & {addresses[tasks[t]] for t in pending}:
                    raise MachineLostError(
                        f"a worker ({', '.join(sorted(gone))}) was lost during a broadcast of {item.call.label}(); "
                        "the others were stopped. A broadcast is not retried: send it again.",
                        machine=sorted(gone)[0],
                        losses=1,
                    )
            if failures:
                first = min(failures, key=_distance)
                if isinstance(first, BaseException):
                    raise first
                return [first]
        finally:
            left_over = map(tasks.__getitem__, pending)
            unfinished = {keys[i]: None if self._roster.is_joined else addresses[i] or None for i in left_over}
            for task in pending:
                task.cancel()
            if unfinished:
                await self._abort_barrier(barrier)
                await self._transport.interrupt(unfinished)
                self._ending.add_chunks(unfinished)
            if is_job:
                workers = [*filter(None, addresses)]
                await self._transport.end_processes(keys, workers, is_good=len(results) == len(targets))
        self.ended += 1
        return [results[i] for i in range(len(targets))]

    async def _complete(self) -> None:
        """Wait until every slot is there and rid of interrupted calls: a worker may be on its way out or in."""
        roster = self._roster
        await roster.has_slots()
        try:
            async with asyncio.timeout(RESTART_S) as limit:
                await self._ending.wait_for_chunks()
                while roster.count < max(1, roster.expected()):
                    if not roster.expected():  # no machine is left: a replacement takes minutes, and calls wait for it
                        limit.reschedule(asyncio.get_running_loop().time() + RESTART_S)
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise MachineLostError(
                f"a broadcast needs every slot, but only {roster.count} of {roster.expected()} are "
                f"available after {RESTART_S:g} s; scale the pool, or enter it again",
                machine="",
                losses=1,
            ) from None

    async def _run_part(
        self, key: str, item: Item, needs: Sequence[Any], part: Participant, addresses: list[str]
    ) -> Outcome | BaseException:
        address = addresses[part.rank]
        losses = self._transport.scheduler_losses
        self._roster.placement.add(address)
        try:
            isolation = getattr(item.call.fn, ISOLATION, None)
            layout, facts = self._roster.pickled_layout, self._sources.facts
            chunk = make_chunk(key, [item], layout, facts, part=part, isolation=isolation)
            result = await self._send(chunk, needs, address)
            if result.is_outdated and not self._roster.is_joined:
                addresses[part.rank] = ""  # it ends at our request
                addresses[part.rank] = await asyncio.wait_for(self._ending.renewed(address), RESTART_S)
                return await self._run_part(key, item, needs, part, addresses)
        except WorkerGoneError:
            if self._transport.scheduler_losses != losses or self._roster.expected() < self._expected:
                return MachineLostError(
                    f"the machine of part {part.rank} of {part.size}, or the scheduler's, was lost or can't be reached "
                    f"any more during the broadcast of {item.call.label}(); the other parts were stopped. A broadcast "
                    "is not retried: send it again.",
                    machine=address,
                    losses=1,
                )
            return WorkerDiedError(
                f"the worker of part {part.rank} of {part.size} died during the broadcast of "
                f"{item.call.label}(); the other parts were stopped. {WHY_DIED}",
                machine=address,
                losses=1,
            )
        except Exception as exc:  # Dask's own errors: see `SentChunks.result`
            return not_run(exc)
        finally:
            self._roster.placement.remove(address)
        return result.items[0]

    async def _send(self, chunk: Chunk, needs: Sequence[Any], address: str) -> Outcomes:
        """Run a part on its worker, before all else that waits there."""
        arguments: Sequence[object] = [chunk]
        if self._roster.is_joined:
            arguments = await self._transport.arguments(chunk)
        else:
            await self._transport.prepare(chunk, self._roster.placement.node(address), address)
        return await self._transport.run(chunk.key, arguments, needs=needs, workers=[address], priority=100)

    async def _abort_barrier(self, name: str | None) -> None:
        if name is not None:
            try:
                handler = barrier_handler(self._roster.layout.pool_id, abort=True)
                await getattr(self._transport.client.scheduler, handler)(name=name)
            except Exception:  # the scheduler is gone, and nobody waits at its barriers
                logger.debug("barrier %s could not be aborted", name, exc_info=True)


def _distance(failure: Outcome | BaseException) -> int:
    """Return how far a failure is from what went wrong: an end is nearer than what others say of it."""
    if isinstance(failure, BaseException) or failure.kind is Kind.DIED:
        return 0
    return 1 if failure.kind is Kind.ABORTED else 2
