"""Failures of machines: which are replaced while a pool starts, when the start has failed, and the errors for them."""

from __future__ import annotations

import asyncio
from typing import Any

from skyward.cluster.agents import Agent
from skyward.errors import BootstrapError, PoolError
from skyward.scripts.steps import LAST_LINES

LOST = "lost"
"""The step of a machine that was ready and is lost before the pool has started."""
WORKERS = "workers"
"""The step of a machine whose agent runs, and whose worker processes don't start."""
_CONNECTION = 255  # as ssh has it
_MACHINE = ("boot", "ssh", "address", LOST)
"""Steps that need nothing of the image."""


class StartFailures:
    """The failures of one start of a pool with so many nodes. For one event loop.

    The start fails when more than half of the nodes have failed, where one may always fail. What fails at a step of
    the image, such as ``packages``, may fail everywhere: such a node is replaced once another one has become ready, and
    when a second one fails at the same step, the start fails at once. So does that of a pool of one node.
    """

    def __init__(self, nodes: int, *, costly: bool) -> None:
        """`costly`: a replacement costs money and time, so that it is tried only where it may help."""
        self._nodes = nodes
        self._costly = costly
        self._errors: list[BootstrapError] = []
        self._one_ready = asyncio.Event()

    def node_ready(self) -> None:
        """Note that a node is ready."""
        self._one_ready.set()

    async def allow_replacement(self, error: BootstrapError) -> None:
        """Return when the node that failed so is to be replaced.

        Raises
        ------
        BootstrapError
            `error`, with the failures before it in its message: the start has failed.
        """
        is_image = error.step not in _MACHINE and error.status != _CONNECTION
        again = any(earlier.step == error.step for earlier in self._errors)
        self._errors.append(error)
        if len(self._errors) > max(1, self._nodes // 2):
            raise self.with_earlier(error)
        if is_image and (again or (self._costly and self._nodes == 1)):
            raise self.with_earlier(error)
        if is_image and self._costly:
            await self._one_ready.wait()

    def with_earlier(self, error: BootstrapError) -> BootstrapError:
        """Return `error` with what has failed before it in its message."""
        if earlier := self.lines(but=error):
            error.args = ("\n  ".join([f"{error}\nBefore it failed:", *earlier]),)
        return error

    def lines(self, *, but: BootstrapError | None = None) -> list[str]:
        """Return a line for each failure."""
        return [str(error).partition("\n")[0] for error in self._errors if error is not but]


def workers_error(pool_id: str, agent: Agent, event: dict[str, Any]) -> BootstrapError:
    """Return the error for an agent that can't start its part of the cluster."""
    lines, log = tuple(event.get("last_lines", ()))[-LAST_LINES:], event.get("log")
    text = "\n  ".join([f"pool {pool_id} could not start on {agent.machine}: {event['error']}", *lines])
    return BootstrapError(
        f"{text}\nIts log is {log}" if log else text,
        machine=agent.machine,
        step=WORKERS,
        last_lines=lines,
        instance_id=agent.instance_id(min(agent.nodes)) if agent.nodes else None,
        log=log,
    )


def agent_lost(pool_id: str, agent: Agent, why: str, *, silence: bool) -> PoolError:
    """Return the error for the end of an agent that ends the pool. `silence`: it had heard nothing of this process."""
    if silence:
        return PoolError(
            f"pool {pool_id} has ended: {why}. Calls that had not finished are lost. Raise "
            "heartbeat_timeout=, or enter the pool again."
        )
    return PoolError(
        f"the agent of pool {pool_id} on {agent.machine} ended unexpectedly ({why}); calls that had not finished are "
        "lost. Enter the pool again."
    )


def schedulers_lost(pool_id: str, reasons: str) -> PoolError:
    """Return the error for a Dask scheduler that was lost again and again."""
    return PoolError(
        f"pool {pool_id} has ended: its Dask scheduler was lost again and again, and no call has ended in between. "
        f"Calls that had not finished are lost.{reasons}\nIf a call takes its machine down, give it a larger one; "
        "otherwise raise retries=, or enter the pool again."
    )


def no_machine_left(pool_id: str, why: str) -> PoolError:
    """Return the error for a pool that has lost all its machines."""
    return PoolError(
        f"pool {pool_id} has ended: none of its machines is left, and no other could be had in their place. Calls that "
        f"had not finished are lost. The last one: {why}. Enter the pool again."
    )
