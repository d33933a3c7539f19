"""A scheduler plugin that lets the tasks of a broadcast begin together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from distributed import SchedulerPlugin


@dataclass(slots=True)
class _Barrier:
    arrived: int = 0
    opened: asyncio.Event = field(default_factory=asyncio.Event)


class BarrierPlugin(SchedulerPlugin):  # type: ignore[misc]
    """Adds two calls to the scheduler: wait at a named barrier, and send everyone at it away."""

    name = "skyward-barrier"
    idempotent = True

    def __init__(self) -> None:
        self._barriers: dict[str, _Barrier] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._barriers = {}

    async def start(self, scheduler: Any) -> None:
        scheduler.handlers["skyward_barrier"] = self.wait
        scheduler.handlers["skyward_barrier_abort"] = self.abort

    async def wait(self, name: str, count: int) -> None:
        """Return once `count` callers wait under `name`."""
        barrier = self._barriers.setdefault(name, _Barrier())
        barrier.arrived += 1
        if barrier.arrived >= count:
            self._barriers.pop(name, None)
            barrier.opened.set()
        await barrier.opened.wait()

    async def abort(self, name: str) -> None:
        """Let those who wait go; they are being cancelled."""
        if (barrier := self._barriers.pop(name, None)) is not None:
            barrier.opened.set()
