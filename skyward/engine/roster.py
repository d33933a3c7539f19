"""The slots that there are now, as the caller places chunks on them and as workers are told of them."""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from skyward.engine.loop import Loop
from skyward.engine.placement import Placement
from skyward.errors import PoolError
from skyward.transfer import pickling
from skyward.transfer.wire import Layout, Slot
from skyward.worker.context import host_of

WaitForWorker = Callable[[Callable[[], bool]], Awaitable[Any]]


class Roster:
    """Looks up the slots, and waits for a worker where the cluster has none. See `Engine` for the parameters.

    `is_needed` tells whether something needs a worker. Used in the event loop of the Dask client, but for `wait_ready`.
    """

    def __init__(
        self,
        loop: Loop,
        slots: Callable[[], Sequence[Slot]],
        *,
        pool_id: str,
        expected: Callable[[], int],
        alive: Callable[[], Collection[str]] | None,
        wait_for_worker: WaitForWorker | None,
        is_needed: Callable[[], bool],
        head_port: int,
        accelerator: str | None,
        accelerators_per_node: int,
        parts_per_node: int,
    ) -> None:
        self.placement: Placement = Placement()
        self.count: int = 0  # how many calls can run at once, now
        self.layout: Layout
        self.pickled_layout: bytes = b""  # compressed: of 1,000 slots it has 30 kB, and each chunk carries it
        self.expected = expected
        self.alive = alive
        self._loop = loop
        self._slots = slots
        self._wait_for_worker = wait_for_worker
        self._is_needed = is_needed
        self._pool_id, self._head_port = pool_id, head_port
        self._accelerators = accelerator, accelerators_per_node, parts_per_node
        self._watch: asyncio.Task[None] | None = None  # while there are no slots and something needs one
        self._is_read = threading.Event()

    @property
    def is_joined(self) -> bool:
        """Whether the cluster is not the pool's own: the scheduler chooses the worker of each chunk."""
        return self.alive is None

    def wait_ready(self, timeout_s: float) -> None:
        """Block until the slots are known. From any thread but the loop's."""
        if not self._is_read.wait(timeout_s):
            raise PoolError(f"the Dask client's event loop did not answer within {timeout_s:g} s")

    def read(self) -> None:
        """Look up the slots: nodes have come or gone."""
        slots = self._slots()
        self.placement.update(slots)
        self.count = self.placement.count
        nodes: dict[int, list[Slot]] = {}
        for slot in slots:
            nodes.setdefault(slot.node, []).append(slot)
        placed = tuple(tuple(s.address for s in sorted(nodes[n], key=lambda s: s.number)) for n in sorted(nodes))
        head = host_of(placed[0][0]) if placed else "127.0.0.1"
        self.layout = Layout(self._pool_id, placed, head, self._head_port, *self._accelerators)
        self.pickled_layout = zlib.compress(pickling.dumps(self.layout)[0], 1)
        self._is_read.set()

    def workers(self) -> set[str]:
        """Return the addresses of all workers."""
        return {address for slots in self.layout.nodes for address in slots}

    async def has_slots(self) -> bool:
        """Wait until a joined cluster has a worker. Return False if the calls that needed one were cancelled."""
        if self._wait_for_worker is not None and not self.count:
            await asyncio.shield(self.watch())
        return self.count > 0

    def watch(self) -> asyncio.Task[None]:
        """Wait for a worker of a joined cluster, until nothing needs one any more."""
        wait = self._wait_for_worker
        assert wait is not None

        async def watch() -> None:
            # Its result is dropped: the cluster could not scale back to nothing while it is held.
            await wait(lambda: self.count > 0 or not self._is_needed())

        if self._watch is None or self._watch.done():
            self._watch = self._loop.start(watch())
        return self._watch
