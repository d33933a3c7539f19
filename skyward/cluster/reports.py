"""A plugin for the scheduler: shows chunks that did not run as its tasks, and keeps no lines that workers print."""

from __future__ import annotations

from typing import Any

from distributed import SchedulerPlugin

from skyward.cluster.slot import LOG_TOPIC
from skyward.wire import RAN


class ReportsPlugin(SchedulerPlugin):  # type: ignore[misc]
    name = RAN

    async def start(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        scheduler.stream_handlers[RAN] = self.ran

    def log_event(self, topic: str, msg: Any) -> None:  # noqa: ARG002 - Dask's signature
        if topic == LOG_TOPIC:
            # They are on their way to whoever listens. Dask would keep a thousand batches, hundreds of MB in a storm.
            self._scheduler._broker.truncate(topic)

    def ran(self, worker: str, key: str, start: float, stop: float, thread: int) -> None:
        stream = self._scheduler.plugins.get("task-stream")
        if stream is None:  # nobody has looked yet
            return
        compute = {"action": "compute", "start": start, "stop": stop}
        stream.buffer.append(
            {"key": key, "worker": worker, "thread": thread, "status": "OK", "startstops": [compute]}
        )
        stream.index += 1
