"""Agents of nodes that don't exist, for fast tests of how a cluster starts, grows and ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

from distributed.core import Status

from skyward.cluster.agents import Heard
from skyward.cluster.replacement import MachineCluster
from skyward.errors import BootstrapError, CapacityError
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
        self, node: int, name: str, *, fails_at: str | None = None, ready: threading.Event | None = None,
        spot: bool = False,
    ) -> None:  # fmt: skip
        self.nodes = {node}
        self.machine = name
        self.facts = Machine(id=name, provider="fake", login=Login(host=name), spot=spot)
        self.scheduler = f"tls://{name}:1"  # its address, if it has it
        self.started, self.stopped = threading.Event(), threading.Event()
        self.commands: list[dict[str, Any]] = []
        self.heard: Heard
        self.starts_scheduler = 0 in self.nodes  # without being told to
        self.starts_schedulers = True  # when it is told to
        self.has_answers = True
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
        if self.starts_scheduler:
            self._tell_scheduler()

    def _tell_scheduler(self) -> None:
        self.heard({"event": "scheduler", "address": self.scheduler, "dashboard": None})

    def tell_soon(self, cluster: FakeCluster) -> None:
        """Have it tell of its scheduler, which it did not do when it was told to start one."""
        cluster.loop.add_callback(self._tell_scheduler)

    async def keep_log(self, step: str, error: str) -> None:
        return None

    async def answers(self) -> bool:
        return self.has_answers

    def send(self, command: dict[str, Any]) -> None:
        self.commands.append(command)
        if command["do"] == "scheduler" and self.starts_schedulers:
            self._tell_scheduler()

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
        self.when_lost: Callable[[], None] = lambda: None
        self._may_move = threading.Event()
        self._may_move.set()

    def hold_moves(self) -> Callable[[], None]:
        """Let no scheduler become known until the returned function is called."""
        self._may_move.clear()
        return self._may_move.set

    def scheduler_lost(self, why: str) -> None:
        self.calls.append(("scheduler_lost", (why,)))
        self.when_lost()

    async def scheduler_moved(self) -> None:
        while not self._may_move.is_set():
            await asyncio.sleep(0.01)
        self.calls.append(("scheduler_moved", ()))

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, arguments))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of all calls of that name."""
        return [arguments for called, arguments in self.calls if called == name]


class FakeScheduler:
    """What a cluster asks of a scheduler: notes the workers that are retired, and those that are unregistered."""

    comms = _created = ()

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
        self.scheduler_count = 0
        self.unreachable: set[str] = set()

    async def _connect(self, address: str) -> None:
        if address in self.unreachable:
            raise OSError("no such place")
        self.scheduler_count += 1
        self.scheduler = address
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
        return self._has_scheduler

    @property
    def has_scheduler(self) -> bool:
        return self._has_scheduler

    @property
    def ready(self) -> list[Any]:
        return self._failover._ready

    @property
    def machines(self) -> dict[int, str]:
        """The names of the machines, by node."""
        return {node: agent.instance_id(node) for agent in self._agents for node in agent.nodes}


Start = Callable[..., FakeCluster]


class Cloud:
    """Has further machines: those that are given, one after another; then it has none."""

    def __init__(self, *spares: Callable[[int], FakeAgent], error: Exception | None = None) -> None:
        self._spares = list(spares)
        self._error = error or CapacityError("sold out")
        self.asked: list[tuple[list[int], list[str]]] = []
        self.discarded: list[str] = []

    def more(self, nodes: Sequence[int], used: Sequence[str]) -> list[FakeAgent]:
        self.asked.append((list(nodes), list(used)))
        if not self._spares:
            raise self._error
        (node,) = nodes
        return [self._spares.pop(0)(node)]

    def discard(self, machine: Any) -> None:
        self.discarded.append(machine.id)


def spare(name: str, **options: Any) -> Callable[[int], FakeAgent]:
    return lambda node: FakeAgent(node, name, **options)


def machines(*fails_at: str | None) -> list[FakeAgent]:
    return [FakeAgent(node, f"m{node}", fails_at=step) for node, step in enumerate(fails_at)]


def tell(cluster: FakeCluster, agent: FakeAgent, event: str, **facts: Any) -> None:
    cluster.loop.add_callback(agent.heard, {"event": event, **facts})


def sold_out(node: int) -> FakeAgent:
    raise CapacityError("sold out")


def begin(cluster: FakeCluster) -> tuple[threading.Thread, list[BaseException]]:
    """Start a cluster in a thread; return that, and where its failure is put."""
    failures: list[BaseException] = []

    def start() -> None:
        try:
            cluster.start()
        except BaseException as exc:
            failures.append(exc)

    starting = threading.Thread(target=start)
    starting.start()
    return starting, failures
