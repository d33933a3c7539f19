"""Calls that need the values of others: they become a Dask graph, and Dask brings values to where they are needed.

A graph belongs to one ``>>``. Each call in it runs once, however many others need it.
"""

from __future__ import annotations

import asyncio
import uuid
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dask
from distributed import CancelledError, Future

from skyward.engine.calls import Item, now
from skyward.engine.failures import died, not_run
from skyward.engine.future import ItemOutcomes
from skyward.engine.graph_builder import GraphBuilder
from skyward.engine.graph_task import GraphTask, add_needs
from skyward.engine.packer import Packer
from skyward.engine.persisted import Persisted
from skyward.engine.transport import WorkerGoneError
from skyward.scheduler.losses import LOSSES
from skyward.transfer.wire import Kind, Outcome
from skyward.worker import graph, raised

if TYPE_CHECKING:
    from skyward.engine.graphs import Graphs

_WARN_BYTES = "distributed.admin.large-graph-warning-threshold"


class Graph:
    """The calls of one ``>>`` of which some need the values of others. `close` it.

    One thread puts calls in and sends them; outcomes are delivered in the event loop.
    """

    def __init__(self, graphs: Graphs, packer: Packer, deliver: Callable[[ItemOutcomes], None]) -> None:
        self._graphs = graphs
        self._client = graphs.transport.client
        self._builder = GraphBuilder(self._client, packer)
        self._deliver = deliver
        self._live: dict[str, GraphTask] = {}  # by key: those that others may need or that have not ended
        self._inner: dict[str, Future[Any]] = {}  # by key: whose values later calls may need
        self._waiting: set[GraphTask] = set()  # for whose ends
        self._is_closed = False
        self._losses = 0  # of large arguments
        self._sending_again = asyncio.Lock()
        self.warnings: list[Any] = []  # of calls whose values stay on the cluster, to be delivered with the next value
        self.done: int = 0
        self.failed: int = 0

    def left(self) -> int:
        """Return how many calls have not ended."""
        return 0 if self._is_closed else self._builder.count - self.done

    def __contains__(self, item: Item) -> bool:
        return item in self._builder

    # --- from the caller's thread ---------------------------------------------------------------------------

    def put(self, item: Item) -> None:
        """Add a call that the caller waits for, and the calls that it needs.

        Raises
        ------
        SpecError
            It needs its own value or another pool's, or there are too many calls. Nothing of it runs.
        """
        task = self._builder.add(item)
        task.refuse_sent("is wanted")
        task.wanted = item
        if task.item is not item:
            self._graphs.store.release(item.refs)

    def keep(self, items: Sequence[Item]) -> list[Persisted[Any]]:
        """Send calls and what they need, and return the futures of their values, which stay on the cluster.

        The graph closes when all these futures are gone.
        """
        tasks = [self._builder.add(item) for item in items]
        futures = self._send_kept(tasks)
        kept: list[Persisted[Any]] = [Persisted(task.key, self._client) for task in tasks]
        futures.clear()
        left = len(kept)

        def let_go() -> None:
            nonlocal left
            left -= 1
            if not left:
                self.close()

        for future in kept:
            weakref.finalize(future, let_go).atexit = False
        return kept

    def values(self, item: Item) -> list[Future[Any]]:
        """Send what a call outside of the graph needs, wait for its end, and return the values' futures.

        Raises
        ------
        SpecError
            The calls can't feed one another; nothing runs.
        BaseException
            What one of them raised.
        """
        outside = GraphTask(item, "")
        self._builder.resolve([outside])
        tasks = [need for need in outside.needs if isinstance(need, GraphTask)]
        futures = self._send_kept(tasks)
        needs = [futures[need.key] if isinstance(need, GraphTask) else need for need in outside.needs]

        async def failures() -> list[Outcome | BaseException | None]:
            wait = self._graphs.transport.failure
            return [await self._outcome(outside, future, await wait(future)) for future in needs]

        ended = asyncio.run_coroutine_threadsafe(failures(), self._graphs.loop.asyncio_loop).result()
        for failure in ended:
            if isinstance(failure, BaseException):
                raise failure
        return needs

    def _send_kept(self, tasks: Sequence[GraphTask]) -> dict[str, Future[Any]]:
        for task in tasks:
            task.is_needed = True
        return self.send(kept=tasks)

    def _register(self, task: GraphTask) -> None:
        self._live[task.key] = task
        self._graphs.by_key[task.key] = self, task

    def send(self, *, is_last: bool = True, kept: Sequence[GraphTask] = ()) -> dict[str, Future[Any]]:
        """Send what was put in, and return the futures of the values that are `kept`, by key.

        With `is_last`, the other values are dropped as soon as no call that was sent needs them.
        """
        new = self._builder.take_new()
        for task in new:
            self._register(task)
        futures: dict[str, Future[Any]] = {}
        if new:
            self._graphs.are_sent.wait()
            self._graphs.dispatcher.check_open()
            self._graphs.running.add(self)
            self._graphs.loop.call_soon(self._graphs.progress.note, self)
            inner = kept if is_last else [task for task in new if task.is_needed]
            futures = self._submit(dict.fromkeys(new), inner, self._graphs.arguments(new))
        if is_last:
            self._inner.clear()
            self._builder.clear_computed()
        else:
            self._inner |= futures
            for task in new:
                self._release_with_origin(task)
        return futures

    def _release_with_origin(self, task: GraphTask) -> None:
        """Let go of a call that was sent when its pending call is gone: then no other call can need its value."""
        origin = task.item.call.origin
        place = id(origin)

        def is_gone(_: object) -> None:
            self._builder.forget(place)
            self._graphs.loop.call_soon(self._origin_gone, task)

        task.origin = weakref.ref(origin, is_gone)
        task.item.call = replace(task.item.call, args=(), kwargs={}, owner=None, origin=None)
        task.item.needs = ()

    def _submit(
        self, tasks: Collection[GraphTask], kept: Iterable[GraphTask], arguments: dict[str, list[Any]],
        *, are_new: bool = True,
    ) -> dict[str, Future[Any]]:  # fmt: skip
        dsk: dict[str, Any] = {}
        keys = dict.fromkeys(task.key for task in kept)
        watched: dict[str, GraphTask] = {}  # by the key of the task to wait for
        for task in tasks:
            task.is_sent, task.losses = True, self._losses
            dsk[task.key] = task.dask_task(arguments[task.key], tasks, self._inner)
            if task.wanted is not None and (are_new or task.sent_key in self._client.futures):
                watched[task.sent_key] = task
                if task.is_needed:
                    dsk[task.sent_key] = (graph.send_value, task.key)
        annotations = {LOSSES: self._graphs.dispatcher.retries}
        with dask.annotate(**annotations), dask.config.set({_WARN_BYTES: "1 TiB"}):
            futures = dict(zip([*watched, *keys], self._client.get(dsk, [*watched, *keys], sync=False), strict=True))
        if not are_new:
            return {}
        if not watched:  # no call's value goes to the caller
            watched = {task.key: task for task in kept}
        for key, task in watched.items():
            self._graphs.loop.call_soon(self._watch, task, futures[key])
        return {key: futures[key] for key in keys}

    def cancel(self) -> None:
        """Drop what has not begun, interrupt what runs, and close. Does not wait."""
        self._graphs.loop.call_soon(self._interrupt)
        self.close()

    def close(self) -> None:
        """Let go of everything. From any thread, the garbage collector's too."""
        self._graphs.loop.call_soon(self._close)

    # --- in the loop ----------------------------------------------------------------------------------------

    async def _send_again(self, task: GraphTask) -> bool:
        """Send a call and what it needs again if a large argument was lost with the worker that held it.

        Returns whether it was sent; then another `_wait` waits for it.
        """
        tasks = dict.fromkeys([task])
        add_needs(tasks)
        large = {ref.digest for other in tasks for ref in other.item.refs}
        large.update(ref.digest for ref in self._graphs.sources.facts[1])
        async with self._sending_again:
            if task.losses == self._losses:  # otherwise the loss is known, by another call
                if not self._graphs.transport.lose(large):
                    return False
                self._losses += 1
            if self._is_closed or self._losses > self._graphs.dispatcher.retries:
                return False
            for other in tasks:
                del self._live[other.key], self._graphs.by_key[other.key]
                self._inner.pop(other.key, None)
                other.key = f"{other.item.call.label}-{uuid.uuid4().hex}"
                self._register(other)
            self._submit(tasks, [], await self._graphs.scatter(tasks))
        return True

    async def send_again(self) -> None:
        """Send another scheduler what is still needed of what was sent to one that is lost, under the same keys."""
        held = self._client.futures
        kept = [task for task in self._live.values() if task.is_sent and task.key in held]
        tasks = dict.fromkeys([*kept, *(task for task in self._waiting if task.sent_key in held)])
        add_needs(tasks)
        try:
            if tasks:
                self._submit(tasks, kept, await self._graphs.scatter(tasks), are_new=False)
        except Exception as exc:  # those who wait for a value are told
            for key in {key for task in tasks for key in (task.key, task.sent_key)}.intersection(held):
                held[key].set_error(exc, None)

    def _interrupt(self) -> None:
        if self._is_closed or self._graphs.dispatcher.failure is not None:
            return
        keys = [task.key for task in list(self._live.values()) if task.is_sent and not task.has_ended]
        keys += (task.sent_key for task in self._waiting)
        self._graphs.loop.start(self._graphs.ending.interrupt(dict.fromkeys(keys)))

    def _close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._inner.clear()
        self._note_idle()
        self._graphs.closed(self)
        for task in self._builder.take_new():  # of a call that was refused, or is not sent any more
            self._graphs.store.release(task.item.refs)
        for task in list(self._live.values()):
            self._release(task)
        # This graph may refer to itself by `_deliver`: what it refers to must not stay until Python looks for cycles.
        self._builder.clear()
        self._deliver = lambda _: None

    def _origin_gone(self, task: GraphTask) -> None:
        task.is_over = True
        self._inner.pop(task.key, None)
        self._release_if_over(task)

    def _release_if_over(self, task: GraphTask) -> None:
        """Release a call that has ended, and what it needed, when nothing can need its value any more, or again."""
        for found in (over := [task]):  # which grows
            if found.is_over and found.has_ended and not found.dependents and self._release(found):
                for need in found.needs:
                    if isinstance(need, GraphTask):
                        need.dependents -= 1
                        over.append(need)

    def _release(self, task: GraphTask) -> bool:
        if self._live.pop(task.key, None) is None:
            return False
        self._graphs.by_key.pop(task.key, None)
        self._graphs.store.release(task.item.refs)
        return True

    def _note_idle(self) -> None:
        self._graphs.running.discard(self)
        self._graphs.dispatcher.last_activity = now()
        self._graphs.progress.note(self)

    def _watch(self, task: GraphTask, future: Future[Any]) -> None:
        if not self._is_closed:
            self._waiting.add(task)
            self._graphs.loop.start(self._wait(task, future if task.wanted is not None else future._state))

    async def _wait(self, task: GraphTask, future: Any) -> None:
        """Wait for the end of a call, and deliver its outcome if the caller waits for that."""
        outcome: Outcome | BaseException | None
        while True:
            losses = self._graphs.transport.scheduler_losses
            try:
                failure = await self._graphs.transport.failure(future)
                is_lost = isinstance(failure, CancelledError) and task.wanted is not None
                if is_lost and await self._send_again(task):
                    return
                outcome = await self._outcome(task, future, failure)
            except asyncio.CancelledError:
                outcome = self._graphs.dispatcher.failure or Outcome(Kind.CANCELLED)
            except Exception as exc:  # Dask's own errors while the value is fetched
                if self._graphs.dispatcher.failure is None and self._graphs.transport.scheduler_losses != losses:
                    continue  # it comes again, by another scheduler
                outcome = self._graphs.dispatcher.failure or not_run(exc)
            break
        self._waiting.discard(task)
        if self._is_closed:
            return
        failed = int(outcome is not None and not (isinstance(outcome, Outcome) and outcome.kind is Kind.VALUE))
        self.note_end(task, failed=failed)
        if isinstance(outcome, Outcome) and self.warnings:
            outcome = outcome._replace(warnings=(*self.warnings, *outcome.warnings))
            self.warnings.clear()
        if not self._waiting and not self._builder.has_new:
            self._note_idle()
        if task.wanted is not None and outcome is not None:
            self._deliver([(task.wanted, outcome)])

    def note_end(self, task: GraphTask, *, failed: int = 0) -> None:
        """Count a call as ended, and those that it needed."""
        found = [] if task.has_ended else [task]
        before = self.done
        for ended in found:  # which grows
            if not ended.has_ended:
                ended.has_ended = True
                self.done += 1
                self._graphs.ended += 1
                found += [need for need in ended.needs if isinstance(need, GraphTask)]
                self._release_if_over(ended)
        self.failed += failed
        self._graphs.progress.note(self, ended=self.done - before, failed=failed)

    async def _outcome(
        self, task: GraphTask, future: Any, failure: BaseException | None
    ) -> Outcome | BaseException | None:
        """Return how a call has ended; None for one whose value stays on the cluster."""
        graphs = self._graphs
        if failure is None:
            return (await graphs.transport.outcomes(future)).items[0] if task.wanted is not None else None
        if self._client.status != "running":
            await graphs.dispatcher.wait_for_failure()
        if graphs.dispatcher.failure is not None:
            return graphs.dispatcher.failure
        key = vars(failure).get(graph.KEY, "")
        _, failed = graphs.by_key.get(key, (self, task))
        if isinstance(failure, WorkerGoneError):
            failed.item.losses = graphs.dispatcher.retries + 1
            failure = died(failed.item, failure.name or failure.address)
        elif not key:
            return not_run(failure)
        if failed is not task:
            by = next((other for other in list(self._live.values()) if failed in other.needs), task)
            raised.add_note(failure, f"{by.item.call.label}() needs the value of {failed.item.call.label}()")
        return failure
