"""A pool as a notebook shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from skyward.console.notebook import pool_html

if TYPE_CHECKING:
    from skyward.cluster.base import SkyCluster
    from skyward.spec.instance import Instance


def html(
    title: Sequence[str],
    cluster: SkyCluster | None,
    instances: Sequence[Instance],
    *,
    slots_per_node: int,
    cost: float,
) -> str:
    """Return a pool as HTML; where it has a cluster, with the nodes: each is ready, or some of its slots are."""
    if cluster is None:  # not active, or about to be
        return pool_html(title, cost=cost)
    missing = len(getattr(cluster, "plan", instances)) - len(instances)  # a joined cluster has no plan
    there = Counter(slot.node for slot in cluster.slots())
    states = {n: "ready" if k >= slots_per_node else f"{k} of {slots_per_node} slots ready" for n, k in there.items()}
    # Not by way of `ComputePool.dashboard_link`, which waits for it.
    link = str(cluster.dashboard_link)
    said = [*title, f"{missing} not there now"] if missing > 0 else title
    return pool_html(said, instances=instances, states=states, cost=cost, link=link)
