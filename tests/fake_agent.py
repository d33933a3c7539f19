"""Agents of nodes that don't exist, for fast tests of how a cluster starts, grows and ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from distributed.core import Status

from skyward.cluster.agents import Heard
from skyward.cluster.replacement import MachineCluster
from skyward.errors import BootstrapError
from skyward.node.config import NodeSpec
from skyward.providers.base import Login, Machine


def failure(step: str, machine: str = "m", status: int = 1) -> BootstrapError:
    return BootstrapError(f"{machine} failed at {step}", machine=machine, step=step, status=status)


class FakeAgent:
    """Becomes ready at once, or fails at `fails_at`, or when `ready` is given only after that is set.

    `started` and `stopped` are set when that is asked for.
    """

    has_unsent = False

    def __init__(
        self, node: int, name: str, *, fails_at: str | None = None, ready: threading.Event | None = None
    ) -> None:
        self.nodes = {node}
        self.machine = name
        self.facts = Machine(id=name, provider="fake", login=Login(host=name))
        self.started, self.stopped = threading.Event(), threading.Event()
        self.commands: list[dict[str, Any]] = []
        self.heard: Heard
        self._fails_at = fails_at
        self._ready = ready

    def instance_id(self, node: int) -> str:
        return self.facts.id

    async def start(self, heard: Heard) -> None:
        self.heard = heard
        self.started.set()
        while self._ready is not None and not self._ready.is_set():
            await asyncio.sleep(0.01)
        if self._fails_at is not None:
            raise failure(self._fails_at, self.machine)
        if 0 in self.nodes:
            heard({"event": "scheduler", "address": "tls://fake:1", "dashboard": None})

    async def keep_log(self, step: str, error: str) -> None:
        return None

    async def answers(self) -> bool:
        return True

    def send(self, command: dict[str, Any]) -> None:
        self.commands.append(command)

    async def reach(self, port: int) -> tuple[str, int]:
        return "fake", port

    async def reach_scheduler(self, address: str) -> tuple[str, int]:
        raise NotImplementedError(address)  # there is none

    async def stop(self) -> str | None:
        self.stopped.set()
        return None


class Notes:
    """Listens to a cluster, and notes what it hears: the name and the arguments of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, arguments))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of all calls of that name."""
        return [arguments for called, arguments in self.calls if called == name]


class FakeScheduler:
    """What a cluster asks of a scheduler: notes the workers that are retired, and those that are unregistered."""

    def __init__(self) -> None:
        self.retired: list[str] = []
        self.unregistered: list[tuple[str, bool]] = []  # and whether that was expected

    async def retire_workers(self, *, workers: Sequence[str], **_: Any) -> None:
        self.retired += workers

    async def identity(self, **_: Any) -> dict[str, Any]:
        return {"workers": {}}

    async def unregister(self, *, address: str, expected: bool, **_: Any) -> None:
        self.unregistered.append((address, expected))

    async def close_rpc(self) -> None:
        pass


class FakeCluster(MachineCluster):
    """A cluster of such agents, whose scheduler and workers are not real either."""

    listener: Notes
    scheduler_comm: FakeScheduler

    def __init__(self, agents: Sequence[FakeAgent], **options: Any) -> None:
        super().__init__(
            "fake",
            agents,
            security=None,
            slots_per_node=1,
            node_spec=lambda node: NodeSpec(node, ({},), ({},)),
            **{"timeout_s": 60.0, **options},
        )
        self.listener = Notes()

    async def _connect(self, address: str) -> None:
        assert address == "tls://fake:1"
        self.scheduler_comm = FakeScheduler()
        self.status = Status.running

    def add_worker(self, node: int) -> str:
        """Let the worker of a node join; return its address."""
        address = f"tls://worker:{node}"

        async def join() -> None:
            self._update_worker_status("add", {"workers": {address: {"name": f"{node}-0", "nthreads": 1}}})

        self.sync(join)
        return address

    def _is_complete(self) -> bool:
        return True

    @property
    def machines(self) -> dict[int, str]:
        """The names of the machines, by node."""
        return {node: agent.instance_id(node) for agent in self._agents for node in agent.nodes}
