"""What a pool's owner tells the scheduler of nodes and cost, kept there for the dashboard's page of skyward."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from distributed import SchedulerPlugin

PAGE_DATA = "skyward-page-data"
"""Name of the message that brings the page's data, and of the plugin that keeps them."""
KEPT = 1440
"""Moments that are kept for the plots: two hours of one every five seconds."""
SHARES = ("cpu", "memory", "gpu", "gpu_memory")


class PageDataPlugin(SchedulerPlugin):  # type: ignore[misc]
    """Keeps the latest measurements of all nodes, and a history of their means, so that it stays small for any pool."""

    name = PAGE_DATA

    def __init__(self) -> None:
        self.heading: Sequence[str] = ()
        self.nodes: Sequence[Mapping[str, Any]] = ()
        self.history: deque[dict[str, float | None]] = deque(maxlen=KEPT)

    async def start(self, scheduler: Any) -> None:
        scheduler.stream_handlers[PAGE_DATA] = self.heard

    def heard(
        self,
        client: str,  # noqa: ARG002 - Dask's
        nodes: Sequence[Mapping[str, Any]],
        cost: float | None,
        time: float,
        heading: Sequence[str] = (),
    ) -> None:
        """Take what the client has to say; `time` is in seconds since the epoch, `cost` in USD."""
        self.nodes = nodes
        self.heading = heading
        self.history.append({"time": time, "cost": cost, **{share: _mean(nodes, share) for share in SHARES}})


def _mean(nodes: Sequence[Mapping[str, Any]], share: str) -> float | None:
    known = [node[share] for node in nodes if node.get(share) is not None]
    return sum(known) / len(known) if known else None
