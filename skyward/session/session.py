"""One run of a pool, from its start to its end: its machines, Dask client, engine, and what it shows."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyward import events
from skyward.cleanup.signals import unwind_on_termination
from skyward.console import Console, PoolInfo, open_console
from skyward.console.dashboard import DashboardData
from skyward.console.logfile import LogFile
from skyward.console.output import Output
from skyward.errors import PoolError, VolumeError
from skyward.node import descriptors
from skyward.providers import Resolved, provider_names
from skyward.providers.base import Machine
from skyward.providers.dask import Dask
from skyward.providers.local import Local
from skyward.session.limits import watch_time
from skyward.session.machines import Machines, provisioned
from skyward.spec.pool import PoolSpec

# Dask and what needs it is imported where it is used: a local pool's agent starts meanwhile.
if TYPE_CHECKING:
    from distributed import Client

    from skyward.cluster.base import SkyCluster
    from skyward.engine import Engine


logger = logging.getLogger(__name__)

_left: list[Session] = []
"""Sessions of the parent, in a process that was forked."""


class Session:
    """What an active pool holds. Started once, stopped once. It is the `Listener` of its cluster.

    `cluster`, `client` and `engine` are None until the start has got so far.

    Parameters
    ----------
    callbacks
        Hear of every event.
    on_end
        Ends the pool before its user does, for the reason given: it has reached a limit. Called in another thread.
    """

    def __init__(
        self,
        spec: PoolSpec,
        provider: Resolved,
        callbacks: Iterable[events.Callback],
        on_end: Callable[[Exception], None],
    ) -> None:
        self.pool_id: str = secrets.token_hex(4)
        self._spec = spec
        self._provider = provider
        self._callbacks = list(callbacks)
        self._on_end = on_end
        self._stack = contextlib.ExitStack()
        self._over = threading.Event()
        self._emitter: Any = None
        self._info = PoolInfo(
            self.pool_id, spec.nodes, spec.slots_per_node, provider_names(provider),
            is_here=isinstance(provider, (Local, Dask)),
        )  # fmt: skip
        # Not where the cluster was joined: its scheduler does not know what to do with them.
        wants_page = spec.collect_metrics and not isinstance(provider, Dask)
        self._page_data = DashboardData(self._info) if wants_page else None
        self._there: dict[int, str] = {}  # nodes that are no cloud's, and the names of their machines
        self.output: Output = Output(self._instance_id, self.emit)
        self._machines = Machines(
            spec, provider, self.pool_id, stack=self._stack, over=self._over,
            emit=self.emit if isinstance(provider, tuple) else self._emit_here,
            is_up=lambda: self._is_up, end=self._end,
        )  # fmt: skip
        self.cluster: SkyCluster | None = None
        self.client: Client | None = None
        self.engine: Engine | None = None
        self._is_up = False
        self._console: Console | None = None
        self._why_moved = ""  # why the last scheduler was lost

    def __repr__(self) -> str:
        return f"<Session {self.pool_id}: {self._info}>"

    # --- events ---------------------------------------------------------------------------------------------

    def emit(self, event: Any) -> None:
        if self._emitter is not None:
            self._emitter.emit(event)
            if self._page_data is not None:
                self._page_data.hear(event)

    def _tell_error(self, error: BaseException) -> None:
        message, instance_id = str(error) or type(error).__name__, getattr(error, "instance_id", None)
        self.emit(events.Error(message=message, instance_id=instance_id))

    def _tell_progress(self, engine: Engine) -> None:
        """Let the engine tell of its progress, if anybody hears it."""
        if self._emitter.is_heard or self._page_data is not None:
            engine.progress.tell = self._progress

    def _progress(self, done: int, total: int | None, failed: int) -> None:
        self.emit(events.TaskProgress(done=done, total=total, failed=failed))

    def listen(self, callback: events.Callback) -> None:
        """Let `callback` hear of what happens from now on."""
        if self._emitter is None:
            self._callbacks.append(callback)
            return
        self._emitter.add(callback)
        if self.engine is not None:
            self._tell_progress(self.engine)

    def _open_listeners(self) -> Console:
        """Let all who want to hear of events do so from now on; return the console."""
        log = self._spec.logging
        display = "quiet" if log is not None and not log.console else self._spec.display
        console = open_console(display, self._info, prefix=log is None or log.prefix)
        self._stack.callback(console.close)
        listeners: list[events.Callback] = [*([console] if console.shows else []), *self._callbacks]
        if log is not None and log.file is not None:
            file = LogFile(log, self.pool_id)
            self._stack.callback(file.close)
            listeners.append(file)
        self._emitter = events.emitter(*listeners)
        return console

    # --- life -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring everything up. The caller also calls `stop`, whether or not this succeeds."""
        try:
            self._start()
        except Exception as exc:
            self._tell_error(exc)
            raise

    def _start(self) -> None:
        spec, stack = self._spec, self._stack
        console = self._open_listeners()
        stack.callback(unwind_on_termination())
        started = time.monotonic()
        self.cluster = cluster = self._machines.open()
        from skyward.cluster.joined import JoinedCluster, forget, prepare
        from skyward.engine import Engine
        from skyward.session.client import connect, disconnect
        from skyward.worker.runtime import LOG_TOPIC

        own = self._machines.cluster
        stack.callback(cluster.stop)
        joblib = threading.Thread(target=_register_joblib, name="skyward-joblib", daemon=True)
        joblib.start()  # meanwhile, because it takes a while too
        cluster.listener = self
        if self._over.is_set():
            raise PoolError("the pool was closed while it started")
        cluster.start()
        direct = not self._machines.are_remote
        self.client = client = connect(cluster, direct=direct)
        stack.callback(disconnect, client)
        self.emit(events.ClusterSetupCompleted())
        see_share, wait_for_worker = direct, None
        share = self._machines.share
        if isinstance(cluster, JoinedCluster):
            stack.callback(forget, client, cluster)
            see_share = prepare(
                client, cluster, share, spec.image.pip, timeout=spec.timeout, is_abandoned=self._over.is_set
            )
            wait_for_worker = functools.partial(cluster.wait_for_worker, client)
        accelerator = spec.accelerator
        self.engine = engine = Engine(
            client,
            cluster.slots,
            pool_id=self.pool_id,
            # A joined cluster promises nothing.
            expected=(lambda: own.expected) if own is not None else (lambda: 1),
            retries=spec.retries,
            alive=own.addresses if own is not None else None,
            was_reclaimed=own.was_reclaimed if own is not None else None,
            share=share if see_share else (),
            direct=direct,
            wait_for_worker=wait_for_worker,
            on_output=self.output.receive,
            accelerator=accelerator.name if accelerator else None,
            accelerators_per_node=accelerator.count if accelerator else 0,
            parts_per_node=spec.parts_per_node if own is not None else 1,
            included=[Path(path).name.partition(".")[0] for path in spec.image.include],
        )
        stack.callback(engine.close)
        if own is not None:
            own.demand = engine.demand
            own.busy = engine.busy
            own.ended = engine.ended
            client.is_kept = engine.is_value
        self._tell_progress(engine)
        engine.wait_ready()
        self._raise_limit(engine.slots)
        self.emit(events.TaskPoolInitCompleted(slots=engine.slots))
        client.subscribe_topic(LOG_TOPIC, lambda event: self.output.receive(event[1]))
        joblib.join()
        self._machines.note_running()
        watch_time(
            started, spec.timeout, spec.idle_timeout, idle_since=engine.idle_since, over=self._over, end=self._end
        )
        self._console = console
        console.link = str(cluster.dashboard_link)
        if self._page_data is not None:
            self._page_data.send = functools.partial(_send_page_data, client)
        self._is_up = True
        self.emit(events.PoolStarted())

    def abandon(self) -> None:
        """Let `start`, if it still runs in another thread, fail soon: launch nothing more and wait for no machine."""
        if not self._is_up:
            self._over.set()
            self._machines.abort(PoolError("the pool was closed while it started"))

    def stop(self, reason: BaseException) -> None:
        """End everything. Calls that have not ended fail with `reason`."""
        self._over.set()
        self._machines.close()
        try:
            if self.engine is not None:
                self.engine.tell_progress()
            self.emit(events.PoolStopping())
            if self.engine is not None:
                self.engine.fail(reason)
            for node in sorted(self._there):
                self.emit(events.InstanceStopping(instance_id=self._there[node]))
        finally:  # whatever Ctrl-C does
            self._stack.close()

    def forked(self, reason: BaseException) -> None:
        """Let go of everything, in a child that was forked: the parent goes on with it."""
        _left.append(self)  # so that nothing of it is finalized here
        if self.engine is not None:
            self.engine.forked(reason)
        if self.client is not None:
            self.client.status = "closed"  # or it would close what the parent uses when this process ends

    def _end(self, reason: Exception) -> None:
        if not self._over.is_set():
            self._tell_error(reason)
            self._on_end(reason)

    @property
    def cost(self) -> float:
        """What the pool has cost so far, in USD."""
        return self._machines.cost

    @property
    def loss(self) -> VolumeError | None:
        """What was written to volumes and could not be sent when machines ended; None: nothing."""
        return self._machines.loss

    # --- what the cluster tells -----------------------------------------------------------------------------

    def _instance_id(self, node: int) -> str:
        assert self.cluster is not None  # whose workers have printed
        return self.cluster.instance_id(node)

    def workers_changed(self) -> None:
        if self.engine is not None:
            self.engine.roster_changed()

    def scheduler_lost(self, why: str) -> None:
        if self.client is not None:
            self.client.lose_scheduler()
        if self.engine is not None:
            self.engine.scheduler_lost()
        self._why_moved = why

    async def scheduler_moved(self) -> None:
        if self.client is not None:
            await self.client.until_running()
        if self.engine is not None:
            self.engine.scheduler_moved()
        cluster = self._machines.cluster
        assert cluster is not None
        if self._console is not None:
            self._console.link = str(cluster.dashboard_link)
        node = cluster.kept_node
        self.emit(
            events.SchedulerMoved(node=node, instance_id=cluster.instance_id(node), reason=self._why_moved)
        )
        with contextlib.suppress(PoolError):  # the pool was ended from outside: it is told otherwise
            await asyncio.to_thread(self._machines.note_running)

    def cluster_lost(self, error: BaseException) -> None:
        if self.engine is not None:  # otherwise the start fails, and tells
            self._tell_error(error)
            self.engine.fail(error)

    def machine_failed(self, error: BaseException) -> None:
        self._tell_error(error)

    def worker_output(self, output: Any) -> None:
        self.output.receive(output)

    def _emit_here(self, event: Any) -> None:
        if isinstance(event, events.InstanceProvisioned):
            self._there[event.node] = event.instance_id
        self.emit(event)

    def _raise_limit(self, slots: int) -> None:
        """Make room for connections to so many new slots, where this process reaches them directly."""
        if not self._machines.are_remote and (problem := descriptors.raise_limit(slots * descriptors.CALLER_PER_SLOT)):
            logger.warning("this process %s", problem)

    def node_added(self, node: int, instance_id: str, machine: Machine | None) -> None:
        self._raise_limit(self._spec.slots_per_node)
        provider = machine.provider if machine is not None else provider_names(self._provider)
        self._emit_here(provisioned(node, instance_id, provider, machine))

    def node_left(self, node: int, instance_id: str) -> None:
        self._there.pop(node, None)
        self.emit(events.InstanceStopping(instance_id=instance_id))

    def node_lost(self, node: int, instance_id: str, why: str) -> None:
        self._there.pop(node, None)
        self.emit(events.InstanceLost(instance_id=instance_id, node=node, reason=why))

    def node_replaced(self, node: int, instance_id: str, replaced_id: str) -> None:
        self.emit(events.InstanceReplaced(instance_id=instance_id, node=node, replaced_id=replaced_id))

    def node_metrics(self, node: int, instance_id: str, metrics: dict[str, float]) -> None:
        self.emit(events.Metrics(instance_id=instance_id, node=node, **metrics))


def _send_page_data(client: Client, message: dict[str, Any]) -> None:
    from skyward.scheduler.page_data import PAGE_DATA

    def send() -> None:
        if client.status == "running":
            client._send_to_scheduler({"op": PAGE_DATA, **message})

    client.loop.add_callback(send)


def _register_joblib() -> None:
    """Make joblib know the name "skyward", without loading the backend before it is asked for."""
    from joblib.parallel import EXTERNAL_BACKENDS

    EXTERNAL_BACKENDS.setdefault("skyward", functools.partial(importlib.import_module, "skyward_joblib"))
