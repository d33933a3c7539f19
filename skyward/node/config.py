"""What an agent is told when it starts. Plain data, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One node to run: its number and, for each slot, environment and Dask resources."""

    node: int
    environments: tuple[dict[str, str], ...]
    resources: tuple[dict[str, float], ...]

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> NodeSpec:
        return NodeSpec(raw["node"], tuple(raw["environments"]), tuple(raw["resources"]))


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """All that an agent is told. Never part of a command line: it holds the pool's key and the user's variables.

    Attributes
    ----------
    folder
        For the workers' files, logs and sockets; removed when the agent ends, and so are those in `remove`.
    ttl_s
        Seconds of the pool's own time-out; a little later the agent ends by itself.
    scheduler
        Address to join. None: run the scheduler here. Empty: wait for a command, ``join`` or
        ``scheduler``.
    host
        Own address, as the other nodes reach it.
    networks
        Networks in one of which that address is looked for instead, in this order; empty: it is `host`.
    environment
        Variables of the agent and all its workers.
    heartbeat_s
        Seconds without a word from the caller after which the agent ends; 0: it ends with its standard input.
    power_off
        Whether the machine is to be switched off when the agent ends because the caller is gone.
    metrics
        Whether it tells how busy the machine is.
    preload
        Modules of the image, which the process that workers are forked from imports.
    notice
        Cloud whose notices of taking the machine away it is to watch for, such as ``"aws"``; empty: none.
    """

    pool_id: str
    folder: str
    ttl_s: float
    ca: str
    certificate: str
    key: str = field(repr=False)
    nodes: tuple[NodeSpec, ...] = ()
    scheduler: str | None = None
    host: str = "127.0.0.1"
    networks: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    heartbeat_s: float = 0.0
    power_off: bool = False
    metrics: bool = False
    remove: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    notice: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> AgentConfig:
        raw = json.loads(text)
        nodes = tuple(NodeSpec.from_dict(n) for n in raw.pop("nodes"))
        raw |= {name: tuple(raw[name]) for name in ("networks", "remove", "preload")}
        return AgentConfig(nodes=nodes, **raw)
