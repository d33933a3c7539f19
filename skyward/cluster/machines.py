"""Build the cluster of a pool on machines of its own, each reached over SSH and with an agent for one node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from skyward.cluster.cluster import AgentCluster
from skyward.cluster.config import AgentConfig, NodeSpec
from skyward.cluster.remote import RemoteAgent, Shipment
from skyward.cluster.requirements import recipe
from skyward.cluster.security import make_credentials
from skyward.cluster.slots import node_spec
from skyward.cluster.wheel import own_wheel
from skyward.providers.base import Machine
from skyward.spec import PoolSpec


def machine_cluster(
    machines: Sequence[Machine],
    more: Callable[[int, Sequence[str]], Sequence[Machine]],
    spec: PoolSpec,
    pool_id: str,
    emit: Callable[[Any], None],
) -> AgentCluster:
    """Return the cluster, not yet started; node i is on ``machines[i]``.

    `more` finds machines for so many further nodes, other than those with the ids given; it may block.
    """
    wheel = own_wheel()
    gpus = spec.accelerator.count if spec.accelerator else 0
    shipment = Shipment(recipe(spec.image, wheel), wheel, tuple(spec.image.include), gpus=gpus)
    credentials = make_credentials(pool_id, lifetime_s=spec.timeout)

    def make_node(node: int) -> NodeSpec:
        return node_spec(node, spec.concurrency, [str(i) for i in range(gpus)])

    def make_agent(node: int, machine: Machine) -> RemoteAgent:
        config = AgentConfig(
            pool_id=pool_id,
            folder="",  # the agent's own business
            ttl_s=spec.timeout,
            ca=credentials.ca,
            certificate=credentials.certificate,
            key=credentials.key,
            metrics=spec.collect_metrics,
            scheduler="" if node else None,
            environment={**spec.image.env, **(spec.env or {})},
        )
        return RemoteAgent(machine, make_node(node), config, shipment, emit)

    def new_agents(nodes: Sequence[int], taken: Sequence[str]) -> list[RemoteAgent]:
        return [make_agent(n, m) for n, m in zip(nodes, more(len(nodes), taken), strict=True)]

    return AgentCluster(
        pool_id,
        [make_agent(n, m) for n, m in enumerate(machines)],
        security=credentials.security(),
        slots_per_node=spec.concurrency,
        timeout_s=spec.timeout,
        node_spec=make_node,
        new_agents=new_agents,
    )
