"""Dask's adaptive scaling, counted in nodes."""

from __future__ import annotations

import math
from typing import Any

from distributed.deploy.adaptive import Adaptive


class NodeAdaptive(Adaptive):  # type: ignore[misc]
    """Dask's adaptive scaling, counted in nodes and driven by what waits in the engine."""

    async def target(self) -> int:
        wanted: int = self.cluster.demand()
        per_node: int = self.cluster._per_node
        return math.ceil(wanted / per_node)

    async def workers_to_close(self, target: int) -> list[int]:
        try:
            busy_workers = await self.cluster.scheduler_comm.processing()
        except OSError:  # the scheduler is lost, and another one comes
            return []
        ours = self.cluster.busy()
        busy = {s.node for s in self.cluster.slots() if busy_workers.get(s.address) or s.address in ours}
        idle = sorted(self.cluster.observed - busy - {self.cluster.kept_node}, reverse=True)
        return idle[: max(0, len(self.cluster.plan) - target)]

    async def scale_down(self, workers: Any) -> None:
        self.cluster.scale_down(list(workers))

    async def scale_up(self, n: int) -> None:
        self.cluster._scale(n)
