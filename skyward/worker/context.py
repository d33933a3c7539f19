"""The running task: where it is, who else takes part in it. Imports only facts."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from skyward.errors import SpecError
from skyward.transfer.wire import Layout, Participant


@dataclass(frozen=True, slots=True)
class NetworkInfo:
    """How the node is reached by its peers: the address that its workers listen on."""

    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceInfo:
    """Where a task runs, within its pool.

    `node` and `worker` count from 0; `worker` is the part within the node: 0, unless a broadcast reaches several
    workers of a node (MIG partitions, `pool.slots`). `peers` are the addresses of all nodes, in order.
    """

    node: int
    worker: int
    total_nodes: int
    workers_per_node: int
    accelerators: int
    total_accelerators: int
    head_addr: str
    head_port: int
    job_id: str
    peers: tuple[str, ...]
    accelerator: str | None
    network: NetworkInfo

    @property
    def is_head(self) -> bool:
        return self.node == 0 and self.worker == 0

    @property
    def global_worker_index(self) -> int:
        return self.node * self.workers_per_node + self.worker

    @property
    def total_workers(self) -> int:
        return self.total_nodes * self.workers_per_node

    @property
    def is_trainium(self) -> bool:
        return "trainium" in (self.accelerator or "").lower()

    @staticmethod
    def current() -> InstanceInfo | None:
        return instance_info()


class Peer(NamedTuple):
    """A participant of a broadcast as others reach it: an address, and a port of it that was free."""

    host: str
    port: int

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Job(NamedTuple):
    """What a part in a separate process is told: its worker's address, and who else takes part, by rank."""

    address: str
    peers: tuple[Peer, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """The task that runs in this context."""

    layout: Layout
    address: str
    participant: Participant | None
    peers: tuple[Peer, ...] = ()


running: ContextVar[Task | None] = ContextVar("skyward_task", default=None)


def instance_info() -> InstanceInfo | None:
    """Return where the running call is, or None outside a pool's call."""
    task = running.get()
    if task is None:
        return None
    layout, part = task.layout, task.participant
    node, _slot = layout.place(task.address) or (0, 0)
    hosts = tuple(host_of(slots[0]) if slots else "" for slots in layout.nodes)
    return InstanceInfo(
        node=node,
        worker=part.worker if part else 0,
        total_nodes=len(layout.nodes),
        workers_per_node=part.workers_per_node if part else 1,
        accelerators=layout.accelerators_per_node,
        total_accelerators=layout.accelerators_per_node * len(layout.nodes),
        head_addr=layout.head_addr,
        head_port=layout.head_port,
        job_id=layout.pool_id,
        peers=hosts,
        accelerator=layout.accelerator,
        network=NetworkInfo(host_of(task.address)),
    )


def current_accelerator() -> str | None:
    """Return the name of the accelerator of the running call's node, or None."""
    info = instance_info()
    return info.accelerator if info else None


def participant() -> tuple[int, int]:
    """Return (index, count) of the running task in its broadcast; (0, 1) for any other task, and outside one."""
    task = running.get()
    part = task.participant if task else None
    return (part.rank, part.size) if part else (0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The participants of the running broadcast, as frameworks for distributed training want to know them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int
    peers: tuple[Peer, ...]

    def environment(self) -> dict[str, str]:
        """Return the variables that torchrun sets too, which most frameworks read."""
        return {
            "MASTER_ADDR": self.peers[0].host,
            "MASTER_PORT": str(self.peers[0].port),
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "NODE_RANK": str(self.node_rank),
        }


def world() -> World:
    """Return who takes part in the running broadcast; anything else is alone."""
    task = running.get()
    part = task.participant if task else None
    if task is None or part is None:
        alone = (Peer("127.0.0.1", free_port("127.0.0.1")),)
        return World(rank=0, size=1, local_rank=0, local_size=1, node_rank=0, peers=alone)
    if not task.peers:
        raise SpecError(
            "a function for distributed training was called by another one that runs on every node: send it directly, "
            "`train(...) @ pool`",
            option="fn",
            value=None,
            accepted="the decorated function itself",
        )
    node, _slot = task.layout.place(task.address) or (0, 0)
    return World(
        rank=part.rank,
        size=part.size,
        local_rank=part.worker,
        local_size=part.workers_per_node,
        node_rank=node,
        peers=task.peers,
    )


def free_port(host: str) -> int:
    """Return a port of this machine that nothing listens on, from below those that systems give to connections."""
    while True:
        port = random.SystemRandom().randint(20_000, 32_000)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port


def host_of(address: str) -> str:
    return address.rpartition("://")[2].rpartition(":")[0].strip("[]")


def machine_name(layout: Layout, address: str) -> str:
    """Return how messages name a worker and its machine. In the worker's process."""
    place = layout.place(address)
    where = f"node {place[0]}, slot {place[1]}, " if place else ""
    return f"{where}{socket.gethostname()}, process {os.getpid()}"
