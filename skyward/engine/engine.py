"""The engine: turns queued calls into chunks, chunks into Dask tasks, and brings every call's outcome back.

All state is touched in one thread only, that of the Dask client's event loop; other threads queue work and wake
it. It is handed a Dask client and a way to look up the slots; what machines they are on, it does not know.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import math
import threading
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from skyward.engine.broadcast import Broadcaster
from skyward.engine.callbacks import Callbacks
from skyward.engine.calls import Call, Decoder, Estimates, Item, Packer, batch_label, now
from skyward.engine.failures import died, not_run
from skyward.engine.future import CallFuture
from skyward.engine.group import Group
from skyward.engine.placement import Placement
from skyward.engine.progress import Progress, Single
from skyward.engine.sent_chunks import UNREACHABLE_S, SentChunk, SentChunks
from skyward.engine.sources import Sources
from skyward.engine.store import Store
from skyward.engine.transport import CLOSE_S, Transport, WorkerGoneError
from skyward.errors import PoolError
from skyward.transfer import pickling
from skyward.transfer.wire import Access, Chunk, Kind, Layout, Outcome, Outcomes, Participant, Slot, WireCall
from skyward.worker import interrupts
from skyward.worker.context import host_of

logger = logging.getLogger(__name__)

_CHUNK_CALLS = 20_000
"""Most calls in one chunk. Chosen, not measured: a chunk's list stays within a few megabytes."""
_CHUNK_BYTES = 16 << 20
_ENDING_S = interrupts.GRACE_S + 10.0
"""Seconds after which a worker that was to end because of a cancelled call has ended, or goes on.
Chosen, not measured."""
_ASK_AGAIN_S = 1.0
"""Seconds after which a worker that is to end is asked again. Chosen, not measured."""
_VERDICT_S = 10.0
"""Seconds to wait for the reason why the scheduler is out of reach. Chosen, not measured: usually known within one."""
_CANCEL_CALLS = 5_000
"""Most cancelled calls that are dropped at once, a few milliseconds of work: then the loop has other turns."""
_SHOWN_S = 10.0
"""Seconds of work in flight per slot of a joined cluster. Dask's `adapt` wants a worker for each 5 s of work that its
scheduler knows of (`distributed.adaptive.target-duration`): this lets it double its workers."""
_SHOWN_BYTES = 64 << 20
"""Most bytes of arguments per slot that are sent to a joined cluster to show the demand. Chosen, not measured."""
_AHEAD = 2
"""Chunks in flight per slot: one that runs and one that waits on the worker, so that no slot idles in between."""


_NOT_RUN = Kind.NOT_RUN  # both looked up once: this is asked of every call
_ITS_OWN = (Kind.ERROR, Kind.OPAQUE)


class Engine:
    """Runs calls on the workers of one Dask cluster.

    Parameters
    ----------
    client
        A connected `distributed.Client`, not asynchronous; the engine lives in its event loop and does not close it.
    slots
        Gives the present slots; called in the loop. Call `roster_changed` when they change.
    expected
        Gives the number of slots that there should be, counting those whose worker is being restarted.
    pool_id
        Becomes `InstanceInfo.job_id`.
    retries
        How often a call is run again after it was lost with its worker.
    alive
        Gives the addresses of workers that are there, more than `slots` where some get no new work; None: workers
        belong to a joined cluster, and the scheduler chooses among them.
    was_reclaimed
        Tells whether a worker, by its address, ended because its machine was taken away or is not wanted any more:
        then what ran there runs again, whatever `retries` says.
    share
        Folders that caller and workers both see, for large buffers: the next one is for what the first has no room for.
    direct
        Whether the client may fetch results from workers directly rather than through the scheduler.
    wait_for_worker
        Called in the loop while a joined cluster has no worker. It makes the demand known to the cluster, and returns
        when the function that it is given returns true.
    on_output
        Hears, in the loop, what tasks have printed, before their outcomes are delivered.
    head_port
        Port on the first node for what the calls of a broadcast agree on among themselves.
    included
        Own modules and packages that are on the machines already.
    """

    def __init__(
        self,
        client: Any,
        slots: Callable[[], Sequence[Slot]],
        *,
        pool_id: str,
        expected: Callable[[], int] = lambda: 1,
        retries: int = 3,
        alive: Callable[[], Collection[str]] | None = None,
        was_reclaimed: Callable[[str], Awaitable[bool]] | None = None,
        share: Sequence[Path] = (),
        direct: bool = True,
        wait_for_worker: Callable[[Callable[[], bool]], Awaitable[Any]] | None = None,
        on_output: Callable[[Any], None] = lambda _: None,
        head_port: int = 29500,
        accelerator: str | None = None,
        accelerators_per_node: int = 0,
        parts_per_node: int = 1,
        included: Sequence[str] = (),
    ) -> None:
        self.client = client
        self.retries = retries
        self.store = Store(*share)
        self.sources = Sources(self.store, ship=not share, included=included)
        self.decoder = Decoder()
        self.last_activity = now()
        self._slots = slots
        self._expected = expected
        self._alive = alive
        self._transport = Transport(client, self.store, self._has_slots, direct=direct, on_output=on_output)
        self._loop: asyncio.AbstractEventLoop = client.loop.asyncio_loop
        self.store.on_idle = functools.partial(self._call_soon, self._drop_idle)
        self._drop_later: asyncio.TimerHandle | None = None
        self._thread: int | None = None
        self._facts = (pool_id, head_port, accelerator, accelerators_per_node, parts_per_node)
        self._layout = b""
        self._placement = Placement()
        self._sent = SentChunks(self._transport, self._placement, was_reclaimed)
        self.estimates = Estimates()
        self._ready: deque[Group] = deque()  # groups with pending calls, each once, served in turn
        self._dirty: set[Group] = set()  # groups that other threads have queued calls in
        self._cancelled: deque[tuple[Group, Item]] = deque()  # calls whose futures other threads have cancelled
        self._dirty_lock = threading.Lock()
        self._chunks: dict[str, SentChunk] = {}
        self._wait_for_worker = wait_for_worker
        self._watch: asyncio.Task[None] | None = None  # while there are no slots and something needs one
        self._reruns = 0  # queued or running calls that were on a worker when it died
        self._ending: dict[str, float] = {}  # workers that may end at our own request, and until when
        self._tasks: set[asyncio.Task[None]] = set()
        self._broadcaster = Broadcaster(self)
        self._failure: BaseException | None = None
        self.left: BaseException | None = None  # why there is no event loop: this is a forked child
        self._over: asyncio.Future[None] = self._loop.create_future()  # done when there is a failure
        self._read = threading.Event()
        self.progress = Progress(self._loop)
        self._callbacks = Callbacks(self.decoder)
        self._futures_group = Group(self, self._callbacks.put)
        self.roster_changed()

    def __repr__(self) -> str:
        return f"<Engine: {len(self._chunks)} chunks in flight, {len(self._ready)} groups with calls that wait>"

    def demand(self) -> int:
        """Return how many slots the calls that wait and run could use now. In the loop."""
        return sum(group.demand() for group in {f.group for f in self._chunks.values()} | set(self._ready))

    def busy(self) -> set[str]:
        """Return the addresses of workers that have something to do. In the loop."""
        return self._placement.busy()

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Block until the engine knows its slots."""
        if not self._read.wait(timeout_s):
            raise PoolError(f"the Dask client's event loop did not answer within {timeout_s:g} s")

    def idle_since(self) -> float:
        """Return the `time.monotonic` since when nothing has run; now, while something does."""
        return now() if self._chunks or self._ready or self._broadcaster.is_busy else self.last_activity

    # --- for callers, from any thread -----------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """How many calls can run at once, now."""
        return self._placement.count

    @property
    def is_joined(self) -> bool:
        """Whether the cluster is not the pool's own, so that its workers come and go as others decide."""
        return self._alive is None

    def group(self, *, limit: int | None = None, access: Access | None = None) -> Group:
        """Return a group for `submit`: at most `limit` of its calls run at once, and they are cancelled together.

        Its calls see large buffers as `access` says; None: read-only.

        Callbacks of its futures run in a thread of the group's own, which `Group.close` ends.
        """
        return Group(self, None, limit, access=access)

    def submit(self, call: Call, *, group: Group | None = None) -> concurrent.futures.Future[Any]:
        """Start `call` and return its future at once.

        The arguments are pickled before this returns, so later changes to them have no effect. Callbacks of the
        future run in a thread of the engine's, or of the group's, where they may submit more.

        Raises
        ------
        SerializationError
            The function or an argument can't be pickled.
        PoolError
            The engine is closed or its cluster is gone.
        """
        self._check_open()
        future = CallFuture()
        group = group or self._futures_group
        packer = group.packer if group is not self._futures_group else Packer(self.store, self.sources, eager=False)
        item = packer.pack(call, sink=future)
        future.on_cancel = functools.partial(self._cancel, group, item)
        group.put(item)
        return future

    def broadcast(self, call: Call, *, every_slot: bool = False) -> list[Any]:
        """Run `call` once on every node (or every slot), started together; return the values in order.

        Broadcasts of one engine run one after another: two at once would wait for each other's nodes.
        The first failure, in time, ends the others and is raised. Nothing is rerun when a worker is lost, because
        the others can't be rewound: `MachineLostError`.
        """
        self._check_open()
        self._check_thread()
        packer = Packer(self.store, self.sources)
        item = packer.pack(call)
        running = asyncio.run_coroutine_threadsafe(self._broadcast(item, every_slot), self._loop)
        try:
            outcomes = running.result()
        except concurrent.futures.CancelledError:
            raise self._failure or PoolError("the pool was closed during a broadcast") from None
        except BaseException:
            running.cancel()
            raise
        finally:
            self.store.release(item.refs)
        values = []
        for outcome in outcomes:
            ok, value = self.decoder.decode(call, outcome)
            if not ok:
                raise value
            values.append(value)
        return values

    async def _broadcast(self, item: Item, every_slot: bool) -> list[Outcome]:
        work = Single()
        self.progress.note(work)
        failed = True
        try:
            outcomes = await self._broadcaster.run(item, every_slot)
            failed = any(outcome.kind is not Kind.VALUE for outcome in outcomes)
            return outcomes
        except asyncio.CancelledError:
            work.is_cancelled = True
            raise
        finally:
            if not work.is_cancelled:
                work.done, work.failed = 1, int(failed)
            self.progress.note(work, ended=work.done, failed=work.failed)

    def tell_progress(self) -> None:
        """Tell of what has ended and has not been told of. Blocks until the loop has done so."""
        told = threading.Event()

        def tell() -> None:
            try:
                self.progress.flush()
            finally:
                told.set()

        if self._loop.is_running() and threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(tell)
            told.wait(CLOSE_S)  # a loop that takes longer is stuck

    def close(self, reason: BaseException | None = None) -> None:
        """Cancel everything and forget it. Blocks until the loop has done so; may be called twice."""
        self.fail(reason or PoolError("the pool is closed"))
        if self._loop.is_running():
            with contextlib.suppress(Exception):  # one that is stuck, or ends now, and its connections with it
                asyncio.run_coroutine_threadsafe(self._transport.finish_connecting(), self._loop).result(2 * CLOSE_S)
        self._callbacks.close()
        self.store.close()

    def fail(self, reason: BaseException) -> None:
        """End every call with `reason`, and refuse more. Does not touch the cluster."""
        done = threading.Event()

        def end() -> None:
            try:
                self._fail(reason)
            finally:
                done.set()

        if self._loop.is_closed():
            self._failure = self._failure or reason
            return
        self._loop.call_soon_threadsafe(end)
        done.wait(10)  # a loop that takes longer is gone, and with it whatever would be waited for

    def forked(self, reason: BaseException) -> None:
        """Refuse everything with `reason`, in a child that was forked: the event loop is in the parent."""
        self._failure = self.left = reason

    # --- between threads ------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _check_thread(self) -> None:
        if threading.get_ident() == self._thread:
            raise RuntimeError(
                "skyward's blocking calls can't be made from the thread of its event loop; "
                "make them from another thread, e.g. with asyncio.to_thread"
            )

    def _call_soon(self, fn: Callable[..., None], *args: Any) -> None:
        if self.left is None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(fn, *args)

    def _wake(self, group: Group) -> None:
        with self._dirty_lock:
            asleep = not self._dirty
            self._dirty.add(group)
        if asleep:  # otherwise the loop has been woken and has not looked yet
            self._call_soon(self._take_dirty)

    def _cancel(self, group: Group, item: Item) -> None:
        with self._dirty_lock:
            asleep = not self._cancelled
            self._cancelled.append((group, item))
        if asleep:
            self._call_soon(self._take_cancelled)

    # --- in the loop: queues to chunks ----------------------------------------------------------------------

    def roster_changed(self) -> None:
        """Look at the slots again: nodes have come or gone. From any thread."""
        self._call_soon(self._read_roster)

    def _read_roster(self) -> None:
        self._thread = threading.get_ident()
        slots = self._slots()
        self._placement.update(slots)
        nodes: dict[int, list[Slot]] = {}
        for slot in slots:
            nodes.setdefault(slot.node, []).append(slot)
        pool_id, head_port, accelerator, per_node, parts = self._facts
        placed = tuple(tuple(s.address for s in sorted(nodes[n], key=lambda s: s.number)) for n in sorted(nodes))
        layout = Layout(
            pool_id,
            placed,
            host_of(placed[0][0]) if placed else "127.0.0.1",
            head_port,
            accelerator,
            per_node,
            parts,
        )
        self._placed = layout
        self._layout = pickling.dumps(layout)[0]
        self._read.set()
        if self._alive is not None:
            alive = self._alive()
            self._sent.lose(self._chunks.values(), alive)
            self._transport.delivery.update(self._placement.nodes(), alive)
        self._pump()

    def _take_dirty(self) -> None:
        with self._dirty_lock:
            dirty, self._dirty = self._dirty, set()
        for group in dirty:
            if group.is_cancelled:
                self._cancel_group(group)
            elif group not in self._ready:
                self._ready.append(group)
                self.progress.note(group)
        self._pump()

    def _pump(self) -> None:
        """Send chunks until every slot has enough, taking the groups in turn."""
        self.last_activity = now()
        waiting = 0  # groups in a row that could not send
        while self._ready and waiting < len(self._ready):
            group = self._ready.popleft()
            if not group.pending:
                continue
            self._ready.append(group)
            waiting += 1
            if group.limit is not None and len(group.in_flight) >= group.limit:
                continue
            ahead = self._ahead(group.first())
            if self._alive is None:
                address = None
                if len(self._chunks) >= max(1, self.slots) * ahead:
                    continue
            elif (address := self._placement.pick(ahead)) is None:
                continue
            if items := self._take(group):
                waiting = 0
                self._send(group, items, address)
        if self._alive is not None:
            for request in self._sent.steal():
                self._start(request)
        elif self._chunks and not self.slots and self.client.status == "running":
            self._watch_for_slots()

    def _watch_for_slots(self) -> asyncio.Task[None]:
        """Wait for a worker of a joined cluster, until nothing needs one any more."""
        wait = self._wait_for_worker
        assert wait is not None

        def is_over() -> bool:
            return self.slots > 0 or not (self._chunks or self._broadcaster.is_busy)

        async def watch() -> None:
            await wait(is_over)  # its result is let go, or the cluster could not scale back to nothing

        if self._watch is None or self._watch.done():
            self._watch = self._start(watch())
        return self._watch

    async def _has_slots(self) -> bool:
        """Wait until a joined cluster has a worker. Return False if the calls that needed one were cancelled."""
        if self._wait_for_worker is not None and not self.slots:
            await asyncio.shield(self._watch_for_slots())
        return self.slots > 0

    def _ahead(self, item: Item) -> int:
        """Return how many chunks a slot may have when one that begins with `item` is sent there."""
        if self._reruns:
            return 1  # if it kills its worker, it takes no others with it
        if self._alive is None:
            return self._shown(item)
        # A long call does not wait behind another long one: the next free slot is soon enough.
        return _AHEAD if self.estimates.is_short(item.function.digest) else 1

    def _shown(self, item: Item) -> int:
        """Return how many chunks per slot a joined cluster gets, so that it sees the demand and can scale."""
        digest = item.function.digest
        seconds = self.estimates.mean(digest)
        if seconds is None:  # unknown: chunks may be much too small, and if calls are long, two are demand enough
            return _AHEAD
        size = item.size * self.estimates.chunk_calls(digest)
        return max(_AHEAD, min(int(_SHOWN_S / max(seconds, Estimates.TARGET_S)), _SHOWN_BYTES // max(1, size)))

    def _take(self, group: Group) -> list[Item]:
        """Take the calls of the next chunk from the front of the group's queue."""
        slots = self.slots if group.limit is None else min(self.slots, group.limit)
        remaining = len(group.pending) + (group.expected or 0)
        items: list[Item] = []
        digest, most, size = "", 1, 0
        while group.pending and len(items) < min(most, _CHUNK_CALLS) and size < _CHUNK_BYTES:
            item = group.take()
            single = item.call.alone or item.losses > 0 or item.call.timeout is not None
            if items and (single or item.function.digest != digest):
                group.put_back(item)
                break
            if not items:
                digest = item.function.digest
                most = 1 if single else self.estimates.chunk_size(digest, remaining, slots)
            size += item.size
            items.append(item)
        return items

    def _send(self, group: Group, items: list[Item], address: str | None) -> None:
        key = f"{batch_label(items)}-{uuid.uuid4().hex}"
        group.in_flight[key] = items
        sent = self._chunks[key] = SentChunk(key, group, items, len(items), address)
        for item in items:
            item.chunk = key
            if isinstance(item.sink, CallFuture):
                item.sink.sent = True
        self._sent.add(sent)
        self._start(self._run_chunk(sent))

    def _start(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _chunk(
        self, key: str, items: list[Item], part: Participant | None = None, access: Access | None = None
    ) -> Chunk:
        functions = {item.function.digest: item.function for item in items}
        order = {digest: i for i, digest in enumerate(functions)}
        calls = [WireCall(order[i.function.digest], i.arguments, i.buffers) for i in items]
        timeout = items[0].call.timeout
        budget = None if len(items) == 1 else Estimates.BUDGET_S
        facts, archives = self.sources.facts
        return Chunk(
            key,
            tuple(functions.values()),
            calls,
            self._layout,
            budget,
            timeout,
            part,
            access=access,
            facts=facts,
            archives=archives,
        )

    async def _run_chunk(self, sent: SentChunk) -> None:
        key, group, items = sent.key, sent.group, sent.items
        began = now()
        result = await self._sent.result(sent, self._chunk(key, items, access=group.access))
        if not isinstance(result, Outcomes) and self.client.status != "running" and not sent.is_dropped:
            # The scheduler is out of reach. Whoever runs it will say what has become of it: that is the better answer.
            await asyncio.wait([self._over], timeout=_VERDICT_S)
        if isinstance(result, Outcomes) and result.is_outdated and sent.address is not None:
            self._end_worker(sent.address)
        is_free_retry = not sent.is_dropped and await self._sent.is_free_retry(sent, result)
        if sent.is_dropped:
            self._pump()  # cancelled or failed meanwhile, and delivered then; its slot has come free
            return
        del self._chunks[key]
        group.in_flight.pop(key, None)
        if isinstance(result, Outcomes):
            self._completed(group, items, result.items)
        elif is_free_retry and self._failure is None:
            self._requeue(group, items)
            self._loop.call_later(UNREACHABLE_S, self._pump)
        else:
            self._lost(group, items, result, now() - began)
        self._pump()

    def _end_worker(self, address: str) -> None:
        """Have a worker that has older versions of own modules ended, which brings a new one."""
        self._placement.avoid(address, math.inf)
        self._ending[address] = now() + _ENDING_S
        self._start(self._ask_to_end(address))

    async def _ask_to_end(self, address: str) -> None:
        while self._alive is not None and address in self._alive():
            await self._transport.end_worker(address)
            await asyncio.sleep(_ASK_AGAIN_S)

    async def renewed(self, address: str) -> str:
        """Have a worker ended, and return the address of the one that has come in its place."""
        self._end_worker(address)
        while (found := self._placement.successor(address)) is None:
            await asyncio.sleep(0.02)
        return found

    async def _run_part(self, chunk: Chunk, address: str) -> Outcomes:
        """Run a part of a broadcast on its worker, before all else that waits there."""
        if self._alive is None:
            arguments = await self._transport.arguments(chunk)
        else:
            await self._transport.prepare(chunk, self._placement.node(address), address)
            arguments = [chunk]
        return await self._transport.run(chunk.key, arguments, workers=[address], priority=100)

    def _drop_idle(self) -> None:
        """Remove large buffers that no call needs, now and once more when others have been idle for long."""
        seconds = self.store.drop_idle()
        self._transport.forget_dropped()
        if self._drop_later is not None:
            self._drop_later.cancel()
        self._drop_later = None if seconds is None else self._loop.call_later(seconds, self._drop_idle)

    # --- in the loop: outcomes ------------------------------------------------------------------------------

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
            if kind in _ITS_OWN and item.attempts < item.call.retries:
                item.attempts += 1
                self._reruns += item.losses > 0
                again.append(item)
            else:
                done.append((item, outcome))
        self.estimates.observe(items[0].function.digest, seconds, runs)
        self._requeue(group, again)
        if done:
            group.deliver(done)

    def _requeue(self, group: Group, items: Iterable[Item]) -> None:
        cancelled = []
        for item in reversed(list(items)):
            if item.is_cancelled:
                self._reruns -= item.losses > 0
                cancelled.append((item, Outcome(Kind.CANCELLED)))
            else:
                group.put_back(item)
        if cancelled:
            group.deliver(cancelled)
        if group.pending and group not in self._ready:
            self._ready.append(group)

    def _lost(self, group: Group, items: list[Item], cause: BaseException, seconds: float) -> None:
        """The chunk ended without outcomes: its worker died, or the cluster is gone."""
        if self._failure is not None:
            group.deliver([(item, self._failure) for item in items])
            return
        if not isinstance(cause, WorkerGoneError):
            large = {ref.digest for item in items for ref in item.refs}
            large.update(ref.digest for ref in self.sources.facts[1])
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
            group.deliver([(item, error) for item in items])
            return
        if self._ending.get(cause.address, 0) > now():
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
                done.append((item, died(item, cause.name or self._placement.name(cause.address))))
            else:
                self._reruns += 1
                again.append(item)
        logger.warning("a worker died with %d calls of %s; %d run again", len(items), batch_label(items), len(again))
        self._requeue(group, again)
        if done:
            group.deliver(done)

    def _cancel_group(self, group: Group) -> None:
        pending = list(group.pending)
        group.pending.clear()
        group._bytes_taken += sum(item.size for item in pending)
        keys = list(group.in_flight)
        items = [item for chunk in group.in_flight.values() for item in chunk]
        self._drop_chunks(keys)
        group.in_flight.clear()
        for item in [*items, *pending]:
            self._reruns -= item.losses > 0
        if items or pending:
            group.deliver([(item, Outcome(Kind.CANCELLED)) for item in [*items, *pending]])
        self._pump()

    def _take_cancelled(self) -> None:
        """Drop calls whose futures were cancelled, and chunks of which no call is wanted any more.

        A call that shares its chunk with others runs on, unheard.
        """
        keys: list[str] = []
        groups: set[Group] = set()
        with self._dirty_lock:
            batch = [self._cancelled.popleft() for _ in range(min(len(self._cancelled), _CANCEL_CALLS))]
            has_more = bool(self._cancelled)
        for group, item in batch:
            item.is_cancelled = True
            groups.add(group)
            sent = None
            if group.drop(item):
                self._forget([item])
            elif (sent := self._chunks.get(item.chunk)) is not None:
                sent.wanted -= 1
                if not sent.wanted:
                    keys.append(sent.key)
                    del group.in_flight[sent.key]
                    self._forget(sent.items)
        self._drop_chunks(keys)
        for group in groups:
            self.progress.note(group)
        if has_more:
            self._loop.call_soon(self._take_cancelled)
        self._pump()

    def _forget(self, items: Iterable[Item]) -> None:
        for item in items:
            self._reruns -= item.losses > 0
            self.store.release(item.refs)

    def _drop_chunks(self, keys: list[str]) -> None:
        chunks = [self._chunks.pop(key) for key in keys]
        for sent in chunks:
            sent.is_dropped = True
        if chunks:
            self._start(self._interrupt({sent.key: sent.address for sent in chunks}))

    async def _interrupt(self, places: dict[str, str | None]) -> None:
        hit = await self._transport.interrupt(places)
        self._ending.update(dict.fromkeys(hit, now() + _ENDING_S))
        if hit:
            self._broadcaster.wait_for(places)

    def _fail(self, reason: BaseException) -> None:
        self.progress.tell = None
        if self._failure is None:
            self._failure = reason
        if not self._over.done():
            self._over.set_result(None)
        groups = {sent.group for sent in self._chunks.values()} | set(self._ready)
        with self._dirty_lock:
            groups |= self._dirty
            self._dirty.clear()
        self._ready.clear()
        for sent in self._chunks.values():
            sent.is_dropped = True
        self._chunks.clear()
        for group in groups:
            items = [item for chunk in group.in_flight.values() for item in chunk] + list(group.pending)
            group.in_flight.clear()
            group.pending.clear()
            if items:
                group.deliver([(item, self._failure) for item in items])
        for task in self._tasks:
            task.cancel()
        if self._drop_later is not None:
            self._drop_later.cancel()
        self._transport.forget()
