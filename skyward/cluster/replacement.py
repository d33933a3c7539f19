"""A cluster on machines that fail, are taken away and are added: replacement, evacuation, growing and shrinking."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from skyward.cluster.agents import Agent
from skyward.cluster.base import TOLD_BY_EVENT
from skyward.cluster.cluster import AgentCluster
from skyward.cluster.failures import LOST, WORKERS, StartFailures, no_machine_left, schedulers_lost, workers_error
from skyward.errors import BootstrapError, NoMatchingInstanceError, SkywardError
from skyward.providers.base import Machine

R = TypeVar("R")
logger = logging.getLogger(__name__)

_EVACUATION_MARGIN_S = 15.0
"""Seconds before a machine is taken away by which its work has been moved. Chosen, not measured."""
_FLUSH_MARGIN_S = 45.0
"""The same for a machine that also has to send what was written to volumes. Chosen, not measured."""
_LAST_CALLS_S = 15.0
"""Seconds before that in which the only machine of a pool gets no new work, so that what it runs may end. Chosen, not
measured."""
_CLOUD_CALLS = 6
"""Calls to clouds at a time that launch or destroy single machines of a pool that runs. Chosen, not measured."""
_LOOK_S = 2.0
_BREAK_S = 0.5
"""Seconds after the end of a worker or scheduler within which its machine is gone too, if that was why."""
_REPLACEMENT_PAUSES_S = (1.0, 15.0, 60.0, 120.0, 300.0)
"""Pauses before attempts to find a replacement for a lost machine.
Chosen, not measured: capacity comes back in minutes."""


class MachineCluster(AgentCluster):
    """A cluster of machines, each with an agent for one node. Any of them may be lost.

    Parameters
    ----------
    new_agents
        Makes agents for further nodes, on machines other than those in its second argument; may block.
    discard
        Destroys a machine that is not used any more; may block. None: machines stay when the cluster has left them.
    """

    def __init__(
        self,
        name: str,
        agents: Sequence[Agent],
        *,
        new_agents: Callable[[Sequence[int], Sequence[str]], Sequence[Agent]],
        discard: Callable[[Machine], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name, agents, **options)
        self._new_agents = new_agents
        self._discard = discard
        self._failures = StartFailures(len(agents), costly=discard is not None)
        self._growing = asyncio.Lock()
        self._used: list[str] = []  # machines that have failed, or are lost
        self._taken_away: set[Agent] = set()  # those whose providers do so, or have done so
        self._searches = 0  # for replacements, under way
        # Not the event loop's threads, which connections need: a cloud may keep all of these waiting.
        self._cloud_threads = ThreadPoolExecutor(_CLOUD_CALLS, thread_name_prefix="skyward-cloud")

    async def _close(self) -> None:
        await super()._close()
        self._cloud_threads.shutdown(wait=False)

    async def _ask_cloud(self, function: Callable[..., R], *arguments: Any) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._cloud_threads, function, *arguments)

    # --- failures -------------------------------------------------------------------------------------------

    def _heard(self, agent: Agent, event: dict[str, Any]) -> None:
        has_scheduler = agent is self._failover.head
        match event["event"]:
            case "failed":
                self._workers_failed(agent, event)
            case "ended" if not (self._stopping or (has_scheduler and event.get("silence", False))):
                self._agent_ended(agent, event["why"], gone=event.get("gone", False))
            case "scheduler-ended" if has_scheduler and not self._stopping:
                why, ended = f"{agent.machine}: {event['why']}", self.ended()
                self._scheduler_lost(why, gone=True)  # as far as is known now
                self._spawn_growth(self._count_loss(agent, why, ended))
            case "notice":
                self._spawn(self._evacuate(agent, event["seconds"]))
            case _:
                super()._heard(agent, event)

    def _workers_failed(self, agent: Agent, event: dict[str, Any]) -> None:
        tried = event.get("address", "")  # the scheduler that it could not join; None: it could not start one
        error = workers_error(self.name, agent, event)
        if tried is None and agent is self._failover.head:
            self._scheduler_lost(f"{_named(agent)}: {event['error']}", error=None if self._is_up else error)
        elif tried not in ("", self._failover.address):
            pass  # that one is lost
        elif self._is_up:
            self.listener.machine_failed(error)
            # Not replaced: what keeps workers from starting there may do so everywhere, and machines cost.
            self._spawn(self._drop(agent, event["error"], replace=False))
        elif agent in self._agents:
            self._begin(agent, error)

    def _agent_ended(self, agent: Agent, why: str, *, gone: bool) -> None:
        if gone:
            self._taken_away.add(agent)
        if self._is_up:
            self._spawn(self._drop(agent, why, gone=gone))
        elif agent in self._agents:
            said = f"the agent of pool {self.name} on {agent.machine} ended while the pool started ({why})"
            (node,) = agent.nodes
            self._begin(
                agent, BootstrapError(said, machine=agent.machine, step=LOST, instance_id=agent.instance_id(node))
            )

    async def _count_loss(self, agent: Agent, why: str, ended: int) -> None:
        """Count the end of a scheduler against `retries`, once it is known that its machine is not taken away."""
        await asyncio.sleep(_BREAK_S)
        while agent in self._agents and not await agent.answers():
            await asyncio.sleep(_BREAK_S)
        if agent not in self._taken_away and not self._failover.count(why, ended):
            self._fail(schedulers_lost(self.name, self._failover.loss_reasons))

    async def _replace_at_start(self, failed: Agent, error: BootstrapError) -> Agent:
        """Return an agent on another machine for a node that can't be made ready.

        Raises
        ------
        BootstrapError
            There is none, or another machine would fail too: then the start of the pool has failed.
        """
        self._leave_out(failed, str(error))
        await self._failures.allow_replacement(error)
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
                raise self._failures.with_earlier(error) from exc
            self._nodes = self._nodes - failed.nodes | agent.nodes
            self._agents[self._agents.index(failed)] = agent
        logger.warning("%s is replaced by %s: %s", failed.machine, agent.machine, error, extra=TOLD_BY_EVENT)
        self.listener.machine_failed(error)
        for node, old in zip(nodes, failed.nodes, strict=True):
            if self._discard is None:
                self.listener.node_left(old, failed.instance_id(old))
                self.listener.node_added(node, agent.instance_id(node), agent.facts)
            self.listener.node_replaced(node, agent.instance_id(node), failed.instance_id(old))
        self._spawn(self._remove_agent(failed))
        return agent

    def _leave_out(self, agent: Agent, why: str, *, gone: bool = False) -> None:
        """Do without a node from now on, and without its scheduler if it has that."""
        self._failover.remove(agent)
        if agent is self._failover.head:
            self._scheduler_lost(f"{_named(agent)}: {why}", but=() if gone else agent.nodes, gone=gone)

    async def _drop(self, agent: Agent, why: str, *, gone: bool = False, replace: bool = True) -> None:
        """Go on without a node that is lost: its calls are run again elsewhere, on its replacement if there is one.

        `gone`: its provider has taken it away, which does not count against a call's `retries`.
        """
        if agent not in self._agents:
            return
        logger.warning("lost %s: %s", agent.machine, why, extra=TOLD_BY_EVENT)
        self._agents.remove(agent)
        self._used += [agent.instance_id(node) for node in agent.nodes]
        if gone:
            self._mark_reclaimed(agent.nodes)
        was_counted = agent.nodes <= self._nodes
        self._nodes -= agent.nodes
        self._leave_out(agent, why, gone=gone)
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
        self._check_left(why)
        await self._remove_agent(agent)

    def _check_left(self, why: str) -> None:
        """End the pool if no machine is left, and none comes."""
        if not (self._agents or self._searches or self._growing.locked() or self._stopping):
            self._fail(no_machine_left(self.name, why))

    async def _evacuate(self, agent: Agent, seconds: float) -> None:
        """Take the work off a machine that its provider will take away in so many seconds.

        It gets nothing new once another node has workers. What it holds is moved away, what it runs may end; the rest
        is run again elsewhere. If it has the scheduler, that is moved at last, when all have had time to end what they
        run.
        """
        if agent not in self._agents or not agent.nodes <= self._nodes:
            return
        logger.warning("%s will be taken away by its provider in %.0f s: its work is moved", _named(agent), seconds)
        self._taken_away.add(agent)
        self._nodes -= agent.nodes
        self._replace(agent)
        margin = _FLUSH_MARGIN_S if agent.has_unsent else _EVACUATION_MARGIN_S
        until = asyncio.get_running_loop().time() + seconds - margin
        await self._use_alone(agent, until - _LAST_CALLS_S)
        self._failover.remove(agent)
        addresses = self._addresses(agent)
        with contextlib.suppress(Exception):  # it may be gone already, or a worker on its way out
            async with asyncio.timeout_at(until):
                await self.scheduler_comm.retire_workers(
                    workers=addresses, close_workers=False, remove=False, stimulus_id="machine-leaves"
                )
                while await self._is_busy(addresses):
                    await asyncio.sleep(_LOOK_S)
        await self._drop(agent, "its provider took it back", gone=True)

    async def _use_alone(self, agent: Agent, until: float) -> None:
        """Let a machine that will be taken away get new work until then, as long as no other node has a worker."""
        self._departing |= agent.nodes
        try:
            async with asyncio.timeout_at(until):
                await self._until(
                    lambda: agent not in self._agents or any(slot.node in self._nodes for slot in self.slots())
                )
        except Exception:  # the time is over, or the pool has failed
            logger.debug("%s gets no new work", agent.machine, exc_info=True)
        finally:
            self._departing -= agent.nodes
            self.listener.workers_changed()

    async def _is_busy(self, addresses: Sequence[str]) -> bool:
        """Tell whether workers run something, as they said within the last second or two."""
        if self.busy().intersection(addresses):
            return True
        workers = (await self.scheduler_comm.identity(n_workers=-1))["workers"]
        return any(workers[a]["metrics"].get("executing", 0) for a in addresses if a in workers)

    def _addresses(self, agent: Agent) -> list[str]:
        return [address for address in self.scheduler_info["workers"] if self._places.get(address) in agent.nodes]

    async def was_reclaimed(self, address: str) -> bool:
        """Tell the same; where a machine may be lost, also wait until it is clear whether its agent has ended too.

        That may be the end of the pool, which is a better reason for the calls to fail.
        """
        if await super().was_reclaimed(address):
            return True
        await asyncio.sleep(_BREAK_S)
        node = self._places.get(address)
        while agent := next((agent for agent in self._agents if node in agent.nodes), None):
            if self._stopping or self.failure is not None or await agent.answers():
                break
            await asyncio.sleep(_BREAK_S)  # until it is heard again, or it is known what has become of it
        return address in self._reclaimed

    # --- replacement ----------------------------------------------------------------------------------------

    def _replace(self, agent: Agent) -> None:
        if not self._stopping:
            self._searches += 1
            self._spawn_growth(self._find_replacement(agent))

    async def _find_replacement(self, lost: Agent) -> None:
        """Find another machine for a node that is lost; the pool goes on meanwhile with what it has."""
        why = "it was lost"
        try:
            for pause in _REPLACEMENT_PAUSES_S:
                await asyncio.sleep(pause)
                if self.failure is not None:
                    return
                try:
                    await self._add_replacement(lost)
                    return
                except Exception as exc:  # as in `_get_nodes`; or the new one is lost too, before it is ready
                    why = str(exc)
                    logger.warning("no replacement for %s at present: %s", lost.machine, exc)
                    if self._discard is None and isinstance(exc, NoMatchingInstanceError):
                        return  # no host is unused, and none will be
        finally:
            self._searches -= 1
            self._check_left(why)

    async def _add_replacement(self, lost: Agent) -> None:
        (lost_id,) = (lost.instance_id(node) for node in lost.nodes)
        async with self._growing:
            (node,) = self._free_numbers(1, but=lost.nodes)
            taken = self._used + [agent.instance_id(node) for agent in self._agents for node in agent.nodes]
            (agent,) = await self._ask_cloud(self._new_agents, [node], taken)
            self._agents.append(agent)
        if self._discard is None:  # otherwise the launch has told
            self.listener.node_added(node, agent.instance_id(node), agent.facts)
        try:
            await self._start_agent(agent)
        except Exception:
            self._agents.remove(agent)
            self._spawn(self._remove_agent(agent))
            raise
        self._nodes.add(node)
        self.listener.node_replaced(node, agent.instance_id(node), lost_id)

    async def _give_back(self, agent: Agent) -> None:
        if self._discard is not None and agent.facts is not None and not self._stopping:
            await self._ask_cloud(self._discard, agent.facts)

    async def _remove_agent(self, agent: Agent) -> None:
        await self._stop_agent(agent)
        await self._give_back(agent)

    # --- more and fewer nodes -------------------------------------------------------------------------------

    def _grow(self, new: list[int]) -> None:
        self._spawn_growth(self._get_nodes(new))

    async def _get_nodes(self, new: list[int]) -> None:
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
        except Exception as exc:  # as in `_get_nodes`
            logger.warning("%s can't be made ready: %s", agent.machine, exc)
            self._spawn(self._drop(agent, str(exc)))

    def _shrink(self, gone: set[int]) -> None:
        if self._discard is None:
            for node in sorted(gone):
                self.listener.node_left(node, self.instance_id(node))
        for agent in list(self._agents):
            if agent.nodes <= gone:
                self._agents.remove(agent)
                self._spawn(self._remove_agent(agent))


def _named(agent: Agent) -> str:
    """Return what an agent's machine is called in messages: by its node, as events and the console do."""
    return ", ".join(f"node {node} ({agent.instance_id(node)})" for node in sorted(agent.nodes))
