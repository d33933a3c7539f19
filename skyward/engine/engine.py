"""The engine: runs calls on a Dask cluster and brings every call's outcome back.

It is handed a Dask client and a way to look up the slots; what machines they are on, it does not know. Callers are in
any thread; `Dispatcher` and what it uses are in the thread of the Dask client's event loop only.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from skyward.engine.broadcast import Broadcaster
from skyward.engine.calls import Call, Item, now
from skyward.engine.decoder import Decoder
from skyward.engine.direct import CLOSE_S
from skyward.engine.dispatcher import Dispatcher
from skyward.engine.ending import EndingWorkers
from skyward.engine.estimates import Estimates
from skyward.engine.future import Callbacks, CallFuture
from skyward.engine.graph import Graph
from skyward.engine.graphs import Graphs
from skyward.engine.group import FutureGroup, Group
from skyward.engine.loop import Loop
from skyward.engine.packer import Packer
from skyward.engine.persisted import Persisted
from skyward.engine.progress import Progress, Single
from skyward.engine.roster import Roster, WaitForWorker
from skyward.engine.sent_chunks import SentChunks
from skyward.engine.sources import Sources
from skyward.engine.store import Store
from skyward.engine.transport import Transport
from skyward.engine.value_stream import ValueStream
from skyward.errors import PoolError
from skyward.transfer.wire import Access, Kind, Outcome, Slot

_FAIL_S = 10.0
"""Seconds that the event loop has to end every call. Chosen, not measured: one that takes longer is stuck."""


class Engine:
    """Runs calls on the workers of one Dask cluster.

    Parameters
    ----------
    client
        A connected `distributed.Client`, not asynchronous; the engine lives in its event loop and does not close it.
    slots
        Gives the present slots; called in the loop. Call `roster_changed` when they change.
    expected
        Gives the number of slots that there should be, counting those whose worker is being restarted; 0: none is left,
        and a replacement comes.
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
        wait_for_worker: WaitForWorker | None = None,
        on_output: Callable[[Any], None] = lambda _: None,
        head_port: int = 29500,
        accelerator: str | None = None,
        accelerators_per_node: int = 0,
        parts_per_node: int = 1,
        included: Sequence[str] = (),
    ) -> None:
        self.client = client
        self.store: Store = Store(*share)
        self.sources: Sources = Sources(self.store, ship=not share, included=included)
        self.decoder: Decoder = Decoder()
        self.loop: Loop = Loop(client.loop.asyncio_loop)
        self.progress: Progress = Progress(self.loop.asyncio_loop)
        self._roster = roster = Roster(
            self.loop,
            slots,
            pool_id=pool_id,
            expected=expected,
            alive=alive,
            wait_for_worker=wait_for_worker,
            is_needed=self._needs_worker,
            head_port=head_port,
            accelerator=accelerator,
            accelerators_per_node=accelerators_per_node,
            parts_per_node=parts_per_node,
        )
        self._transport = transport = Transport(
            client, self.store, roster.has_slots, direct=direct, on_output=on_output, measured=self._note_round_trip
        )
        ending = EndingWorkers(self.loop, roster, transport)
        sent = SentChunks(transport, roster.placement, was_reclaimed)
        self._broadcaster = Broadcaster(roster, transport, ending, self.sources)
        self.dispatcher: Dispatcher = Dispatcher(
            self.loop, roster, transport, sent, ending, self.store, self.sources, self.progress, retries=retries
        )
        self.graphs: Graphs = Graphs(
            self.loop, roster, transport, ending, self.store, self.sources, self.progress, self.dispatcher
        )
        self.estimates: Estimates = self.dispatcher.estimates
        self._callbacks = Callbacks(self.decoder)
        self._futures_group = Group(self.dispatcher, self._callbacks.put)
        self._drop_later: asyncio.TimerHandle | None = None
        self.store.on_idle = functools.partial(self.loop.call_soon, self._drop_idle)
        if not direct:
            self.loop.call_soon(transport.open)
        self.roster_changed()

    def __repr__(self) -> str:
        chunks, groups = len(self.dispatcher.chunks), len(self.dispatcher.ready)
        return f"<Engine: {chunks} chunks in flight, {groups} groups with calls that wait>"

    def demand(self) -> int:
        """Return how many slots the calls that wait and run could use now. In the loop."""
        return self.dispatcher.demand() + sum(graph.left() for graph in self.graphs.running)

    def busy(self) -> set[str]:
        """Return the addresses of workers that have something to do. In the loop."""
        return self._roster.placement.busy()

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Block until the engine knows its slots."""
        self._roster.wait_ready(timeout_s)

    def idle_since(self) -> float:
        """Return the `time.monotonic` since when nothing has run; now, while something does."""
        is_busy = self.dispatcher.is_busy or self._broadcaster.is_busy or self.graphs.running
        return now() if is_busy else self.dispatcher.last_activity

    def _needs_worker(self) -> bool:
        return bool(self.dispatcher.chunks or self.graphs.running) or self._broadcaster.is_busy

    # --- for callers, from any thread -----------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """How many calls can run at once, now."""
        return self._roster.count

    @property
    def is_joined(self) -> bool:
        """Whether the cluster is not the pool's own, so that its workers come and go as others decide."""
        return self._roster.is_joined

    def group(self, *, limit: int | None = None, access: Access | None = None) -> FutureGroup:
        """Return a group for `submit`: at most `limit` of its calls run at once, and they are cancelled together.

        Its calls see large buffers as `access` says; None: read-only.

        Callbacks of its futures run in a thread of the group's own, which `FutureGroup.close` ends.
        """
        packer = Packer(self.store, self.sources, access=access)
        return FutureGroup(self.dispatcher, packer, Callbacks(self.decoder), limit, access)

    def submit(self, call: Call, *, group: FutureGroup | None = None) -> concurrent.futures.Future[Any]:
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
        self.dispatcher.check_open()
        packer = Packer(self.store, self.sources, eager=False) if group is None else group.packer
        queue = self._futures_group if group is None else group
        future = CallFuture()
        item = packer.pack(call, sink=future)
        if item.needs:
            future.on_cancel = self.graphs.send_one(item, packer, queue.deliver).cancel
        else:
            future.on_cancel = functools.partial(self.dispatcher.cancel_call, queue, item)
            queue.put(item)
        return future

    def stream(self, call: Call) -> ValueStream:
        """Start a call of a generator function, and return the stream of its values."""
        self.loop.check_thread()
        stream = ValueStream(call, self.dispatcher, self.loop, self._transport, self._roster)
        packer = Packer(self.store, self.sources, unchanged=True)
        item = packer.pack(stream.call)
        if item.needs:
            stream.graph = self.graphs.graph(packer)
            try:
                item.needs = tuple(self._values(stream.graph, item))
            except BaseException:
                stream.graph.cancel()
                self.store.release(item.refs)
                raise
        stream.group.put(item)
        return stream

    def persist(self, calls: Sequence[Call]) -> list[Persisted[Any]]:
        """Start calls whose values stay on the cluster, and return the values' futures.

        Raises as `submit` does, and `SpecError` for calls that can't feed one another.
        """
        self.dispatcher.check_open()
        packer = Packer(self.store, self.sources, unchanged=True)
        graph = self.graphs.graph(packer)
        try:
            kept = graph.keep([packer.pack(call, i) for i, call in enumerate(calls)])
        except BaseException:
            graph.cancel()
            raise
        for future in kept:
            future.before_result = functools.partial(self._issue_warnings, graph)
        return kept

    def _values(self, graph: Graph, item: Item) -> list[Any]:
        """Return the futures of the values that a call outside of its graph needs, when they are there."""
        needs = graph.values(item)
        self._issue_warnings(graph)
        return needs

    def _issue_warnings(self, graph: Graph) -> None:
        """Issue the warnings of calls whose values stayed on the cluster."""
        found, graph.warnings = graph.warnings, []
        if (error := self.decoder.issue(found)) is not None:
            raise error

    def broadcast(self, call: Call, *, every_slot: bool = False) -> list[Any]:
        """Run `call` once on every node (or every slot), started together; return the values in order.

        Broadcasts of one engine run one after another: two at once would wait for each other's nodes.
        The first failure, in time, ends the others and is raised. Nothing is rerun when a worker is lost, because
        the others can't be rewound: `MachineLostError`.
        """
        self.dispatcher.check_open()
        self.loop.check_thread()
        packer = Packer(self.store, self.sources)
        item = packer.pack(call)
        graph = self.graphs.graph(packer) if item.needs else None
        running = None
        try:
            needs = [] if graph is None else self._values(graph, item)
            running = asyncio.run_coroutine_threadsafe(
                self._broadcast(item, needs, every_slot), self.loop.asyncio_loop
            )
            outcomes = running.result()
        except concurrent.futures.CancelledError:
            raise self.dispatcher.failure or PoolError("the pool was closed during a broadcast") from None
        except BaseException:
            if running is not None:
                running.cancel()
            raise
        finally:
            self.store.release(item.refs)
            if graph is not None:
                graph.cancel()
        values = []
        for outcome in outcomes:
            ok, value = self.decoder.decode(call, outcome)
            if not ok:
                raise value
            values.append(value)
        return values

    async def _broadcast(self, item: Item, needs: Sequence[Any], every_slot: bool) -> list[Outcome]:
        task = asyncio.current_task()
        assert task is not None
        self.loop.tasks.add(task)  # so that the end of the engine ends it
        work = Single()
        self.progress.note(work)
        self.dispatcher.last_activity = now()
        failed = True
        try:
            outcomes = await self._broadcaster.run(item, needs, every_slot)
            failed = any(outcome.kind is not Kind.VALUE for outcome in outcomes)
            return outcomes
        except asyncio.CancelledError:
            work.is_cancelled = True
            raise
        finally:
            self.loop.tasks.discard(task)
            self.dispatcher.last_activity = now()
            if not work.is_cancelled:
                work.done, work.failed = 1, int(failed)
            self.progress.note(work, ended=work.done, failed=work.failed)

    def tell_progress(self) -> None:
        """Tell of what has ended and has not been told of. Blocks until the loop has done so."""
        if self.loop.asyncio_loop.is_running() and not self.loop.is_here:
            self.loop.call(self.progress.flush, timeout_s=CLOSE_S)

    def close(self, reason: BaseException | None = None) -> None:
        """Cancel everything and forget it. Blocks until the loop has done so; may be called twice."""
        self.fail(reason or PoolError("the pool is closed"))
        loop = self.loop.asyncio_loop
        if loop.is_running():
            with contextlib.suppress(Exception):  # one that is stuck, or ends now, and its connections with it
                asyncio.run_coroutine_threadsafe(self._transport.finish_connecting(), loop).result(2 * CLOSE_S)
        self._callbacks.close()
        self.store.close()

    def fail(self, reason: BaseException) -> None:
        """End every call with `reason`, and refuse more. Does not touch the cluster."""
        if self.loop.asyncio_loop.is_closed():
            self.dispatcher.failure = self.dispatcher.failure or reason
        else:
            self.loop.call(functools.partial(self._fail, reason), timeout_s=_FAIL_S)

    def forked(self, reason: BaseException) -> None:
        """Refuse everything with `reason`, in a child that was forked: the event loop is in the parent."""
        self.dispatcher.failure = self.loop.left = reason

    def scheduler_lost(self) -> None:
        """Take note that the scheduler and all its workers are lost; another one comes. In the loop."""
        self._transport.lose_scheduler()
        self.graphs.lose_values()

    def scheduler_moved(self) -> None:
        """Take note that the client has another scheduler: send it what lies on the cluster again. In the loop."""
        self.loop.start(self.graphs.send_again())

    def is_value(self, key: str) -> bool:
        """Tell whether a Dask task is a call's, whose value is computed again when the scheduler is lost."""
        return self.graphs.task(key) is not None

    def ended(self) -> int:
        """Return how many calls have ended so far."""
        return self.dispatcher.ended + self.graphs.ended + self._broadcaster.ended

    def roster_changed(self) -> None:
        """Look at the slots again: nodes have come or gone. From any thread."""
        self.loop.call_soon(self._read_roster)

    # --- in the loop ----------------------------------------------------------------------------------------

    def _read_roster(self) -> None:
        self._roster.read()
        self.dispatcher.workers_changed()

    def _note_round_trip(self, seconds: float) -> None:
        self.estimates.round_trip_s = seconds

    def _drop_idle(self) -> None:
        """Remove large buffers that no call needs, now and once more when others have been idle for long."""
        seconds = self.store.drop_idle()
        self._transport.forget_dropped()
        if self._drop_later is not None:
            self._drop_later.cancel()
        again = self.loop.asyncio_loop.call_later
        self._drop_later = None if seconds is None else again(seconds, self._drop_idle)

    def _fail(self, reason: BaseException) -> None:
        self.progress.tell = None
        self.dispatcher.fail(reason)
        self.graphs.are_sent.set()
        self.loop.cancel_tasks()
        if self._drop_later is not None:
            self._drop_later.cancel()
        self._transport.forget()
