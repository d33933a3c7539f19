"""A plugin for the scheduler: the tasks of a broadcast begin together, and pools hear which workers come and go."""

from __future__ import annotations

from typing import Any

from skyward.transfer.wire import barrier_handler


def barrier_plugin(pool_id: str) -> Any:
    """Return a plugin that adds two calls to the scheduler: wait at a named barrier, send everyone at it away.

    Workers that come and go are logged under the name of the first. Not every entry of Dask's own log can be sent.

    The class is made in here so that it travels by value: a scheduler that we only join need not have skyward.
    """
    import asyncio

    from distributed import SchedulerPlugin

    wait_name, abort_name = barrier_handler(pool_id), barrier_handler(pool_id, abort=True)

    class BarrierPlugin(SchedulerPlugin):  # type: ignore[misc]
        name = wait_name

        def __init__(self) -> None:
            self.arrived: dict[str, tuple[dict[str, Any], Any]] = {}  # who is there with what; what lets them go

        async def start(self, scheduler: Any) -> None:
            scheduler.handlers[wait_name] = self.wait
            scheduler.handlers[abort_name] = self.abort

        def add_worker(self, scheduler: Any, worker: str) -> None:
            scheduler.log_event(wait_name, {"worker": worker})

        def remove_worker(self, scheduler: Any, worker: str, **_: Any) -> None:
            scheduler.log_event(wait_name, {"worker": worker})

        async def wait(self, name: str, count: int, rank: str, fact: Any) -> dict[str, Any]:
            facts, go = self.arrived.setdefault(name, ({}, asyncio.Event()))
            facts[rank] = fact
            if len(facts) >= count:
                self.arrived.pop(name, None)
                go.set()
            await go.wait()
            return facts

        async def abort(self, name: str) -> None:
            _, go = self.arrived.pop(name, ({}, None))
            if go is not None:
                go.set()

    return BarrierPlugin()


def remove_barrier(client: Any, pool_id: str) -> None:
    """Take the plugin and its calls off a scheduler that goes on without us."""
    names = (barrier_handler(pool_id), barrier_handler(pool_id, abort=True))

    def remove(dask_scheduler: Any = None) -> None:
        dask_scheduler.plugins.pop(names[0], None)
        for name in names:
            dask_scheduler.handlers.pop(name, None)

    client.run_on_scheduler(remove)
