"""The nodes of a pool, as its user sees them."""

from __future__ import annotations

from skyward.cluster.base import SkyCluster
from skyward.providers import Resolved, provider_names
from skyward.spec.instance import Instance
from skyward.worker.context import host_of


def instances(cluster: SkyCluster, provider: Resolved) -> tuple[Instance, ...]:
    """Return the nodes of the cluster that are there now, in order."""
    hosts = {slot.node: slot.address for slot in reversed(cluster.slots())}

    def instance(node: int) -> Instance:
        machine = cluster.machine(node)
        facts = ("instance_type", "region", "zone", "price", "price_on_demand", "launched")
        return Instance(
            id=cluster.instance_id(node),
            provider=machine.provider if machine else provider_names(provider),
            spot=machine.spot if machine else False,
            private_ip=host_of(hosts[node]),
            public_ip=machine.public_ip if machine else None,
            node=node,
            metadata={f: v for f in facts if (v := getattr(machine, f, None)) is not None},
        )

    return tuple(map(instance, sorted(hosts)))
