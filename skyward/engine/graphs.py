"""The graphs of one engine: those that have calls in flight, and what they hear from workers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection
from typing import Any

from skyward.engine.calls import Item, make_chunk
from skyward.engine.dispatcher import Dispatcher
from skyward.engine.ending import EndingWorkers
from skyward.engine.future import ItemOutcomes
from skyward.engine.graph import Graph
from skyward.engine.graph_task import SENT, GraphTask
from skyward.engine.loop import Loop
from skyward.engine.packer import Packer
from skyward.engine.progress import Progress
from skyward.engine.roster import Roster
from skyward.engine.sources import Sources
from skyward.engine.store import Store
from skyward.engine.transport import Transport
from skyward.transfer.wire import Chunk
from skyward.worker import graph


class Graphs:
    """Makes graphs for one engine, and knows which have not ended."""

    def __init__(
        self,
        loop: Loop,
        roster: Roster,
        transport: Transport,
        ending: EndingWorkers,
        store: Store,
        sources: Sources,
        progress: Progress,
        dispatcher: Dispatcher,
    ) -> None:
        self.loop = loop
        self.roster = roster
        self.transport = transport
        self.ending = ending
        self.store = store
        self.sources = sources
        self.progress = progress
        self.dispatcher = dispatcher
        self.running: set[Graph] = set()  # with calls that have not ended
        self.by_key: dict[str, tuple[Graph, GraphTask]] = {}  # the calls of graphs that are not closed
        self.ended: int = 0  # calls, so far
        self.are_sent: threading.Event = threading.Event()  # cleared while a scheduler lacks what another one had
        self.are_sent.set()
        self._open: dict[Graph, None] = {}  # those that are not closed, oldest first
        self._hears = False

    def graph(self, packer: Packer, deliver: Callable[[ItemOutcomes], None] = lambda _: None) -> Graph:
        """Return a new graph. `deliver` takes the outcomes of calls that were put in, in the event loop."""
        if not self._hears:
            self._hears = True
            self.transport.client.subscribe_topic(graph.TOPIC, self._hear)
        made = Graph(self, packer, deliver)
        self._open[made] = None
        return made

    def closed(self, graph: Graph) -> None:
        """Forget a graph. In the loop."""
        self._open.pop(graph, None)

    def task(self, key: str) -> tuple[Graph, GraphTask] | None:
        """Return the call whose value a Dask task gives, with its graph, if there is one."""
        return self.by_key.get(key) or self.by_key.get(key.removesuffix(SENT))

    def arguments(self, tasks: Collection[GraphTask]) -> dict[str, list[Any]]:
        """Return the chunk of each task, by key, and the large buffers that are on the cluster for it."""
        chunks = self._chunks(tasks)
        if any(chunk.not_in_files() for chunk in chunks):
            return asyncio.run_coroutine_threadsafe(self.scatter(tasks), self.loop.asyncio_loop).result()
        return {chunk.key: [chunk] for chunk in chunks}

    async def scatter(self, tasks: Collection[GraphTask]) -> dict[str, list[Any]]:
        """Return the same. In the loop."""
        return {chunk.key: await self.transport.arguments(chunk) for chunk in self._chunks(tasks)}

    def _chunks(self, tasks: Collection[GraphTask]) -> list[Chunk]:
        facts, layout = self.sources.facts, self.roster.pickled_layout
        return [make_chunk(task.key, [task.item], layout, facts) for task in tasks]

    def lose_values(self) -> None:
        """Take note that the scheduler is lost: no new call is sent until another one has those that there are."""
        self.are_sent.clear()

    async def send_again(self) -> None:
        """Send the scheduler that there is now what had been sent to the one that is lost, and is still needed."""
        losses = self.transport.scheduler_losses
        if not await self.transport.until_slots():
            return  # the pool ends
        for made in list(self._open):  # in the order in which they may need one another
            if self.transport.scheduler_losses == losses:
                await made.send_again()
        if self.transport.scheduler_losses == losses:
            self.are_sent.set()

    def send_one(self, item: Item, packer: Packer, deliver: Callable[[ItemOutcomes], None]) -> Graph:
        """Send a call and what it needs; return its graph, which closes itself when it has delivered the outcome."""

        def deliver_and_close(outcomes: ItemOutcomes) -> None:
            made.close()
            deliver(outcomes)

        made = self.graph(packer, deliver_and_close)
        try:
            made.put(item)
            made.send()
        except BaseException:
            made.cancel()
            raise
        return made

    def _hear(self, event: tuple[float, Any]) -> None:
        for key, warnings in event[1]["ended"]:
            if key in self.by_key:
                of, task = self.by_key[key]
                of.note_end(task)
                of.warnings += map(tuple, warnings)
