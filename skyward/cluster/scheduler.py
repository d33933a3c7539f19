"""A cluster with a Dask scheduler that may be lost: another one takes its place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from distributed.objects import SchedulerInfo

from skyward.cluster.agents import Agent
from skyward.cluster.base import TOLD_BY_EVENT, SkyCluster
from skyward.cluster.failover import Failover
from skyward.cluster.failures import schedulers_lost
from skyward.cluster.tasks import end_tasks
from skyward.errors import PoolError

logger = logging.getLogger(__name__)

_SCHEDULER_S = 60.0
"""Seconds that a node has to start a scheduler, before another one does. Chosen, not measured: it takes one or two."""
_ANSWER_S = 5.0
"""Seconds in which a scheduler answers, or its agent tells that it has ended. Chosen, not measured."""


class SchedulerCluster(SkyCluster):
    """A cluster that connects to its scheduler, and to the next one when that is lost.

    Parameters
    ----------
    head
        The agent that starts the first scheduler.
    nodes
        The numbers of all nodes.
    retries
        How often in a row the scheduler may be lost, within minutes and without a call that has ended in between.
    """

    def __init__(self, name: str, head: Agent, nodes: set[int], *, security: Any, retries: int) -> None:
        super().__init__(name, security)
        self._nodes = nodes
        self._failover = Failover(head, most=retries)
        self._reaching: asyncio.Task[None] | None = None  # while there is no scheduler that all know
        self._has_scheduler = False  # and all know it
        self.dashboard_port: int | None = None  # on the scheduler's host, on its loopback
        self._dashboard = ""
        self._places: dict[str, int] = {}  # nodes of all workers that ever were
        self._reclaimed: set[str] = set()  # workers that had to go: their machines were taken away, or not wanted
        self.ended: Callable[[], int] = lambda: 0  # calls that have ended so far; the engine's too
        self._growth: set[asyncio.Task[None]] = set()  # what the end of the pool cancels
        self._is_up = False
        self._stopping = False

    def _reach_scheduler(self) -> None:
        """Have a scheduler, and let all know it: the one that there is or comes, or another one in its place."""
        if self._reaching is None or self._reaching.done():
            self._reaching = self._spawn_growth(self._reach())

    async def _reach(self) -> None:
        try:
            while not self._has_scheduler:
                await self._failover.appoint()
                await self._try_scheduler(self._failover.losses)
        except Exception as exc:  # whatever it is, it ends the pool
            self._fail(exc)

    async def _try_scheduler(self, losses: int) -> None:
        """Connect to the scheduler that there is or comes, unless it is lost before."""
        connecting = asyncio.ensure_future(self._connect_to_scheduler())
        connecting.add_done_callback(lambda _: self.changed.set())
        try:
            await self._until(lambda: connecting.done() or self._failover.losses != losses)
        finally:
            await end_tasks([connecting])
        error = None if connecting.cancelled() else connecting.exception()
        if self._failover.losses != losses:
            return
        if isinstance(error, OSError):  # a time-out is one too
            self._scheduler_lost(f"it could not be reached: {error or 'no answer'}")
        elif error is not None:
            raise error

    async def _connect_to_scheduler(self) -> None:
        async with asyncio.timeout(_SCHEDULER_S):
            await self._until(lambda: self._failover.address is not None)
            assert self._failover.address is not None
            await self._connect(self._failover.address)
            if self._is_up:
                await self.listener.scheduler_moved()
        self._has_scheduler = True
        self.listener.workers_changed()

    async def _connect(self, address: str) -> None:
        head = self._failover.head
        assert head is not None
        host, port = await head.reach_scheduler(address)
        self._open_rpc(f"tls://{host}:{port}")
        await super()._start()
        self._note_places()  # of workers that were there before
        if self.dashboard_port is not None:
            host, port = await head.reach(self.dashboard_port)
            self._dashboard = f"http://{host}:{port}/status"
        self.is_connected.set()

    def _scheduler_started(self, agent: Agent, address: str, dashboard_port: int | None) -> None:
        """Take note of the scheduler that an agent has started."""
        if self._failover.started(agent, address):
            self.dashboard_port = dashboard_port
            self.changed.set()

    def _scheduler_lost(
        self, why: str, *, but: Collection[int] = (), gone: bool = False, error: BaseException | None = None
    ) -> None:
        """Go on with another scheduler. What ran for this one runs again, without a loss but on the nodes `but`.

        `gone`: its provider has taken its machine away, which does not count against `retries`. `error` is why this one
        did not start, while the pool does.
        """
        if self._stopping or self.failure is not None:
            return
        was_known, self._has_scheduler = self._has_scheduler, False
        # Otherwise the machine that was to start the first one was never ready.
        counts = not gone and (self._is_up or self._failover.address is not None or error is not None)
        may_go_on = self._failover.lose(why, self.ended(), counts=counts)
        self._reclaimed |= {address for address, node in self._places.items() if node not in but}
        self._forget_scheduler()
        if not may_go_on:
            self._fail(error or schedulers_lost(self.name, self._failover.loss_reasons))
        else:
            logger.warning("the Dask scheduler is lost, another one is started: %s", why, extra=TOLD_BY_EVENT)
        if self._is_up:
            self.listener.scheduler_lost(why)
            self.listener.workers_changed()
        if was_known and may_go_on:
            self._reach_scheduler()
        self.changed.set()

    def _forget_scheduler(self) -> None:
        """Let go of a scheduler that is lost, and of the connections to it: it may hang."""
        self.is_connected.clear()
        self.has_dashboard.clear()
        if self._sync_cluster_info_task is not None:
            self._sync_cluster_info_task.cancel()
        if self._watch_worker_status_comm is not None:
            self._watch_worker_status_comm.abort()
        if self.scheduler_comm is not None:
            for comm in [*self.scheduler_comm.comms, *self.scheduler_comm._created]:
                comm.abort()
        self.scheduler_info: SchedulerInfo = SchedulerInfo({"workers": {}})

    # --- its workers ---------------------------------------------------------------------------------------

    def addresses(self) -> set[str]:
        """Return the addresses of all workers, also of those that get no new work."""
        return set(self.scheduler_info["workers"]) if self._has_scheduler else set()

    def _update_worker_status(self, op: str, msg: Any) -> None:
        super()._update_worker_status(op, msg)
        self._note_places()

    def _note_places(self) -> None:
        for address, worker in self.scheduler_info["workers"].items():
            self._places[address] = int(str(worker["name"]).partition("-")[0])

    @property
    def dashboard_link(self) -> str:
        return self._dashboard

    @property
    def kept_node(self) -> int:
        """The node that is never scaled away: the scheduler's, or the first one if that is about to leave."""
        head = self._failover.head
        nodes = self._nodes if head is None else head.nodes & self._nodes or self._nodes
        return min(nodes, default=0)

    async def _check_scheduler(self, losses: int) -> None:
        """Return when it is clear whether the scheduler was lost since it had been so many times."""
        if self._failover.losses == losses and not await self._has_answer():
            with contextlib.suppress(TimeoutError, PoolError):
                async with asyncio.timeout(_ANSWER_S):
                    await self._until(lambda: self._failover.losses > losses)

    async def _has_answer(self) -> bool:
        """Tell whether the scheduler answers."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self.scheduler_comm.identity(n_workers=0)
        except OSError:  # a time-out is one
            return False
        return True

    # --- life ------------------------------------------------------------------------------------------------

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, which is looked at after each change; raise when the pool fails."""
        while True:
            if self.failure is not None:
                raise self.failure
            if condition():
                return
            self.changed.clear()
            await self.changed.wait()

    def _fail(self, error: BaseException) -> None:
        self.failure: BaseException | None = self.failure or error
        self.changed.set()
        if self._is_up and not self._stopping:
            # From a thread: what follows closes this loop's clients, which can't be awaited here.
            threading.Thread(target=self.listener.cluster_lost, args=[error], daemon=True).start()

    def _spawn_growth(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what gets nodes and makes them ready: the end of the pool cancels it, and stops their agents itself."""
        task = asyncio.create_task(coroutine)
        self._growth.add(task)
        task.add_done_callback(self._growth.discard)
        return task
