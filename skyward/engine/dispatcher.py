"""Queued calls become chunks in flight, and chunks become outcomes, or calls that are queued again."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Sequence

from skyward.engine.calls import Item, batch_label, make_chunk, now
from skyward.engine.ending import EndingWorkers
from skyward.engine.estimates import Estimates
from skyward.engine.failures import died, lost_midway, not_run
from skyward.engine.future import CallFuture, ItemOutcomes
from skyward.engine.group import Group
from skyward.engine.loop import Loop
from skyward.engine.progress import Progress
from skyward.engine.roster import Roster
from skyward.engine.sent_chunks import UNREACHABLE_S, SentChunk, SentChunks
from skyward.engine.sources import Sources
from skyward.engine.store import Store
from skyward.engine.transport import Transport, UnreachableError, WorkerGoneError
from skyward.transfer.wire import Kind, Outcome, Outcomes

logger = logging.getLogger(__name__)

_FAILURE_S = 10.0
"""Seconds to wait for the reason why the scheduler is out of reach. Chosen, not measured: usually known within one."""
_CANCEL_CALLS = 5_000
"""Most cancelled calls that are dropped at once, a few milliseconds of work: then the loop has other turns."""
_CHUNKS_PER_SLOT = 2
"""Chunks in flight per slot: one that runs and one that waits on the worker, so that no slot idles in between."""


_VALUE, _CANCELLED, _NOT_RUN = Kind.VALUE, Kind.CANCELLED, Kind.NOT_RUN  # looked up once: this is asked of every call
_USER_ERRORS = (Kind.ERROR, Kind.OPAQUE)


class Dispatcher:
    """Serves groups in turn: keeps every slot busy with their calls, and runs lost calls again.

    Its state is touched in the event loop only, but for what other threads have queued or cancelled.
    """

    def __init__(
        self,
        loop: Loop,
        roster: Roster,
        transport: Transport,
        sent: SentChunks,
        ending: EndingWorkers,
        store: Store,
        sources: Sources,
        progress: Progress,
        *,
        retries: int,
    ) -> None:
        self.retries = retries
        self.estimates: Estimates = Estimates()
        self.last_activity: float = now()
        self.failure: BaseException | None = None  # why no more calls are taken
        self.ended: int = 0  # calls, so far
        self.chunks: dict[str, SentChunk] = {}  # in flight
        self._loop = loop
        self._roster = roster
        self._transport = transport
        self._sent = sent
        self._ending = ending
        self._store = store
        self._sources = sources
        self._progress = progress
        self.ready: deque[Group] = deque()  # groups with pending calls, each once, served in turn
        self._woken: set[Group] = set()  # groups that other threads have queued calls in
        self._cancelled: deque[tuple[Group, Item]] = deque()  # calls whose futures other threads have cancelled
        self._lock = threading.Lock()  # of both
        self._reruns = 0  # queued or running calls that were on a worker when it died
        self._over: asyncio.Future[None] = loop.asyncio_loop.create_future()  # done when there is a failure

    # --- from any thread ------------------------------------------------------------------------------------

    def check_open(self) -> None:
        if self.failure is not None:
            raise self.failure

    def wake(self, group: Group) -> None:
        with self._lock:
            asleep = not self._woken
            self._woken.add(group)
        if asleep:  # otherwise the loop has been woken and has not looked yet
            self._loop.call_soon(self._take_woken)

    def cancel(self, group: Group) -> None:
        self._loop.call_soon(self._cancel_group, group)

    def cancel_call(self, group: Group, item: Item) -> None:
        """Drop a call whose future was cancelled, or interrupt its chunk if no other call needs that."""
        with self._lock:
            asleep = not self._cancelled
            self._cancelled.append((group, item))
        if asleep:
            self._loop.call_soon(self._take_cancelled)

    def note(self, group: Group) -> None:
        self._loop.call_soon(self._progress.note, group)

    # --- in the loop: queues to chunks ----------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return bool(self.chunks or self.ready)

    def demand(self) -> int:
        """Return how many slots the calls that wait and run could use now."""
        return sum(group.demand() for group in {f.group for f in self.chunks.values()} | set(self.ready))

    def _take_woken(self) -> None:
        with self._lock:
            woken, self._woken = self._woken, set()
        for group in woken:
            if group.is_cancelled:
                self._cancel_group(group)
            elif group not in self.ready:
                self.ready.append(group)
                self._progress.note(group)
        self.pump()

    def pump(self) -> None:
        """Send chunks until every slot has enough, taking the groups in turn."""
        self.last_activity = now()
        is_joined = self._roster.is_joined
        waiting = 0  # groups in a row that could not send
        while self.ready and waiting < len(self.ready):
            group = self.ready.popleft()
            if not group.pending:
                continue
            self.ready.append(group)
            waiting += 1
            if group.limit is not None and len(group.in_flight) >= group.limit:
                continue
            ahead = self._chunks_per_slot(group.first())
            if is_joined:
                address = None
                if len(self.chunks) >= max(1, self._roster.count) * ahead:
                    continue
            elif (address := self._roster.placement.pick(ahead)) is None:
                continue
            if items := group.take_chunk(self.estimates, self._roster.count):
                waiting = 0
                self._send(group, items, address)
        if not is_joined:
            for request in self._sent.steal():
                self._loop.start(request)
        elif self.chunks and not self._roster.count and self._transport.client.status == "running":
            self._roster.watch()

    def _chunks_per_slot(self, item: Item) -> int:
        """Return how many chunks a slot may have when one that begins with `item` is sent there."""
        if self._reruns:
            return 1  # if it kills its worker, it takes no others with it
        if self._roster.is_joined:
            return self.estimates.chunks_shown(item.function.digest, item.size)
        # A long call does not wait behind another long one: the next free slot is soon enough.
        return _CHUNKS_PER_SLOT if self.estimates.is_short(item.function.digest) else 1

    def _send(self, group: Group, items: list[Item], address: str | None) -> None:
        key = f"{batch_label(items)}-{uuid.uuid4().hex}"
        group.in_flight[key] = items
        sent = self.chunks[key] = SentChunk(key, group, items, len(items), address)
        for item in items:
            item.chunk = key
            if isinstance(item.sink, CallFuture):
                item.sink.sent = True
        self._sent.add(sent)
        if items[0].call.stream is not None:
            items[0].call.stream.sent(address)
        self._loop.start(self._run_chunk(sent))

    async def _run_chunk(self, sent: SentChunk) -> None:
        key, group, items = sent.key, sent.group, sent.items
        began = now()
        chunk = make_chunk(key, items, self._roster.pickled_layout, self._sources.facts, access=group.access)
        result = await self._sent.result(sent, chunk)
        if (stream := items[0].call.stream) is not None:
            await self._sent.wait_left(sent)
            stream.left()
        is_running = self._transport.client.status == "running"
        is_gone = isinstance(result, (WorkerGoneError, UnreachableError)) and not self._roster.is_joined
        if not (isinstance(result, Outcomes) or is_gone or is_running or sent.is_dropped):
            # The scheduler is out of reach. The pool usually finds out why and fails with that: a better error.
            await self.wait_for_failure()
        if isinstance(result, Outcomes) and result.is_outdated and sent.address is not None:
            self._ending.end(sent.address)
        is_free_retry = not sent.is_dropped and await self._sent.is_free_retry(sent, result)
        if sent.is_dropped:
            self.pump()  # cancelled or failed meanwhile, and delivered then; its slot has come free
            return
        del self.chunks[key]
        group.in_flight.pop(key, None)
        if isinstance(result, Outcomes):
            if sent.is_old and sent.address is not None and result.items[0].kind is _NOT_RUN:
                # It was behind a Dask task, which may go on for long.
                self._roster.placement.avoid(sent.address, now() + UNREACHABLE_S)
                self._loop.asyncio_loop.call_later(UNREACHABLE_S, self.pump)
            self._completed(group, items, result.items)
        elif stream is not None and stream.received and self.failure is None:
            self._lost_midway(group, items[0], stream.received, result)
        elif is_free_retry and self.failure is None:
            self._requeue(group, items)
            self._loop.asyncio_loop.call_later(UNREACHABLE_S, self.pump)
        else:
            self._lost(group, items, result, now() - began)
        self.pump()

    async def wait_for_failure(self) -> None:
        """Wait a little for the reason why the scheduler is out of reach, which becomes `failure`."""
        await asyncio.wait([self._over], timeout=_FAILURE_S)

    def workers_changed(self) -> None:
        """End the wait for chunks whose workers are gone, and send others to the new ones."""
        if self._roster.alive is not None:
            alive = self._roster.alive()
            self._sent.lose(self.chunks.values(), alive)
            self._transport.delivery.update(self._roster.placement.nodes(), alive)
        self.pump()

    # --- in the loop: chunks to outcomes --------------------------------------------------------------------

    def _completed(self, group: Group, items: list[Item], outcomes: Sequence[Outcome]) -> None:
        done: list[tuple[Item, Outcome | BaseException]] = []
        again: list[Item] = []
        seconds, runs = 0.0, 0
        for item, outcome in zip(items, outcomes, strict=True):
            kind = outcome.kind
            if kind is _NOT_RUN:
                again.append(item)
                continue
            seconds += outcome.seconds
            runs += 1
            self._reruns -= item.losses > 0
            if kind in _USER_ERRORS and item.attempts < item.call.retries:
                item.attempts += 1
                self._reruns += item.losses > 0
                again.append(item)
            else:
                done.append((item, outcome))
        self.estimates.observe(items[0].function.digest, seconds, runs)
        self._requeue(group, again)
        self._deliver(group, done)

    def _requeue(self, group: Group, items: Iterable[Item]) -> None:
        cancelled = []
        for item in reversed(list(items)):
            if item.is_cancelled:
                self._reruns -= item.losses > 0
                cancelled.append((item, Outcome(Kind.CANCELLED)))
            else:
                group.put_back(item)
        self._deliver(group, cancelled)
        if group.pending and group not in self.ready:
            self.ready.append(group)

    def _lost(self, group: Group, items: list[Item], cause: BaseException, seconds: float) -> None:
        """Queue the calls of a chunk without outcomes again, or fail them: its worker died, or the cluster is gone."""
        if self.failure is not None:
            self._deliver(group, [(item, self.failure) for item in items])
            return
        if not isinstance(cause, WorkerGoneError):
            large = {ref.digest for item in items for ref in item.refs}
            large.update(ref.digest for ref in self._sources.facts[1])
            if self._transport.lose(large) and all(item.losses < self.retries for item in items):
                # The worker that held a large argument may be lost, and with it the task that needed it.
                logger.debug("%s runs again with new copies of its large arguments: %s", batch_label(items), cause)
                for item in items:
                    self._reruns += item.losses == 0
                    item.losses += 1
                self._requeue(group, items)
                return
            # Not a death: the chunk could not be read over there, or the scheduler dropped it.
            error = not_run(cause)
            self._deliver(group, [(item, error) for item in items])
            return
        if cause.address in self._ending:
            self._requeue(group, items)  # it was ended because of another call, which was cancelled
            return
        done: list[tuple[Item, Outcome | BaseException]] = []
        again: list[Item] = []
        for item in items:
            self._reruns -= item.losses > 0
            item.losses += 1
            timeout = item.call.timeout
            if timeout is not None and seconds >= timeout:
                done.append((item, Outcome(Kind.TIMEOUT)))  # it did not react to its time limit, and was ended
            elif item.losses > self.retries:
                done.append((item, died(item, cause.name or self._roster.placement.name(cause.address))))
            else:
                self._reruns += 1
                again.append(item)
        logger.warning("a worker died with %d calls of %s; %d run again", len(items), batch_label(items), len(again))
        self._requeue(group, again)
        self._deliver(group, done)

    def _lost_midway(self, group: Group, item: Item, received: int, cause: BaseException) -> None:
        """Fail a generator that was lost with its worker: some of its values have been used."""
        self._reruns -= item.losses > 0
        error: BaseException = not_run(cause)
        if isinstance(cause, WorkerGoneError):
            error = lost_midway(item.call, received, cause.name or self._roster.placement.name(cause.address))
        self._deliver(group, [(item, error)])

    def _deliver(self, group: Group, delivery: ItemOutcomes) -> None:
        if not delivery:
            return
        done = failed = 0
        for item, outcome in delivery:
            self._store.release(item.refs)
            kind = outcome.kind if type(outcome) is Outcome else None
            if kind is _VALUE:
                done += item.call.tasks
            elif kind is not _CANCELLED:
                done += item.call.tasks
                failed += 1
        group.done += done
        group.failed += failed
        self.ended += done
        self._progress.note(group, ended=done, failed=failed)
        group.deliver(delivery)

    # --- in the loop: the end of calls ----------------------------------------------------------------------

    def _cancel_group(self, group: Group) -> None:
        self._drop_chunks(list(group.in_flight))
        items = group.clear()
        for item in items:
            self._reruns -= item.losses > 0
        self._deliver(group, [(item, Outcome(Kind.CANCELLED)) for item in items])
        self.pump()

    def _take_cancelled(self) -> None:
        """Drop calls whose futures were cancelled, and chunks of which no call is wanted any more.

        A call that shares its chunk with others runs on; its outcome is dropped.
        """
        keys: list[str] = []
        groups: set[Group] = set()
        with self._lock:
            batch = [self._cancelled.popleft() for _ in range(min(len(self._cancelled), _CANCEL_CALLS))]
            has_more = bool(self._cancelled)
        for group, item in batch:
            item.is_cancelled = True
            groups.add(group)
            sent = None
            if group.drop(item):
                self._forget([item])
            elif (sent := self.chunks.get(item.chunk)) is not None:
                sent.wanted -= 1
                if not sent.wanted:
                    keys.append(sent.key)
                    del group.in_flight[sent.key]
                    self._forget(sent.items)
        self._drop_chunks(keys)
        for group in groups:
            self._progress.note(group)
        if has_more:
            self._loop.asyncio_loop.call_soon(self._take_cancelled)
        self.pump()

    def _forget(self, items: Iterable[Item]) -> None:
        for item in items:
            self._reruns -= item.losses > 0
            self._store.release(item.refs)

    def _drop_chunks(self, keys: list[str]) -> None:
        chunks = [self.chunks.pop(key) for key in keys]
        for sent in chunks:
            sent.is_dropped = True
        if chunks:
            self._loop.start(self._ending.interrupt({sent.key: sent.address for sent in chunks}))

    def fail(self, reason: BaseException) -> None:
        """Fail every call with `reason`, or with the reason of the first failure."""
        self.failure = failure = self.failure or reason
        if not self._over.done():
            self._over.set_result(None)
        groups = {sent.group for sent in self.chunks.values()} | set(self.ready)
        with self._lock:
            groups |= self._woken
            self._woken.clear()
        self.ready.clear()
        for sent in self.chunks.values():
            sent.is_dropped = True
        self.chunks.clear()
        for group in groups:
            self._deliver(group, [(item, failure) for item in group.clear()])
