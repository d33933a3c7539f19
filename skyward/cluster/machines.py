"""Build the cluster of a pool on its own machines, each reached over SSH and with an agent for one node."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from skyward.accelerators.model import is_nvidia
from skyward.cluster import remote
from skyward.cluster.bootstrap import Shipment
from skyward.cluster.heartbeat import Heartbeats
from skyward.cluster.listing import Listing
from skyward.cluster.remote import RemoteAgent
from skyward.cluster.replacement import MachineCluster
from skyward.cluster.requirements import recipe as make_recipe
from skyward.cluster.slots import node_spec
from skyward.cluster.wheel import own_wheel
from skyward.node.config import AgentConfig, NodeSpec
from skyward.node.tls import make_credentials
from skyward.providers.base import Machine
from skyward.scripts.bootstrap import Recipe
from skyward.spec.pool import PoolSpec
from skyward.spec.volume import S3Volume


class Source(Protocol):
    """Where a cluster's machines come from. May be called from several threads; blocks."""

    def more(self, nodes: Sequence[int], taken: Sequence[str]) -> Sequence[Machine]:
        """Return machines for further nodes, by number, other than those with the ids given."""

    def gone(self, machines: Sequence[Machine]) -> Collection[str]:
        """Return the ids of those machines, all out of reach, that don't exist any more."""

    def discard(self, machine: Machine) -> None:
        """Take back a machine that is not used any more."""


def environment(spec: PoolSpec) -> Recipe:
    """Return what the machines of a pool install.

    Raises
    ------
    SpecError
        The image asks for another version of what has to be the same on both sides.
    """
    return make_recipe(spec.image, own_wheel(), nvidia=is_nvidia(spec.accelerator))


def machine_cluster(
    machines: Sequence[Machine],
    source: Source,
    spec: PoolSpec,
    pool_id: str,
    emit: Callable[[Any], None],
    *,
    recipe: Recipe,
    expires: float,
) -> MachineCluster:
    """Return the cluster, not yet started; node i is on ``machines[i]``. It ends at `expires`, since the epoch.

    `recipe` is the pool's `environment`.

    Machines that do not live on after the pool are replaced when they are lost.
    """
    outlives_pool = machines[0].outlives_pool
    wheel = own_wheel()
    accelerator = spec.accelerator
    volumes = tuple(v for v in spec.volume if isinstance(v, S3Volume))
    image = spec.image
    shipment = Shipment(recipe, wheel, tuple(image.include), volumes, accelerator, tuple(image.wheels))
    heartbeats = Heartbeats(spec.heartbeat_timeout, remote.UNREACHABLE_S)
    listing = None if outlives_pool else Listing(source.gone)
    credentials = make_credentials(pool_id, lifetime_s=spec.timeout)

    def make_node(node: int) -> NodeSpec:
        return node_spec(node, spec.slots_per_node, accelerator)  # what devices it has is found there

    def make_agent(node: int, machine: Machine, *, is_first: bool = False) -> RemoteAgent:
        config = AgentConfig(
            pool_id=pool_id,
            folder="",  # the agent's own business
            ttl_s=max(0.0, expires - time.time()),  # a further node gets what is left
            ca=credentials.ca,
            certificate=credentials.certificate,
            key=credentials.key,
            metrics=spec.collect_metrics,
            preload=tuple(spec.image.preload),
            scheduler=None if is_first else "",
            environment=spec.environment,
        )
        return RemoteAgent(machine, make_node(node), config, shipment, emit, heartbeats, listing)

    def new_agents(nodes: Sequence[int], taken: Sequence[str]) -> list[RemoteAgent]:
        return [make_agent(n, m) for n, m in zip(nodes, source.more(nodes, taken), strict=True)]

    return MachineCluster(
        pool_id,
        [make_agent(n, m, is_first=not n) for n, m in enumerate(machines)],
        security=credentials.security(),
        slots_per_node=spec.slots_per_node,
        timeout_s=spec.timeout,
        retries=spec.retries,
        node_spec=make_node,
        new_agents=new_agents,
        discard=None if outlives_pool else source.discard,
    )
