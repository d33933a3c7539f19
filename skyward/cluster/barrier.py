"""A plugin for the scheduler that lets the tasks of a broadcast begin together."""

from __future__ import annotations

from typing import Any

from skyward.wire import barrier_handler


def barrier_plugin(pool_id: str) -> Any:
    """Return a plugin that adds two calls to the scheduler: wait at a named barrier, send everyone at it away.

    The class is made in here so that it travels by value: a scheduler that we only join need not have skyward.
    """
    import asyncio

    from distributed import SchedulerPlugin

    wait_name, abort_name = barrier_handler(pool_id), barrier_handler(pool_id, abort=True)

    class BarrierPlugin(SchedulerPlugin):  # type: ignore[misc]
        name = wait_name

        def __init__(self) -> None:
            self.arrived: dict[str, list[Any]] = {}  # name → [how many are there, the event that lets them go]

        async def start(self, scheduler: Any) -> None:
            scheduler.handlers[wait_name] = self.wait
            scheduler.handlers[abort_name] = self.abort

        async def wait(self, name: str, count: int) -> None:
            barrier = self.arrived.setdefault(name, [0, asyncio.Event()])
            barrier[0] += 1
            if barrier[0] >= count:
                self.arrived.pop(name, None)
                barrier[1].set()
            await barrier[1].wait()

        async def abort(self, name: str) -> None:
            barrier = self.arrived.pop(name, None)
            if barrier is not None:
                barrier[1].set()

    return BarrierPlugin()


def remove_barrier(client: Any, pool_id: str) -> None:
    """Take the plugin and its calls off a scheduler that goes on without us."""
    names = (barrier_handler(pool_id), barrier_handler(pool_id, abort=True))

    def remove(dask_scheduler: Any = None) -> None:
        dask_scheduler.plugins.pop(names[0], None)
        for name in names:
            dask_scheduler.handlers.pop(name, None)

    client.run_on_scheduler(remove)
