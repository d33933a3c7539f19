"""Dask clusters as skyward runs them. One on agents of our own is here; one that is only joined is in `joined`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from distributed.core import Status

from skyward.cluster.adaptive import NodeAdaptive
from skyward.cluster.agents import Agent
from skyward.cluster.base import CLOSE_S, SkyCluster
from skyward.cluster.failures import LOST, WORKERS, StartFailures
from skyward.errors import BootstrapError, PoolError, PoolTimeoutError, SkywardError, VolumeError
from skyward.node.config import NodeSpec
from skyward.providers.base import Machine
from skyward.scripts.bootstrap import LAST_LINES
from skyward.transfer.wire import Slot

R = TypeVar("R")
logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Seconds that workers have to come up once their machines are ready.
Chosen, not measured: far more than a loaded laptop needs."""
_EVACUATION_MARGIN_S = 15.0
"""Seconds before a machine is taken away by which its work has been moved. Chosen, not measured."""
_FLUSH_MARGIN_S = 45.0
"""The same for a machine that also has to send what was written to volumes. Chosen, not measured."""
_CLOUD_CALLS = 6
"""Calls to clouds at a time that launch or destroy single machines of a pool that runs. Chosen, not measured."""
_LOOK_S = 2.0
_EXIT_S = 1.0
"""Seconds to wait for the agent to tell of a worker that has ended. Chosen: it tells at once, if it is there."""
_BREAK_S = 0.5
"""Seconds after the end of a worker within which its machine is gone too, if that was why."""
_TOLD = {"told_by_event": True}
"""Marks what is logged and of which an event tells too: consoles show it once."""
_REPLACEMENT_PAUSES_S = (1.0, 15.0, 60.0, 120.0, 300.0)
"""Pauses before attempts to find a replacement for a lost machine.
Chosen, not measured: capacity comes back in minutes."""


class AgentCluster(SkyCluster):
    """A cluster that agents run, the first of which has the scheduler.

    Parameters
    ----------
    agents
        Not yet started. They are started side by side, and stopped with the cluster.
    node_spec
        Makes the specification of a further node, for `scale`.
    new_agents
        Makes agents for further nodes, where each has its own machine, other than those in its second argument;
        may block. None: the first agent runs them all.
    discard
        Destroys a machine that is not used any more; may block. Then one that is lost is replaced. None: machines stay
        when the cluster has left them, and those that are lost are not replaced.
    timeout_s
        Seconds that the machines may take to become ready: those of the pool itself.
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
        new_agents: Callable[[Sequence[int], Sequence[str]], Sequence[Agent]] | None = None,
        discard: Callable[[Machine], None] | None = None,
        timeout_s: float,
    ) -> None:
        super().__init__(name, security)
        self._agents = list(agents)
        self._node_spec = node_spec
        self._new_agents = new_agents
        self._discard = discard
        self._per_node = slots_per_node
        self._timeout_s = timeout_s
        self._nodes = {node for agent in agents for node in agent.nodes}
        self._places: dict[str, int] = {}  # nodes of all workers that ever were
        self._reclaimed: set[str] = set()  # workers that had to go: their machines were taken away, or not wanted
        self._address: asyncio.Future[str] | None = None  # of the scheduler, as nodes reach it
        self.dashboard_port: int | None = None  # on the scheduler's host, on its loopback
        self.folder = ""  # where it is all on this host: what ends with it
        self._dashboard = ""
        self._failed: BaseException | None = None
        self._stopping = False
        self.demand: Callable[[], int] = lambda: 0  # calls that wait or run; the engine's, for adapt
        self.busy: Callable[[], set[str]] = set  # workers that have some; the engine's too
        self._exited: dict[str, asyncio.Event] = defaultdict(asyncio.Event)  # set when its agent has told its end
        self.left: list[str] = []  # what may still run on machines that could not be cleaned
        self.losses: list[VolumeError] = []  # data that could not be sent
        self._leaving: dict[Agent, asyncio.Future[None]] = {}  # those that are being stopped, or are
        self._growing = asyncio.Lock()
        self._tasks: set[asyncio.Future[None]] = set()  # what the end of the pool waits for
        self._growth: set[asyncio.Future[None]] = set()  # what it cancels
        self._is_up = False
        self._starting = 0  # nodes that are being made ready, while the pool starts
        self._failures = StartFailures(len(self._agents), costly=discard is not None)
        self._used: list[str] = []  # machines that have failed
        # Not the event loop's threads, which connections need: a cloud may keep all of these waiting.
        self._cloud_threads = ThreadPoolExecutor(_CLOUD_CALLS, thread_name_prefix="skyward-cloud")

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
        self._address = asyncio.get_running_loop().create_future()
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        for agent in self._agents:
            self._begin(agent)
        await self._all_ready(deadline)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._unless_failed(self._connect(await self._address))
            while not self._is_complete():
                async with asyncio.timeout(START_TIMEOUT_S):
                    await self._until(lambda: self._starting > 0 or self._is_complete())
                await self._all_ready(deadline)  # some may have been lost again meanwhile
        except TimeoutError as exc:
            if isinstance(exc, PoolTimeoutError):
                raise
            raise await self._late() from None
        self._is_up = True

    async def _unless_failed(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for `work`, or raise when the pool fails: Dask keeps trying to reach a scheduler that has died."""
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self.changed.set())
        try:
            await self._until(task.done)
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _late(self) -> BootstrapError:
        """Return the error for scheduler and workers that did not start in time."""
        up = f"{len(self.scheduler_info['workers'])} of {self.expected} workers are up"
        logs = await asyncio.gather(*(agent.keep_log(WORKERS, up) for agent in self._agents))
        kept = [str(log) for log in logs if log is not None]
        named = "".join(f"\nA log is {log}" for log in kept)
        return BootstrapError(
            f"scheduler and workers of pool {self.name} did not start within {START_TIMEOUT_S:g} s; {up}{named}",
            machine=self._agents[0].machine,
            step=WORKERS,
            last_lines=(),
            log=kept[0] if kept else None,
        )

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
        return len(self.slots()) >= self.expected

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, which is looked at after each change; raise when the pool fails."""
        while True:
            if self._failed is not None:
                raise self._failed
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

    async def _exchange(self, failed: Agent, error: BootstrapError) -> Agent:
        """Return an agent on another machine for a node that can't be made ready.

        Raises
        ------
        BootstrapError
            There is none, or another machine would fail too: then the start of the pool has failed.
        """
        if self._new_agents is None:
            raise error
        await self._failures.judge(error)
        self._used += [failed.instance_id(node) for node in failed.nodes]
        async with self._growing:
            used = self._used + [agent.instance_id(node) for agent in self._agents for node in agent.nodes]
            # The scheduler may still have workers of one that had joined, and takes none with the same names.
            has_joined = error.step in (LOST, WORKERS)
            nodes = self._free_numbers(len(failed.nodes)) if has_joined else sorted(failed.nodes)
            try:
                (agent,) = await self._ask_cloud(self._new_agents, nodes, used)
            except SkywardError as exc:
                error.args = (f"{error}\nNo other machine could be had in its place: {exc}",)
                raise self._failures.noted(error) from exc
            self._nodes = self._nodes - failed.nodes | agent.nodes
            self._agents[self._agents.index(failed)] = agent
        logger.warning("%s is replaced by %s: %s", failed.machine, agent.machine, error, extra=_TOLD)
        self.listener.machine_failed(error)
        for node, old in zip(nodes, failed.nodes, strict=True):
            if self._discard is None:
                self.listener.node_left(old, failed.instance_id(old))
                self.listener.node_added(node, agent.instance_id(node), agent.facts)
            self.listener.node_replaced(node, agent.instance_id(node), failed.instance_id(old))
        self._spawn(self._remove_agent(failed))
        return agent

    async def _connect(self, address: str) -> None:
        host, port = await self._agents[0].reach_scheduler(address)
        self._open_rpc(f"tls://{host}:{port}")
        await super()._start()
        self._note_places()  # of workers that were there before
        if self.dashboard_port is not None:
            host, port = await self._agents[0].reach(self.dashboard_port)
            self._dashboard = f"http://{host}:{port}/status"

    async def _start_agent(self, agent: Agent) -> None:
        await agent.start(lambda event: self._heard(agent, event))
        self._failures.passed()
        if agent is not self._agents[0]:
            assert self._address is not None
            agent.send({"do": "join", "address": await asyncio.shield(self._address)})

    def _heard(self, agent: Agent, event: dict[str, Any]) -> None:
        match event["event"]:
            case "exited":
                self.listener.worker_output(event["output"])
                self._exited[event["address"]].set()
            case "metrics" if agent.nodes:
                node = min(agent.nodes)
                figures = {name: value for name, value in event.items() if name != "event"}
                self.listener.node_metrics(node, agent.instance_id(node), figures)
            case "scheduler":
                self.dashboard_port = event["dashboard"]
                if self._address is not None and not self._address.done():
                    self._address.set_result(event["address"])
            case "dashboard":
                self.has_dashboard.set()
            case "failed":
                lines, log = tuple(event.get("last_lines", ()))[-LAST_LINES:], event.get("log")
                text = "\n  ".join([f"pool {self.name} could not start on {agent.machine}: {event['error']}", *lines])
                error = BootstrapError(
                    f"{text}\nIts log is {log}" if log else text,
                    machine=agent.machine,
                    step=WORKERS,
                    last_lines=lines,
                    instance_id=agent.instance_id(min(agent.nodes)) if agent.nodes else None,
                    log=log,
                )
                if agent is self._agents[0]:
                    self._fail(error)
                elif self._is_up:
                    self.listener.machine_failed(error)
                    # Not replaced: what keeps workers from starting there may do so everywhere, and machines cost.
                    self._spawn(self._drop(agent, event["error"], replace=False))
                elif agent in self._agents:
                    self._begin(agent, error)
            case "notice" if agent is not self._agents[0]:
                self._spawn(self._evacuate(agent, event["seconds"]))
            case "notice":
                logger.warning("%s, which has the scheduler, will be taken away by its provider", _named(agent))
            case "ended" if not self._stopping:
                gone, silence = event.get("gone", False), event.get("silence", False)
                self._agent_ended(agent, event["why"], gone=gone, silence=silence)

    def _agent_ended(self, agent: Agent, why: str, *, gone: bool, silence: bool) -> None:
        """Take note of the end of an agent. `silence`: it has ended because it had heard nothing of this process."""
        if silence and agent is self._agents[0]:
            self._fail(
                PoolError(
                    f"pool {self.name} has ended: {why}. Calls that had not finished are lost. Raise "
                    "heartbeat_timeout=, or enter the pool again."
                )
            )
        elif agent is self._agents[0]:
            self._fail(
                PoolError(
                    f"the agent of pool {self.name} on {agent.machine}, and with it the Dask scheduler, ended "
                    f"unexpectedly ({why}); calls that had not finished are lost. Enter the pool again."
                )
            )
        elif self._is_up:
            self._spawn(self._drop(agent, why, gone=gone))
        elif agent in self._agents:
            said = f"the agent of pool {self.name} on {agent.machine} ended while the pool started ({why})"
            (node,) = agent.nodes
            self._begin(
                agent, BootstrapError(said, machine=agent.machine, step=LOST, instance_id=agent.instance_id(node))
            )

    async def _drop(self, agent: Agent, why: str, *, gone: bool = False, replace: bool = True) -> None:
        """Go on without a node that is lost: its calls are run again elsewhere, on its replacement if there is one.

        `gone`: its provider has taken it away, which does not count against a call's `retries`.
        """
        if agent not in self._agents:
            return
        logger.warning("lost %s: %s", agent.machine, why, extra=_TOLD)
        self._agents.remove(agent)
        if gone:
            self._excuse(agent.nodes)
        was_counted = agent.nodes <= self._nodes
        self._nodes -= agent.nodes
        for address in self._addresses(agent):
            with contextlib.suppress(Exception):  # it may have been noticed meanwhile
                # What is not `expected` the engine counts, and runs again.
                await self.scheduler_comm.unregister(
                    address=address, stimulus_id="machine-lost", expected=gone, close=False
                )
        for node in agent.nodes:
            self.listener.node_lost(node, agent.instance_id(node), why)
        self.changed.set()
        self.listener.workers_changed()
        if was_counted and replace:
            self._replace(agent)
        await self._remove_agent(agent)

    async def _evacuate(self, agent: Agent, seconds: float) -> None:
        """Take the work off a machine that its provider will take away in so many seconds.

        It gets nothing new, what it holds is moved away, what it runs may end; the rest is run again elsewhere.
        """
        if agent not in self._agents or not agent.nodes <= self._nodes:
            return
        logger.warning("%s will be taken away by its provider in %.0f s: its work is moved", _named(agent), seconds)
        self._nodes -= agent.nodes
        self.listener.workers_changed()
        self._replace(agent)
        addresses = self._addresses(agent)
        with contextlib.suppress(Exception):  # it may be gone already, or a worker on its way out
            margin = _FLUSH_MARGIN_S if agent.has_unsent else _EVACUATION_MARGIN_S
            async with asyncio.timeout(max(0.0, seconds - margin)):
                await self.scheduler_comm.retire_workers(
                    workers=addresses, close_workers=False, remove=False, stimulus_id="machine-leaves"
                )
                while await self._is_busy(addresses):
                    await asyncio.sleep(_LOOK_S)
        await self._drop(agent, "its provider took it back", gone=True)

    async def _is_busy(self, addresses: Sequence[str]) -> bool:
        """Tell whether workers run something, as they said within the last second or two."""
        if self.busy().intersection(addresses):
            return True
        workers = (await self.scheduler_comm.identity(n_workers=-1))["workers"]
        return any(workers[a]["metrics"].get("executing", 0) for a in addresses if a in workers)

    def addresses(self) -> set[str]:
        """Return the addresses of all workers, also of those that get no new work."""
        return set(self.scheduler_info["workers"])

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

        Waits for the last lines that it has printed, so that they come before the error. Then until it is clear whether
        its agent has ended too, which may be the end of the pool: that is a better reason for the calls to fail.
        """
        if address not in self._reclaimed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exited[address].wait(), _EXIT_S)
        if self._new_agents is not None and address not in self._reclaimed:
            await asyncio.sleep(_BREAK_S)
            node = self._places.get(address)
            while agent := next((agent for agent in self._agents if node in agent.nodes), None):
                if self._stopping or self._failed is not None or await agent.answers():
                    break
                await asyncio.sleep(_BREAK_S)  # until it is heard again, or it is known what has become of it
        return address in self._reclaimed

    def _addresses(self, agent: Agent) -> list[str]:
        return [address for address in self.scheduler_info["workers"] if self._places.get(address) in agent.nodes]

    def _replace(self, agent: Agent) -> None:
        if self._discard is not None and not self._stopping:
            self._spawn_growth(self._find_replacement(agent))

    async def _find_replacement(self, lost: Agent) -> None:
        """Find another machine for a node that is lost; the pool goes on meanwhile with what it has."""
        assert self._new_agents is not None
        (lost_id,) = (lost.instance_id(node) for node in lost.nodes)
        for pause in _REPLACEMENT_PAUSES_S:
            await asyncio.sleep(pause)
            if self._failed is not None:
                return  # what took this node took the scheduler's too
            async with self._growing:
                (node,) = self._free_numbers(1, but=lost.nodes)
                try:
                    (agent,) = await self._ask_cloud(self._new_agents, [node], [])
                except Exception as exc:  # as in _grow
                    logger.warning("no replacement for %s at present: %s", lost.machine, exc)
                    continue
                self._agents.append(agent)
            try:
                await self._start_agent(agent)
            except Exception as exc:  # it may be lost too, before it is ready
                logger.warning("%s, a replacement for %s, can't be made ready: %s", agent.machine, lost.machine, exc)
                self._agents.remove(agent)
                self._spawn(self._remove_agent(agent))
                continue
            self._nodes.add(node)
            self.listener.node_replaced(node, agent.instance_id(node), lost_id)
            return

    async def _ask_cloud(self, function: Callable[..., R], *arguments: Any) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._cloud_threads, function, *arguments)

    async def _give_back(self, agent: Agent) -> None:
        if self._discard is not None and agent.facts is not None and not self._stopping:
            await self._ask_cloud(self._discard, agent.facts)

    def _fail(self, error: BaseException) -> None:
        self._failed = self._failed or error
        self.changed.set()
        if self._address is not None and not self._address.done():
            self._address.set_exception(error)
            self._address.exception()  # those who wait for it are told; nobody has to
        elif self.status == Status.running:
            # From a thread: what follows closes this loop's clients, which can't be awaited here.
            threading.Thread(target=self.listener.cluster_lost, args=[error], daemon=True).start()

    async def _close(self) -> None:
        self._stopping = True
        with contextlib.suppress(Exception):  # the scheduler may be dead
            await asyncio.wait_for(super()._close(), 2)
        self.status = Status.closed
        for task in self._growth:
            task.cancel()
        await asyncio.gather(*self._growth, return_exceptions=True)
        stopping = map(self._stop_agent, {*self._agents, *self._leaving})
        await asyncio.gather(self._end_tasks(), *stopping, return_exceptions=True)
        self._cloud_threads.shutdown(wait=False)

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

    async def _remove_agent(self, agent: Agent) -> None:
        await self._stop_agent(agent)
        await self._give_back(agent)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _spawn_growth(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run what gets nodes and makes them ready: the end of the pool cancels it, and stops their agents itself."""
        task = asyncio.ensure_future(coroutine)
        self._growth.add(task)
        task.add_done_callback(self._growth.discard)

    # --- looking in -----------------------------------------------------------------------------------------

    @property
    def expected(self) -> int:
        """How many slots there should be, counting those whose worker is being restarted."""
        return len(self._nodes) * self._per_node

    def instance_id(self, node: int) -> str:
        found = [agent.instance_id(node) for agent in self._agents if node in agent.nodes]
        return found[0] if found else super().instance_id(node)

    def machine(self, node: int) -> Machine | None:
        return next((agent.facts for agent in self._agents if node in agent.nodes), None)

    @property
    def dashboard_link(self) -> str:
        return self._dashboard

    def slots(self) -> list[Slot]:
        found = []
        for address, worker in self.scheduler_info["workers"].items():
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
        """Grow or shrink to `n` nodes. Returns at once; node 0 always stays."""
        if n < 1:
            raise ValueError(f"a cluster has at least 1 node, not {n}")
        self.loop.add_callback(self._scale, n)

    def _scale(self, n: int) -> None:
        if self._stopping:
            return
        have = sorted(self._nodes)
        if n < len(have):
            self.scale_down(have[n:])
            return
        new = self._free_numbers(n - len(have))
        if not new:
            return
        self._nodes.update(new)
        if self._new_agents is not None:
            self._spawn_growth(self._grow(new))
            return
        specs = [self._node_spec(node) for node in new]
        self._agents[0].nodes.update(new)
        nodes = [{"node": s.node, "environments": s.environments, "resources": s.resources} for s in specs]
        self._agents[0].send({"do": "add", "nodes": nodes})
        for node in new:
            self.listener.node_added(node, self._agents[0].instance_id(node), None)

    def _free_numbers(self, count: int, *, but: Collection[int] = ()) -> list[int]:
        """Return numbers for further nodes: the lowest that no node has, and none whose work is still being moved."""
        taken = self._nodes.union(but, *(agent.nodes for agent in self._agents))
        return list(itertools.islice((i for i in itertools.count() if i not in taken), count))

    async def _grow(self, new: list[int]) -> None:
        assert self._new_agents is not None
        async with self._growing:
            taken = self._used + [agent.instance_id(node) for agent in self._agents for node in agent.nodes]
            try:
                agents = await self._ask_cloud(self._new_agents, new, taken)
            except Exception as exc:  # whatever a provider says: the pool goes on with what it has
                logger.warning("no more nodes: %s", exc)
                self._nodes.difference_update(new)
                return
            self._agents += agents
        for agent in agents:
            if self._discard is None:  # otherwise the launch has told
                for node in agent.nodes:
                    self.listener.node_added(node, agent.instance_id(node), agent.facts)
            self._spawn_growth(self._grow_by(agent))

    async def _grow_by(self, agent: Agent) -> None:
        try:
            await self._start_agent(agent)
        except Exception as exc:  # as in _grow
            logger.warning("%s can't be made ready: %s", agent.machine, exc)
            self._spawn(self._drop(agent, str(exc)))

    def scale_down(self, workers: Sequence[int]) -> None:
        """Remove nodes, by number. Dask's name for the argument; the work on them is run again elsewhere."""
        gone = {n for n in workers if n != 0 and n in self._nodes}
        self._nodes -= gone
        self._excuse(gone)
        if self._discard is None:
            for node in sorted(gone):
                self.listener.node_left(node, self.instance_id(node))
        for agent in list(self._agents):
            if agent.nodes and agent.nodes <= gone:
                self._agents.remove(agent)
                self._spawn(self._remove_agent(agent))
            elif mine := agent.nodes & gone:
                agent.nodes -= mine
                agent.send({"do": "remove", "nodes": sorted(mine)})

    def adapt(self, *, minimum: int = 1, maximum: int, **options: Any) -> Any:
        """Keep between `minimum` and `maximum` nodes, as many as the waiting calls can use."""
        return super().adapt(Adaptive=NodeAdaptive, minimum=minimum, maximum=maximum, **options)


def _named(agent: Agent) -> str:
    """Return what an agent's machine is called in messages: by its node, as events and the console do."""
    return ", ".join(f"node {node} ({agent.instance_id(node)})" for node in sorted(agent.nodes))
