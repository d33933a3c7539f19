"""A Dask cluster that agents run: its start, its scheduler, its slots and its end.

`MachineCluster` adds what needs other machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import asdict
from typing import Any

from distributed.core import Status
from distributed.objects import SchedulerInfo

from skyward.cluster.adaptive import NodeAdaptive
from skyward.cluster.agents import Agent
from skyward.cluster.base import CLOSE_S, TOLD_BY_EVENT, SkyCluster
from skyward.cluster.failover import Failover
from skyward.cluster.failures import WORKERS, StartFailures, agent_lost, schedulers_lost, workers_error
from skyward.cluster.tasks import end_tasks
from skyward.errors import BootstrapError, PoolError, PoolTimeoutError, VolumeError
from skyward.node.config import NodeSpec
from skyward.providers.base import Machine
from skyward.transfer.wire import Slot

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Seconds that workers have to come up once their machines are ready. Chosen: far more than a loaded laptop needs."""
_SCHEDULER_S = 60.0
"""Seconds that a node has to start a scheduler, before another one does. Chosen, not measured: it takes one or two."""
_VERDICT_S = 5.0
"""Seconds in which a scheduler answers, or its agent tells that it has ended. Chosen, not measured."""
_EXIT_S = 1.0
"""Seconds to wait for the agent to tell of a worker that has ended. Chosen: it tells at once, if it is there."""


class AgentCluster(SkyCluster):
    """A cluster that agents run. The first has the scheduler; if that is lost, another one starts the next.

    Parameters
    ----------
    agents
        Not yet started. They are started side by side, and stopped with the cluster. The first starts the scheduler.
    node_spec
        Makes the specification of a further node, for `scale`: the first agent runs it.
    timeout_s
        Seconds that the machines may take to become ready: those of the pool itself.
    retries
        How often in a row the scheduler may be lost without a call that has ended in between.
    """

    _close_within_s = None  # each part has its own limits, and data is sent for as long as that takes

    def __init__(
        self,
        name: str,
        agents: Sequence[Agent],
        *,
        security: Any,
        slots_per_node: int,
        node_spec: Callable[[int], NodeSpec],
        timeout_s: float,
        retries: int = 3,
    ) -> None:
        super().__init__(name, security)
        self._agents = list(agents)
        self._failover = Failover(self._agents[0], most=retries)
        self._reaching: asyncio.Task[None] | None = None  # while there is no scheduler that all know
        self._has_scheduler = False  # and all know it
        self._node_spec = node_spec
        self._per_node = slots_per_node
        self._timeout_s = timeout_s
        self._nodes = {node for agent in agents for node in agent.nodes}
        self._places: dict[str, int] = {}  # nodes of all workers that ever were
        self._reclaimed: set[str] = set()  # workers that had to go: their machines were taken away, or not wanted
        self.dashboard_port: int | None = None  # on the scheduler's host, on its loopback
        self.folder = ""  # where it is all on this host: what ends with it
        self._dashboard = ""
        self._stopping = False
        self.demand: Callable[[], int] = lambda: 0  # calls that wait or run; the engine's, for adapt
        self.busy: Callable[[], set[str]] = set  # workers that have some; the engine's too
        self.ended: Callable[[], int] = lambda: 0  # calls that have ended so far; the engine's too
        self._exited: dict[str, asyncio.Event] = defaultdict(asyncio.Event)  # set when its agent has told its end
        self.left: list[str] = []  # what may still run on machines that could not be cleaned
        self.losses: list[VolumeError] = []  # data that could not be sent
        self._leaving: dict[Agent, asyncio.Future[None]] = {}  # those that are being stopped, or are
        self._tasks: set[asyncio.Future[None]] = set()  # what the end of the pool waits for
        self._growth: set[asyncio.Task[None]] = set()  # what it cancels
        self._is_up = False
        self._starting = 0  # nodes that are being made ready, while the pool starts
        self._failures = StartFailures(len(self._agents), costly=False)

    # --- life -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start agents, scheduler and workers; return when all workers are there.

        Raises
        ------
        BootstrapError
            An agent or a worker did not start. Nothing is left running.
        """
        try:
            self.sync(self._start)
        except BaseException:
            self.stop()
            raise

    def abort(self, error: BaseException) -> None:
        """Make a start that is under way, or comes, fail with `error`. May be called from any thread, and again."""
        self.loop.add_callback(self._fail, error)

    async def _start(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        for agent in self._agents:
            self._begin(agent)
        await self._all_ready(deadline)
        self._reach_scheduler()
        try:
            while not self._is_complete():
                async with asyncio.timeout(START_TIMEOUT_S):
                    await self._until(lambda: self._starting > 0 or self._is_complete())
                await self._all_ready(deadline)  # some may have been lost again meanwhile
        except TimeoutError as exc:
            if isinstance(exc, PoolTimeoutError):
                raise
            raise await self._late() from None
        self._is_up = True

    async def _late(self) -> BootstrapError:
        """Return the error for scheduler and workers that did not start in time."""
        up = f"{len(self.scheduler_info['workers'])} of {self.expected} workers are up"
        logs = await asyncio.gather(*(agent.keep_log(WORKERS, up) for agent in self._agents))
        kept = [str(log) for log in logs if log is not None]
        named = "".join(f"\nA log is {log}" for log in kept)
        return BootstrapError(
            f"scheduler and workers of pool {self.name} did not start within {START_TIMEOUT_S:g} s; {up}{named}",
            machine=self._agents[0].machine, step=WORKERS, last_lines=(), log=kept[0] if kept else None,
        )  # fmt: skip

    async def _all_ready(self, deadline: float) -> None:
        """Wait until all nodes are ready."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._until(lambda: not self._starting)
        except TimeoutError as exc:
            failed = self._failures.lines()
            raise PoolTimeoutError(
                f"the pool's timeout of {self._timeout_s:g} s has passed before its machines were ready. Raise timeout="
                + "\n  ".join(["\nThese machines had failed:", *failed] if failed else [])
            ) from exc

    def _is_complete(self) -> bool:
        return self._has_scheduler and len(self.slots()) >= self.expected

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, which is looked at after each change; raise when the pool fails."""
        while True:
            if self.failure is not None:
                raise self.failure
            if condition():
                return
            self.changed.clear()
            await self.changed.wait()

    def _begin(self, agent: Agent, error: BootstrapError | None = None) -> None:
        """Start a node, on another machine when its own has failed with `error`."""
        self._starting += 1
        self._spawn_growth(self._start_node(agent, error))

    async def _start_node(self, agent: Agent, error: BootstrapError | None) -> None:
        try:
            while True:
                if error is not None:
                    agent = await self._exchange(agent, error)
                try:
                    await self._start_agent(agent)
                    break
                except BootstrapError as exc:
                    error = exc
        except Exception as exc:  # whatever it is, it ends the start
            self._fail(exc)
        finally:
            self._starting -= 1
            self.changed.set()

    async def _exchange(self, failed: Agent, error: BootstrapError) -> Agent:  # noqa: ARG002
        """Return an agent on another machine for a node that can't be made ready; raise `error` if there is none."""
        raise error

    async def _start_agent(self, agent: Agent) -> None:
        await agent.start(lambda event: self._heard(agent, event))
        self._failures.passed()
        self._failover.add(agent)

    # --- the scheduler --------------------------------------------------------------------------------------

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

    def _scheduler_lost(self, why: str, *, but: Collection[int] = ()) -> None:
        """Go on with another scheduler. What ran for this one runs again, without a loss but on the nodes `but`."""
        if self._stopping or self.failure is not None:
            return
        was_known, self._has_scheduler = self._has_scheduler, False
        counts = self._is_up or self._failover.address is not None  # otherwise there never was one
        may_go_on = self._failover.lose(why, self.ended(), counts=counts)
        self._reclaimed |= {address for address, node in self._places.items() if node not in but}
        self._forget_scheduler()
        if not may_go_on:
            self._fail(schedulers_lost(self.name, self._failover.story))
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

    # --- events ---------------------------------------------------------------------------------------------

    def _heard(self, agent: Agent, event: dict[str, Any]) -> None:
        match event["event"]:
            case "exited":
                self.listener.worker_output(event["output"])
                self._exited[event["address"]].set()
            case "metrics" if agent.nodes:
                node = min(agent.nodes)
                figures = {name: value for name, value in event.items() if name != "event"}
                self.listener.node_metrics(node, agent.instance_id(node), figures)
            case "scheduler" if self._failover.started(agent, event["address"]):
                self.dashboard_port = event["dashboard"]
                self.changed.set()
            case "scheduler-ended" if agent is self._failover.head:
                self._scheduler_lost(f"{agent.machine}: {event['why']}")
            case "dashboard" if agent is self._failover.head:
                self.has_dashboard.set()
            case "failed":
                self._fail(workers_error(self.name, agent, event))
            case "ended" if not self._stopping:
                self._fail(agent_lost(self.name, agent, event["why"], silence=event.get("silence", False)))

    def addresses(self) -> set[str]:
        """Return the addresses of all workers, also of those that get no new work."""
        return set(self.scheduler_info["workers"]) if self._has_scheduler else set()

    def _update_worker_status(self, op: str, msg: Any) -> None:
        super()._update_worker_status(op, msg)
        self._note_places()

    def _note_places(self) -> None:
        for address, worker in self.scheduler_info["workers"].items():
            self._places[address] = int(str(worker["name"]).partition("-")[0])

    def _excuse(self, nodes: Collection[int]) -> None:
        self._reclaimed |= {address for address, node in self._places.items() if node in nodes}

    async def was_reclaimed(self, address: str) -> bool:
        """Tell, once it is known, whether a worker has ended because it had to: its machine was taken away, say.

        Waits for the last lines that it has printed, so that they come before the error.
        """
        losses = self._failover.losses
        if address not in self._reclaimed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exited[address].wait(), _EXIT_S)
        if address not in self._reclaimed and not await self._has_answer():  # then its scheduler may be why
            with contextlib.suppress(TimeoutError, PoolError):
                async with asyncio.timeout(_VERDICT_S):
                    await self._until(lambda: self._failover.losses > losses)
        return address in self._reclaimed

    async def _has_answer(self) -> bool:
        """Tell whether the scheduler answers."""
        try:
            async with asyncio.timeout(_VERDICT_S):
                await self.scheduler_comm.identity(n_workers=0)
        except OSError:  # a time-out is one
            return False
        return True

    def _fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        self.changed.set()
        if self._is_up and not self._stopping:
            # From a thread: what follows closes this loop's clients, which can't be awaited here.
            threading.Thread(target=self.listener.cluster_lost, args=[error], daemon=True).start()

    async def _close(self) -> None:
        self._stopping = True
        with contextlib.suppress(Exception):  # the scheduler may be dead
            await asyncio.wait_for(super()._close(), 2)
        self.status = Status.closed
        await end_tasks(self._growth)
        stopping = map(self._stop_agent, {*self._agents, *self._leaving})
        await asyncio.gather(self._end_tasks(), *stopping, return_exceptions=True)

    async def _end_tasks(self) -> None:
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=CLOSE_S)
            for task in pending:
                task.cancel()

    @property
    def has_unsent(self) -> bool:
        """Whether machines may have data to send: while they run, or after a stop that was interrupted."""
        return any(agent.has_unsent for agent in {*self._agents, *self._leaving})

    async def _stop_agent(self, agent: Agent) -> None:
        """Stop an agent, once. A caller that is cancelled does not end this: data may be on its way."""
        if agent not in self._leaving:
            self._leaving[agent] = asyncio.ensure_future(self._end_agent(agent))
        await asyncio.shield(self._leaving[agent])

    async def _end_agent(self, agent: Agent) -> None:
        left = "it failed"
        try:
            left = await agent.stop() or ""
        except VolumeError as exc:  # it has told
            self.losses.append(exc)
            left = ""
        finally:
            if left:
                self.left.append(left)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _spawn_growth(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what gets nodes and makes them ready: the end of the pool cancels it, and stops their agents itself."""
        task = asyncio.create_task(coroutine)
        self._growth.add(task)
        task.add_done_callback(self._growth.discard)
        return task

    # --- looking in -----------------------------------------------------------------------------------------

    @property
    def expected(self) -> int:
        """How many slots there should be, counting those whose worker is being restarted."""
        return max(1, len(self._nodes)) * self._per_node

    def instance_id(self, node: int) -> str:
        found = [agent.instance_id(node) for agent in self._agents if node in agent.nodes]
        return found[0] if found else super().instance_id(node)

    def machine(self, node: int) -> Machine | None:
        return next((agent.facts for agent in self._agents if node in agent.nodes), None)

    @property
    def dashboard_link(self) -> str:
        return self._dashboard

    def slots(self) -> list[Slot]:
        found: list[Slot] = []
        for address, worker in self.scheduler_info["workers"].items() if self._has_scheduler else ():
            node, _, index = str(worker["name"]).partition("-")
            if int(node) in self._nodes:
                found.append(Slot(address, int(node), int(index), worker["nthreads"]))
        return sorted(found, key=lambda s: (s.node, s.number))

    # --- more and fewer nodes -------------------------------------------------------------------------------

    @property
    def plan(self) -> set[int]:
        return set(self._nodes)

    requested = plan

    @property
    def observed(self) -> set[int]:
        return {slot.node for slot in self.slots()}

    def scale(self, n: int) -> None:
        """Grow or shrink to `n` nodes. Returns at once; the scheduler's node stays."""
        if n < 1:
            raise ValueError(f"a cluster has at least 1 node, not {n}")
        self.loop.add_callback(self._scale, n)

    def _scale(self, n: int) -> None:
        if self._stopping:
            return
        kept = self.kept_node
        have = sorted(self._nodes, key=lambda node: (node != kept, node))
        if n < len(have):
            self.scale_down(have[n:])
        elif new := self._free_numbers(n - len(have)):
            self._nodes.update(new)
            self._grow(new)

    @property
    def kept_node(self) -> int:
        """The node that is never scaled away: the scheduler's, or the first one if that is about to leave."""
        head = self._failover.head
        nodes = self._nodes if head is None else head.nodes & self._nodes or self._nodes
        return min(nodes, default=0)

    def _grow(self, new: list[int]) -> None:
        """Get further nodes, by number."""
        self._agents[0].nodes.update(new)
        nodes = [asdict(self._node_spec(node)) for node in new]
        self._agents[0].send({"do": "add", "nodes": nodes})
        for node in new:
            self.listener.node_added(node, self._agents[0].instance_id(node), None)

    def _free_numbers(self, count: int, *, but: Collection[int] = ()) -> list[int]:
        """Return numbers for further nodes: the lowest that no node has, and none whose work is still being moved."""
        taken = self._nodes.union(but, *(agent.nodes for agent in self._agents))
        return list(itertools.islice((i for i in itertools.count() if i not in taken), count))

    def scale_down(self, workers: Sequence[int]) -> None:
        """Remove nodes, by number. Dask's name for the argument; the work on them is run again elsewhere."""
        if gone := {n for n in workers if n != self.kept_node and n in self._nodes}:
            self._nodes -= gone
            self._excuse(gone)
            self._shrink(gone)

    def _shrink(self, gone: set[int]) -> None:
        """End nodes, by number, that get no new work any more."""
        for node in sorted(gone):
            self.listener.node_left(node, self.instance_id(node))
        self._agents[0].nodes -= gone
        self._agents[0].send({"do": "remove", "nodes": sorted(gone)})

    def adapt(self, *, minimum: int = 1, maximum: int, **options: Any) -> Any:
        """Keep between `minimum` and `maximum` nodes, as many as the waiting calls can use."""
        return super().adapt(Adaptive=NodeAdaptive, minimum=minimum, maximum=maximum, **options)
