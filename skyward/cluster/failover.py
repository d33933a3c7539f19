"""Which node has the Dask scheduler: the first one at the start, and another one when that is lost."""

from __future__ import annotations

import asyncio
import logging
import time

from skyward.cluster.agents import Agent

logger = logging.getLogger(__name__)

_LONG_S = 600.0
"""Seconds that a scheduler lives after which its loss has nothing to do with earlier ones. Chosen, not measured."""
_AGAIN_S = 1.0
"""Seconds after which nodes that did not answer are asked again. Chosen, not measured."""


class Failover:
    """Chooses the agent that has the scheduler, and lets those of the other nodes join it. For one event loop.

    Parameters
    ----------
    head
        The agent that starts a scheduler without being told to.
    most
        How often in a row the scheduler may be lost, within minutes and without a call that has ended in between.
    """

    def __init__(self, head: Agent, *, most: int) -> None:
        self.head: Agent | None = head  # has the scheduler, or starts it
        self.address: str | None = None  # of the scheduler, as nodes reach it
        self.losses: int = 0  # of schedulers, in all
        self._most = most
        self._loss_reasons: list[str] = []  # of the losses since a call has ended
        self._ended = 0  # calls that had ended at the last loss
        self._started_at = 0.0  # when the scheduler was there
        self._ready: list[Agent] = []  # whose nodes can join
        self._last: Agent | None = None  # that had the scheduler
        self._failed: set[Agent] = set()  # that have started none since there was one
        self._has_ready = asyncio.Event()

    def add(self, agent: Agent) -> None:
        """Let a node that is ready join the scheduler."""
        self._ready.append(agent)
        self._has_ready.set()
        if self.address is not None and agent is not self.head:
            agent.send({"do": "join", "address": self.address})

    def remove(self, agent: Agent) -> None:
        """Count no longer on an agent: it is not to get the scheduler."""
        if agent in self._ready:
            self._ready.remove(agent)

    def started(self, agent: Agent, address: str) -> bool:
        """Take the address of an agent's scheduler, and let the others join it. False: it is not wanted any more."""
        if agent is not self.head:
            return False
        self.address = address
        self._started_at = time.monotonic()
        self._failed.clear()
        for other in self._ready:
            if other is not agent:
                other.send({"do": "join", "address": address})
        return True

    def lose(self, why: str, ended: int, *, counts: bool) -> bool:
        """Take note that the scheduler is lost; `ended` calls have ended so far. False: once too often, if it `counts`.

        Nodes end what they run for it, and wait.
        """
        if ended > self._ended or (self.address and time.monotonic() - self._started_at > _LONG_S):
            self._loss_reasons.clear()
        if self.head is not None and self.address is None:
            self._failed.add(self.head)
        self._last, self.head, self.address = self.head, None, None
        self.losses += 1
        self._ended = ended
        if counts:
            self._loss_reasons.append(why)
        for agent in self._ready:
            agent.send({"do": "join", "address": ""})
        return len(self._loss_reasons) <= self._most

    def count(self, why: str, ended: int) -> bool:
        """Count the loss for which `lose` had `ended`, and did not count it. False: once too often."""
        if ended == self._ended:  # otherwise calls have ended since
            self._loss_reasons.append(why)
        return len(self._loss_reasons) <= self._most

    @property
    def loss_reasons(self) -> str:
        """The reasons for the losses since a call has ended, a line for each."""
        return "".join(f"\n  {why}" for why in self._loss_reasons)

    async def appoint(self) -> None:
        """Have an agent that has the scheduler, or is to start it: on a node that answers, once there is one.

        The last one comes first if its scheduler alone has ended; then on-demand machines; then by number.
        """
        while self.head is None:
            asked = list(self._ready)
            answers = await asyncio.gather(*(agent.answers() for agent in asked))
            found = [a for a, answer in zip(asked, answers, strict=True) if answer and a in self._ready]
            if found:
                self.head = min(found, key=self._rank)
                self.head.send({"do": "scheduler"})
                return
            self._has_ready.clear()
            try:
                await asyncio.wait_for(self._has_ready.wait(), _AGAIN_S if asked else None)
            except TimeoutError:
                logger.debug("none of %s answers", asked)

    def _rank(self, agent: Agent) -> tuple[bool, bool, bool, int]:
        is_spot = agent.facts is not None and agent.facts.spot
        return agent in self._failed, agent is not self._last, is_spot, min(agent.nodes, default=0)
