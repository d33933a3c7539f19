"""From events to what the dashboard's page of skyward shows: nodes with their load, and cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from skyward import events
from skyward.console import wording
from skyward.console.model import Model, PoolInfo

PERIOD_S = 2.0
"""Seconds between two messages at least: of many nodes, each tells of its load by itself."""
_HEARD = (
    events.InstanceProvisioned, events.InstanceLost, events.InstanceStopping, events.BootstrapProgress,
    events.BootstrapCompleted, events.ProvisioningCompleted, events.PoolStarted, events.Metrics, events.CostUpdate,
    events.TaskProgress,
)  # fmt: skip


class DashboardData:
    """Hears of events, from any thread, and sends what they come to, from `PoolStarted` on.

    `send` takes the fields of a message, and must not block.
    """

    def __init__(self, info: PoolInfo) -> None:
        self.send: Callable[[dict[str, Any]], None] | None = None
        self._model = Model(info)
        self._metrics: dict[int, events.Metrics] = {}
        self._lock = threading.Lock()
        self._sent_at = -PERIOD_S

    def hear(self, event: Any) -> None:
        if not isinstance(event, _HEARD):
            return
        with self._lock:
            now = time.monotonic()
            self._model.hear(event, now)
            if isinstance(event, events.Metrics):
                self._metrics[event.node] = event
            if self.send is None or now - self._sent_at < PERIOD_S or isinstance(event, events.TaskProgress):
                return  # progress alone is no reason: machines tell of their load every few seconds
            self._sent_at = now
            self.send(self._message(now))

    def _message(self, now: float) -> dict[str, Any]:
        cost = self._model.cost
        return {
            "nodes": [self._node(number) for number in sorted(self._model.nodes)],
            "cost": None if cost is None else cost.now(now),
            "time": time.time(),
            "heading": wording.state(self._model, now),
        }

    def _node(self, number: int) -> dict[str, Any]:
        node, metrics = self._model.nodes[number], self._metrics.get(number)
        if metrics is None and self._model.info.is_here:  # where all nodes are one machine, and the first tells of it
            metrics = self._metrics.get(0)
        facts: dict[str, Any] = {
            "node": number,
            "machine": node.instance_id,
            "type": node.instance_type,
            "lease": None if node.spot is None else "spot" if node.spot else "on-demand",
            "price": node.price,
            "state": node.state,
        }
        if metrics is not None:
            facts |= {
                "cpu": metrics.cpu_percent,
                "memory": metrics.memory_percent,
                "gpu": metrics.gpu_utilization,
                "gpu_memory": _percent(metrics.gpu_memory_used_mb, metrics.gpu_memory_total_mb),
                "gpu_temperature": metrics.gpu_temperature,
            }
        return facts


def _percent(part: float | None, whole: float | None) -> float | None:
    return 100 * part / whole if part is not None and whole else None
