"""What any pool knows of its Dask cluster: slots, and the machines behind them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from distributed.core import rpc
from distributed.deploy import Cluster

from skyward.providers.base import Machine
from skyward.transfer.wire import Slot

CLOSE_S = 30.0
"""Seconds that a cluster may take to close, not counting the data that its machines still send."""


class SkyCluster(Cluster):  # type: ignore[misc]
    """A `distributed.deploy.Cluster` that knows which workers are slots of which node.

    `on_change` is called, in the event loop, whenever a worker comes or goes.
    """

    _name = "SkyCluster"
    _close_within_s: float | None = CLOSE_S

    def __init__(self, name: str, security: Any = None) -> None:
        super().__init__(asynchronous=False, quiet=True, name=name)
        self.security = security
        self.on_change: Callable[[], None] = lambda: None
        self.on_lost: Callable[[BaseException], None] = lambda _: None
        self.changed = asyncio.Event()
        self.has_dashboard = threading.Event()  # set when `dashboard_link` leads to something
        self._loop_runner.start()

    def instance_id(self, node: int) -> str:
        """Return the name of the machine that is node `node`."""
        return f"{self.name}-{node}"

    def machine(self, node: int) -> Machine | None:  # noqa: ARG002 - where there are several, it says which
        """Return what is known of the machine that is node `node`; None for this host, and for a joined cluster's."""
        return None

    def slots(self) -> list[Slot]:
        """Return the slots that are there now, by node and then by number."""
        raise NotImplementedError  # each kind of cluster numbers its nodes in its own way

    def _update_worker_status(self, op: str, msg: Any) -> None:
        super()._update_worker_status(op, msg)
        self.changed.set()
        self.on_change()

    def _open_rpc(self, address: str) -> None:
        arguments = self.security.get_connection_args("client") if self.security else None
        self.scheduler_comm = rpc(address, connection_args=arguments)

    def stop(self) -> None:
        """Close and end the event loop's thread. May be called twice; never raises for what is gone already."""
        with contextlib.suppress(Exception):  # the scheduler may be dead: closing then only tidies up
            self.close(timeout=self._close_within_s)
        with contextlib.suppress(Exception):
            self._loop_runner.stop()
