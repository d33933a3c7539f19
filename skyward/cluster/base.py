"""What any pool knows of its Dask cluster: slots, and the machines behind them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any, Protocol

from distributed.core import rpc
from distributed.deploy import Cluster

from skyward.providers.base import Machine
from skyward.transfer.wire import Slot

TOLD_BY_EVENT = {"told_by_event": True}
"""Marks what is logged and of which an event tells too: consoles show it once."""
CLOSE_S = 30.0
"""Seconds that a cluster may take to close, not counting the data that its machines still send."""


class Listener(Protocol):
    """Hears what happens to a cluster.

    Called in the cluster's event loop, except for `cluster_lost`, and must not block there.
    """

    def workers_changed(self) -> None:
        """Take note that a worker has come or gone."""

    def scheduler_lost(self, why: str) -> None:
        """Take note that the scheduler and all its workers are lost; another one comes."""

    async def scheduler_moved(self) -> None:
        """Use the scheduler that there is now. Its workers are slots when this has returned.

        Raises
        ------
        OSError
            It is not there any more.
        """

    def cluster_lost(self, error: BaseException) -> None:
        """Take note that the cluster has failed after its start. Called in a thread of its own; may block."""

    def node_added(self, node: int, instance_id: str, machine: Machine | None) -> None:
        """Take note of a further node, which is being made ready."""

    def node_left(self, node: int, instance_id: str) -> None:
        """Take note that a node is not used any more."""

    def node_lost(self, node: int, instance_id: str, why: str) -> None:
        """Take note that a node has failed, or was taken away."""

    def node_replaced(self, node: int, instance_id: str, replaced_id: str) -> None:
        """Take note that a machine has taken the place of another."""

    def machine_failed(self, error: BaseException) -> None:
        """Take note of a machine that can't be made ready; the cluster does without it."""

    def node_metrics(self, node: int, instance_id: str, metrics: dict[str, float]) -> None:
        """Take the measurements of a node."""

    def worker_output(self, output: Any) -> None:
        """Take the last lines that a worker process has printed before its end."""


class SkyCluster(Cluster):  # type: ignore[misc]
    """A `distributed.deploy.Cluster` that knows which workers are slots of which node.

    `listener` is set once, before the cluster is started.
    """

    listener: Listener

    _name = "SkyCluster"
    _close_within_s: float | None = CLOSE_S

    def __init__(self, name: str, security: Any = None) -> None:
        super().__init__(asynchronous=False, quiet=True, name=name)
        self.security = security
        self.changed: asyncio.Event = asyncio.Event()
        self.failure: BaseException | None = None  # that has ended it
        self.is_connected: asyncio.Event = asyncio.Event()  # to a scheduler
        self.has_dashboard: threading.Event = threading.Event()  # set when `dashboard_link` leads to something
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
        self.listener.workers_changed()

    def _open_rpc(self, address: str) -> None:
        arguments = self.security.get_connection_args("client") if self.security else None
        self.scheduler_comm: rpc = rpc(address, connection_args=arguments)

    def stop(self) -> None:
        """Close and end the event loop's thread. May be called twice; never raises for what is gone already."""
        with contextlib.suppress(Exception):  # the scheduler may be dead: closing then only tidies up
            self.close(timeout=self._close_within_s)
        with contextlib.suppress(Exception):
            self._loop_runner.stop()
