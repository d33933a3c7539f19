"""What is known of a pool from its events: phases, nodes, calls and cost. Pure: the caller passes the time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skyward import events

_BOOTING = "ssh"
"""The step of the bootstrap that waits until a machine lets us in."""


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """What is known of a pool before anything happens. `is_here`: its machines are there already, and cost nothing."""

    pool_id: str
    nodes: int
    slots: int
    provider: str
    is_here: bool = False

    def __str__(self) -> str:
        return f"{counted(self.nodes, 'node')} × {counted(self.slots, 'slot')} on {self.provider}"


@dataclass(slots=True)
class Phase:
    """A part of a pool's life. Times are those of the caller; `ended` is None while it lasts."""

    name: str
    began: float
    ended: float | None = None

    def seconds(self, now: float) -> float:
        return (now if self.ended is None else self.ended) - self.began


@dataclass(slots=True)
class Node:
    """A node, and what its machine is doing: ``"booting"``, ``"ready"``, ``"lost"``, or a step of its bootstrap."""

    number: int
    instance_id: str
    state: str = "booting"
    instance_type: str | None = None
    spot: bool | None = None  # None: that makes no difference, because it costs nothing
    price: float | None = None
    busy: dict[str, float] = field(default_factory=dict)  # percent, of processor, memory and GPU where there is one


@dataclass(slots=True)
class Work:
    """Calls at hand, as `TaskProgress` tells of them."""

    began: float
    done: int = 0
    total: int | None = None
    failed: int = 0
    heard: float = 0.0

    @property
    def has_ended(self) -> bool:
        return self.done == self.total

    def per_second(self) -> float | None:
        """Return how many calls have ended per second; None: it can't be told yet."""
        seconds = self.heard - self.began
        return self.done / seconds if self.done and seconds > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """Return how long the rest takes at this rate; None: it can't be told."""
        rate = self.per_second()
        if self.total is None or rate is None:
            return None
        return max(0.0, (self.total - self.done) / rate - (now - self.heard))


@dataclass(slots=True)
class Cost:
    """What was told of the cost last. `saved` is in comparison with machines that are no spot machines."""

    at: float
    total: float
    hourly: float
    elapsed: float  # seconds since the first machine was launched
    saved: float | None = None

    def now(self, now: float) -> float:
        """Return what it may be by now: never more than will be told next, for a cost that falls is none."""
        since = now - self.at
        so_long = self.hourly * (self.elapsed + since) / 3600  # less than the total while that is the least to be paid
        return min(self.total + self.hourly * since / 3600, max(self.total, so_long))


@dataclass(slots=True)
class Model:
    """A pool as its events tell of it."""

    info: PoolInfo
    phases: list[Phase] = field(default_factory=list)
    nodes: dict[int, Node] = field(default_factory=dict)
    region: str | None = None
    work: Work | None = None
    calls: int = 0  # that have ended, of work before
    failures: int = 0
    lost: int = 0  # machines
    cost: Cost | None = None
    link: str = ""

    # --- what happens ---------------------------------------------------------------------------------------

    def hear(self, event: Any, now: float) -> None:
        """Take in an event."""
        match event:
            case events.InfraCreating():
                self._enter("plan", now)
            case events.InfraCreated(region=region):
                self.region = region
            case events.InstanceLaunching() if self.phase == "plan":
                self._enter("launch", now)
            case events.InstanceProvisioned():
                self._provisioned(event)
            case events.ProvisioningCompleted():
                self._enter("boot", now)
            case events.BootstrapProgress(instance_id=instance_id, step=step):
                self._at(instance_id, "booting" if step == _BOOTING else step)
                self._proceed(now)
            case events.BootstrapCompleted(instance_id=instance_id):
                self._at(instance_id, "ready")
                self._proceed(now)
            case events.PoolStarted():
                self._enter("running", now)
            case events.InstanceLost(node=node):
                self.lost += 1
                if node in self.nodes:
                    self.nodes[node].state = "lost"
            case events.InstanceStopping(instance_id=instance_id):
                self._at(instance_id, "ending")
                if self.phase == "running":  # one that is not wanted any more
                    self.nodes = {n: node for n, node in self.nodes.items() if node.instance_id != instance_id}
            case events.PoolStopping():
                self._enter("ending", now)
            case events.Metrics(node=number) if number in self.nodes:
                busy = {"cpu": event.cpu_percent, "memory": event.memory_percent}
                gpu = {} if event.gpu_utilization is None else {"gpu": event.gpu_utilization}
                self.nodes[number].busy = {**busy, **gpu}
            case events.TaskProgress():
                self._progress(event, now)
            case events.CostUpdate(accumulated_cost=total, hourly_rate=hourly, elapsed_seconds=elapsed):
                self.cost = Cost(now, total, hourly, elapsed)
            case events.CostFinal(total_cost=total, savings_vs_ondemand=saved, total_seconds=elapsed):
                self.cost = Cost(now, total, 0.0, elapsed, saved)

    def end(self, now: float) -> None:
        """Note that nothing is left of the pool."""
        self._put_away()
        if self.phases and self.phases[-1].ended is None:
            self.phases[-1].ended = now

    def _enter(self, name: str, now: float) -> None:
        if self.phases and self.phases[-1].ended is None:
            self.phases[-1].ended = now
        self.phases.append(Phase(name, now))

    def _provisioned(self, event: events.InstanceProvisioned) -> None:
        price = event.price_spot if event.spot else event.price_on_demand
        has_price = event.price_on_demand is not None or event.price_spot is not None
        self.nodes[event.node] = Node(
            event.node, event.instance_id, instance_type=event.instance_type,
            spot=event.spot if has_price or event.instance_type else None, price=price,
        )  # fmt: skip

    def _at(self, instance_id: str, state: str) -> None:
        for node in self.nodes.values():
            if node.instance_id == instance_id:
                node.state = state

    def _proceed(self, now: float) -> None:
        """Enter the next phase of the start when the last node has."""
        states = [node.state for node in self.nodes.values()]
        if self.phase == "boot" and "booting" not in states:
            self._enter("bootstrap", now)
        if self.phase == "bootstrap" and all(state == "ready" for state in states):
            self._enter("workers", now)

    def _progress(self, event: events.TaskProgress, now: float) -> None:
        if self.work is None or self.work.has_ended or event.done < self.work.done:
            self._put_away()
            self.work = Work(now)
        self.work.done, self.work.total, self.work.failed = event.done, event.total, event.failed
        self.work.heard = now

    def _put_away(self) -> None:
        if self.work is not None:
            self.calls += self.work.done
            self.failures += self.work.failed
            self.work = None

    # --- what is the case -----------------------------------------------------------------------------------

    @property
    def phase(self) -> str | None:
        """The phase that lasts; None before the first."""
        return self.phases[-1].name if self.phases else None

    @property
    def is_up(self) -> bool:
        return any(phase.name == "running" for phase in self.phases)

    @property
    def ready(self) -> int:
        """How many nodes are ready."""
        return sum(node.state == "ready" for node in self.nodes.values())

    def node_of(self, instance_id: str | None) -> Node | None:
        return next((node for node in self.nodes.values() if node.instance_id == instance_id), None)

    def start_s(self) -> float:
        """Return the seconds from the first event until the pool took calls."""
        running = next(phase for phase in self.phases if phase.name == "running")
        return running.began - self.phases[0].began

    def total_calls(self) -> tuple[int, int]:
        """Return how many calls have ended, and how many of them failed."""
        work = self.work or Work(0.0)
        return self.calls + work.done, self.failures + work.failed

    def by_phase(self, now: float) -> dict[str, float]:
        """Return the seconds of each phase so far, in order."""
        seconds: dict[str, float] = {}
        for phase in self.phases:
            seconds[phase.name] = seconds.get(phase.name, 0.0) + phase.seconds(now)
        return seconds


def counted(count: int, noun: str) -> str:
    """Return ``"1 machine"``, ``"1,200 calls"`` and the like."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
