"""A plugin for the scheduler that shows chunks which did not run as its tasks in the dashboard's task stream."""

from __future__ import annotations

from typing import Any

from distributed import SchedulerPlugin

from skyward.wire import RAN


class ReportsPlugin(SchedulerPlugin):  # type: ignore[misc]
    name = RAN

    async def start(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        scheduler.stream_handlers[RAN] = self.ran

    def ran(self, worker: str, key: str, start: float, stop: float, thread: int) -> None:
        stream = self._scheduler.plugins.get("task-stream")
        if stream is None:  # nobody has looked yet
            return
        compute = {"action": "compute", "start": start, "stop": stop}
        stream.buffer.append(
            {"key": key, "worker": worker, "thread": thread, "status": "OK", "startstops": [compute]}
        )
        stream.index += 1
