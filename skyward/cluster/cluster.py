"""A Dask cluster that agents run: its start, its scheduler, its slots and its end.

`MachineCluster` adds what needs other machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import asdict
from typing import Any

from distributed.core import Status

from skyward.cluster.adaptive import NodeAdaptive
from skyward.cluster.agents import Agent
from skyward.cluster.base import CLOSE_S
from skyward.cluster.failures import WORKERS, StartFailures, agent_lost, workers_error
from skyward.cluster.scheduler import SchedulerCluster
from skyward.cluster.tasks import end_tasks
from skyward.errors import BootstrapError, PoolTimeoutError, VolumeError
from skyward.node.config import NodeSpec
from skyward.providers.base import Machine
from skyward.transfer.wire import Slot

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Seconds that workers have to come up once their machines are ready. Chosen: far more than a loaded laptop needs."""
_EXIT_S = 1.0
"""Seconds to wait for the agent to tell of a worker that has ended. Chosen: it tells at once, if it is there."""


class AgentCluster(SchedulerCluster):
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
        super().__init__(
            name, agents[0], {node for agent in agents for node in agent.nodes}, security=security, retries=retries
        )
        self._agents = list(agents)
        self._node_spec = node_spec
        self._per_node = slots_per_node
        self._timeout_s = timeout_s
        self.folder = ""  # where it is all on this host: what ends with it
        self.demand: Callable[[], int] = lambda: 0  # calls that wait or run; the engine's, for adapt
        self.busy: Callable[[], set[str]] = set  # workers that have some; the engine's too
        self._departing: set[int] = set()  # nodes that get new work as long as no other node has a worker
        self._exited: dict[str, asyncio.Event] = defaultdict(asyncio.Event)  # set when its agent has told its end
        self.left: list[str] = []  # what may still run on machines that could not be cleaned
        self.losses: list[VolumeError] = []  # data that could not be sent
        self._leaving: dict[Agent, asyncio.Future[None]] = {}  # those that are being stopped, or are
        self._tasks: set[asyncio.Future[None]] = set()  # what the end of the pool waits for; it cancels `_growth`
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
            raise await self._start_timeout() from None
        self._is_up = True

    async def _start_timeout(self) -> BootstrapError:
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
        return self._has_scheduler and len(self.slots()) >= max(1, self.expected)

    def _begin(self, agent: Agent, error: BootstrapError | None = None) -> None:
        """Start a node, on another machine when its own has failed with `error`."""
        self._starting += 1
        self._spawn_growth(self._start_node(agent, error))

    async def _start_node(self, agent: Agent, error: BootstrapError | None) -> None:
        try:
            while True:
                if error is not None:
                    agent = await self._replace_at_start(agent, error)
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

    async def _replace_at_start(self, failed: Agent, error: BootstrapError) -> Agent:  # noqa: ARG002
        """Return an agent on another machine for a node that can't be made ready; raise `error` if there is none."""
        raise error

    async def _start_agent(self, agent: Agent) -> None:
        await agent.start(lambda event: self._heard(agent, event))
        self._failures.node_ready()
        self._failover.add(agent)

    # --- events ---------------------------------------------------------------------------------------------

    def _heard(self, agent: Agent, event: dict[str, Any]) -> None:
        match event["event"]:
            case "exited":
                self.listener.worker_output(event["output"])
                self._exited[event["address"]].set()
            case "metrics" if agent.nodes:
                node = min(agent.nodes)
                metrics = {name: value for name, value in event.items() if name != "event"}
                self.listener.node_metrics(node, agent.instance_id(node), metrics)
            case "scheduler":
                self._scheduler_started(agent, event["address"], event["dashboard"])
            case "scheduler-ended" if agent is self._failover.head:
                self._scheduler_lost(f"{agent.machine}: {event['why']}")
            case "dashboard" if agent is self._failover.head:
                self.has_dashboard.set()
            case "warning":
                logger.warning("%s: %s", agent.machine, event["text"])
            case "failed":
                self._fail(workers_error(self.name, agent, event))
            case "ended" if not self._stopping:
                self._fail(agent_lost(self.name, agent, event["why"], silence=event.get("silence", False)))

    def _mark_reclaimed(self, nodes: Collection[int]) -> None:
        self._reclaimed |= {address for address, node in self._places.items() if node in nodes}

    async def was_reclaimed(self, address: str) -> bool:
        """Tell, once it is known, whether a worker has ended because it had to: its machine was taken away, say.

        Waits for the last lines that it has printed, so that they come before the error.
        """
        losses = self._failover.losses
        if address not in self._reclaimed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exited[address].wait(), _EXIT_S)
        if address not in self._reclaimed:
            await self._check_scheduler(losses)
        return address in self._reclaimed

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

    # --- looking in -----------------------------------------------------------------------------------------

    @property
    def expected(self) -> int:
        """How many slots there should be, counting those whose worker is being restarted; 0: no node is left."""
        return len(self._nodes or self._departing) * self._per_node

    def instance_id(self, node: int) -> str:
        found = [agent.instance_id(node) for agent in self._agents if node in agent.nodes]
        return found[0] if found else super().instance_id(node)

    def machine(self, node: int) -> Machine | None:
        return next((agent.facts for agent in self._agents if node in agent.nodes), None)

    def slots(self) -> list[Slot]:
        found: list[Slot] = []
        for address, worker in self.scheduler_info["workers"].items() if self._has_scheduler else ():
            node, _, index = str(worker["name"]).partition("-")
            found.append(Slot(address, int(node), int(index), worker["nthreads"]))
        found.sort(key=lambda s: (s.node, s.number))
        return [s for s in found if s.node in self._nodes] or [s for s in found if s.node in self._departing]

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
            self._mark_reclaimed(gone)
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
