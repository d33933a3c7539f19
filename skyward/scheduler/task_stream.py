"""A plugin for the scheduler: shows chunks that did not run as its tasks, and keeps no lines that workers print."""

from __future__ import annotations

import sys
from typing import Any

from distributed import SchedulerPlugin
from distributed.diagnostics.task_stream import TaskStreamPlugin

from skyward.transfer.wire import RAN
from skyward.worker.runtime import LOG_TOPIC


class ReportsPlugin(SchedulerPlugin):  # type: ignore[misc]
    name = RAN

    async def start(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        scheduler.stream_handlers[RAN] = self.ran
        if TaskStreamPlugin.name not in scheduler.plugins:
            # Dask records from the first look on, and then shows nothing of what has run before it.
            scheduler.add_plugin(TaskStreamPlugin(scheduler))

    def log_event(self, topic: str, msg: Any) -> None:  # noqa: ARG002 - Dask's signature
        if topic == LOG_TOPIC:
            # They are on their way to their listeners. Dask would keep a thousand batches, hundreds of MB in a storm.
            self._scheduler._broker.truncate(topic)

    def ran(self, worker: str, key: str, start: float, stop: float, thread: int, has_failed: bool) -> None:
        stream = self._scheduler.plugins[TaskStreamPlugin.name]
        stream.buffer.append(
            {
                "key": key,
                "worker": sys.intern(worker),  # of a hundred thousand chunks that are kept
                "thread": thread,
                "status": "error" if has_failed else "OK",
                "startstops": [{"action": "compute", "start": start, "stop": stop}],
            }
        )
        stream.index += 1
