"""What an active pool holds: cluster, client, engine and timers, from entering the block to leaving it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import secrets
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyward import events
from skyward.cleanup.signals import unwind_on_termination
from skyward.console import Console, PoolInfo, open_console
from skyward.console.dashboard import DashboardData
from skyward.console.logfile import LogFile
from skyward.console.output import Output
from skyward.errors import PoolBudgetError, PoolError, PoolTimeoutError, VolumeError
from skyward.providers.base import Cloud, Machine
from skyward.providers.dask import Dask
from skyward.providers.local import Local
from skyward.providers.ssh import SSH

# Dask and what needs it is imported where it is used: a local pool's agent starts meanwhile.
if TYPE_CHECKING:
    from distributed import Client

    from skyward.cleanup.pool_record import PoolRecord
    from skyward.cluster.base import SkyCluster
    from skyward.cluster.cluster import AgentCluster
    from skyward.engine import Engine
    from skyward.launch.provisioner import Provisioner
    from skyward.pool import ComputePool


_LOOK_AT_COST_S = 1.0
_TELL_COST_S = 30.0

_left: list[Session] = []
"""Sessions of the parent, in a process that was forked."""


class Session:
    """What an active pool holds: cluster, client, engine, timers. Made to be thrown away."""

    def __init__(self, pool: ComputePool) -> None:
        self.pool = pool
        self.pool_id = secrets.token_hex(4)
        self._stack = contextlib.ExitStack()
        self._over = threading.Event()
        self._emitter: Any = None
        self._info = PoolInfo(
            self.pool_id, pool.spec.nodes, pool.spec.slots_per_node, pool._where,
            is_here=isinstance(pool.provider, (Local, Dask)),
        )  # fmt: skip
        # Not where the cluster was joined: its scheduler does not know what to do with them.
        wants_figures = pool.spec.collect_metrics and not isinstance(pool.provider, Dask)
        self._figures = DashboardData(self._info) if wants_figures else None
        self._there: dict[int, str] = {}  # nodes that are no cloud's, and the names of their machines
        self.output = Output(lambda node: self.cluster.instance_id(node), self.emit)
        self._record: PoolRecord | None = None
        self._provisioner: Provisioner | None = None
        self._expires = time.time() + pool.spec.timeout
        self.cluster: SkyCluster
        self.client: Client
        self.engine: Engine

    def __repr__(self) -> str:
        return f"<Session {self.pool_id}: {self._info}>"

    def emit(self, event: Any) -> None:
        if self._emitter is not None:
            self._emitter.emit(event)
            if self._figures is not None:
                self._figures.hear(event)

    def _tell_error(self, error: BaseException) -> None:
        message, instance_id = str(error) or type(error).__name__, getattr(error, "instance_id", None)
        self.emit(events.Error(message=message, instance_id=instance_id))

    def _want_progress(self) -> None:
        """Let the engine tell of its progress, if anybody hears it."""
        if hasattr(self, "engine") and (self._emitter.is_heard or self._figures is not None):
            self.engine.progress.tell = self._progress

    def _progress(self, done: int, total: int | None, failed: int) -> None:
        self.emit(events.TaskProgress(done=done, total=total, failed=failed))

    def listen(self, callback: events.Callback) -> None:
        """Let `callback` hear of what happens from now on."""
        if self._emitter is not None:
            self._emitter.add(callback)
            self._want_progress()

    def start(self) -> None:
        """Bring everything up. Whoever calls also calls `stop`, whether or not this succeeds."""
        try:
            self._start()
        except Exception as exc:
            self._tell_error(exc)
            raise

    def _start(self) -> None:
        pool, spec, stack = self.pool, self.pool.spec, self._stack
        console = self._open_listeners()
        stack.callback(unwind_on_termination())
        share: list[Path] = []
        if isinstance(pool.provider, (Local, Dask)):  # other machines see no folder of this one
            share = _shared_folders(self.pool_id)
            for folder in share:
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if isinstance(pool.provider, Local):
            from skyward.cleanup import journal

            stack.callback(journal.close, self.pool_id)  # what `_note` opens, after all else has ended
        started = time.monotonic()
        self.emit(events.InfraCreating())

        self.cluster = cluster = self._make_cluster(share)
        from skyward.cluster import joined
        from skyward.cluster.cluster import AgentCluster
        from skyward.engine import Engine
        from skyward.worker.preload import LOG_TOPIC

        own = cluster if isinstance(cluster, AgentCluster) else None
        stack.callback(cluster.stop)
        joblib = threading.Thread(target=_register_joblib, name="skyward-joblib", daemon=True)
        joblib.start()  # meanwhile, because it takes a while too
        if own is not None:
            own.on_node_added = self._node_added
            own.on_node_left = self._node_left
            own.on_node_lost = self._node_lost
            own.on_node_replaced = self._node_replaced
            own.on_start_error = self._tell_error
            own.on_metrics = self._metrics
            own.on_output = self.output.receive
        if self._over.is_set():
            raise PoolError("the pool was closed while it started")
        cluster.start()
        # Machines of a pool's own let nobody in but through the scheduler's tunnel.
        direct = self._record is None
        self.client = client = _connect(cluster, direct)
        stack.callback(_disconnect, client)
        self.emit(events.ClusterSetupCompleted())
        see_share, wait_for_worker = direct, None
        if isinstance(cluster, joined.JoinedCluster):
            stack.callback(joined.forget, client, cluster)
            see_share = joined.prepare(
                client, cluster, share, spec.image.pip, timeout=spec.timeout, is_abandoned=self._over.is_set
            )
            wait_for_worker = functools.partial(cluster.wait_for_worker, client)
        accelerator = spec.accelerator
        self.engine = engine = Engine(
            client,
            cluster.slots,
            pool_id=self.pool_id,
            # Somebody else's cluster promises nothing.
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
        cluster.on_change = engine.roster_changed
        cluster.on_lost = self._lost
        if own is not None:
            own.demand = engine.demand
            own.busy = engine.busy
        self._want_progress()
        engine.wait_ready()
        self.emit(events.TaskPoolInitCompleted(slots=engine.slots))
        client.subscribe_topic(LOG_TOPIC, lambda event: self.output.receive(event[1]))
        joblib.join()
        if own is not None:
            self._note(own)
        self._watch(started + spec.timeout, spec.idle_timeout)
        console.link = str(cluster.dashboard_link)
        if self._figures is not None:
            self._figures.send = self._send_figures
        self.emit(events.PoolStarted())

    def _send_figures(self, message: dict[str, Any]) -> None:
        from skyward.scheduler.page_data import FIGURES

        def send() -> None:
            if self.client.status == "running":
                self.client._send_to_scheduler({"op": FIGURES, **message})

        self.client.loop.add_callback(send)

    def _open_listeners(self) -> Console:
        """Let all who want to hear of events do so from now on; return the console."""
        pool, spec, log = self.pool, self.pool.spec, self.pool.spec.logging
        display = "quiet" if log is not None and not log.console else spec.display
        console = open_console(display, self._info, prefix=log is None or log.prefix)
        self._stack.callback(console.close)
        listeners: list[events.Callback] = [*([console] if console.shows else []), *pool.callbacks()]
        if log is not None and log.file is not None:
            file = LogFile(log, self.pool_id)
            self._stack.callback(file.close)
            listeners.append(file)
        self._emitter = events.emitter(*listeners)
        return console

    def _note(self, cluster: AgentCluster) -> None:
        """Put on record that the pool is up."""
        from skyward.cleanup.pool_record import note_local

        if self._record is not None:
            self._record.running(cluster.dashboard_port)
        else:
            note_local(
                self.pool_id, expires=self._expires, folder=cluster.folder, dashboard_port=cluster.dashboard_port
            )

    def _make_cluster(self, share: Sequence[Path]) -> SkyCluster:
        provider, spec = self.pool.provider, self.pool.spec
        match provider:
            case Dask():
                from skyward.cluster import joined

                return joined.joined_cluster(provider, self.pool_id)
            case Local():
                from skyward.cluster.local import local_cluster

                return local_cluster(provider, spec, self.pool_id, share, self._emit_here)
            case SSH():
                from skyward.cleanup.pool_record import PoolRecord
                from skyward.cluster.machines import machine_cluster

                machines = provider.machines(spec.nodes)
                self._record = record = PoolRecord(self.pool_id, provider.name, self._expires, machines)
                self._stack.callback(record.close)
                for node, machine in enumerate(machines):
                    self._node_added(node, machine.id, machine)
                self.emit(events.ProvisioningCompleted())
                hosts = _Hosts(provider, record)
                cluster = machine_cluster(machines, hosts, spec, self.pool_id, self.emit, expires=self._expires)
                record.left = cluster.left
                return cluster
            case tuple():
                return self._launch_cluster(provider)

    def _launch_cluster(self, clouds: tuple[Cloud, ...]) -> AgentCluster:
        from skyward import paths
        from skyward.cleanup import guardian
        from skyward.cleanup.pool_record import PoolRecord
        from skyward.cluster.machines import machine_cluster
        from skyward.launch.plan import make_plan
        from skyward.launch.provisioner import Provisioner
        from skyward.scripts.volumes import buckets
        from skyward.spec.volume import S3Volume

        spec = self.pool.spec
        plan = make_plan(clouds, spec)
        names = " or ".join(dict.fromkeys(cloud.name for cloud in clouds))
        written = buckets([volume for volume in spec.volume if isinstance(volume, S3Volume)])
        self._record = record = PoolRecord(self.pool_id, names, self._expires, volumes=written)
        self._provisioner = provisioner = Provisioner(plan, spec, self.pool_id, record, self.emit, self._expires)

        def end() -> None:
            try:
                if self._has_unsent():
                    # Ctrl-C, or the like, while data was being sent: nobody waits for it here, but it is not given up.
                    record.left = ["data is still being sent"]
                    self._tell_error(
                        PoolError(
                            "interrupted while machines were sending what was written to "
                            f"{', '.join(written)}: the pool's guardian goes on, and destroys them afterwards. "
                            f"`skyward ps` shows pool {self.pool_id} until then; its log is "
                            f"{paths.data_folder() / guardian.LOG}"
                        )
                    )
                    return
                record.left = provisioner.end()
                self.emit(provisioner.final_cost())
            except BaseException:  # Ctrl-C, a second time: the guardian does it
                record.left = ["not confirmed"]
                raise
            finally:
                record.close()

        self._stack.callback(end)
        if self._over.is_set():  # abandoned before there was anything to close
            provisioner.close()
        self._watch_cost(provisioner)
        machines = provisioner.launch()
        return machine_cluster(machines, provisioner, spec, self.pool_id, self.emit, expires=self._expires)

    def abandon(self) -> None:
        """Let `start`, which runs in another thread, fail soon: launch nothing more and wait for no machine."""
        from skyward.cluster.cluster import AgentCluster

        self._over.set()
        if self._provisioner is not None:
            self._provisioner.close()
        if isinstance(cluster := getattr(self, "cluster", None), AgentCluster):
            cluster.abort(PoolError("the pool was closed while it started"))

    def stop(self, reason: BaseException) -> None:
        self._over.set()
        if self._provisioner is not None:
            self._provisioner.close()
        try:
            if hasattr(self, "engine"):
                self.engine.tell_progress()
            self.emit(events.PoolStopping())
            if hasattr(self, "engine"):
                self.engine.fail(reason)
            for node in sorted(self._there):
                self.emit(events.InstanceStopping(instance_id=self._there[node]))
        finally:  # whatever Ctrl-C does
            self._stack.close()

    def forked(self, reason: BaseException) -> None:
        """Let go of everything, in a child that was forked: the parent goes on with it."""
        _left.append(self)  # so that nothing of it is finalized here
        if hasattr(self, "engine"):
            self.engine.forked(reason)
        if hasattr(self, "client"):
            self.client.status = "closed"  # or it would close what the parent uses when this process ends

    def _has_unsent(self) -> bool:
        cluster: Any = getattr(self, "cluster", None)
        return bool(getattr(cluster, "has_unsent", False))

    @property
    def loss(self) -> VolumeError | None:
        """What was written to volumes and could not be sent when machines ended; None: nothing."""
        losses: list[VolumeError] = getattr(getattr(self, "cluster", None), "losses", [])
        if len(losses) < 2:
            return losses[0] if losses else None
        return VolumeError("\n".join(map(str, losses)), **losses[0].__dict__)

    def _lost(self, reason: BaseException) -> None:
        self._tell_error(reason)
        self.engine.fail(reason)

    def _emit_here(self, event: Any) -> None:
        if isinstance(event, events.InstanceProvisioned):
            self._there[event.node] = event.instance_id
        self.emit(event)

    def _node_added(self, node: int, instance_id: str, machine: Machine | None) -> None:
        host = machine.login.host if machine is not None else None
        provider = machine.provider if machine is not None else self.pool._where
        self._emit_here(
            events.InstanceProvisioned(instance_id=instance_id, node=node, spot=False, provider=provider, ip=host)
        )

    def _node_left(self, node: int, instance_id: str) -> None:
        self._there.pop(node, None)
        self.emit(events.InstanceStopping(instance_id=instance_id))

    def _node_lost(self, node: int, instance_id: str, why: str) -> None:
        self._there.pop(node, None)
        self.emit(events.InstanceLost(instance_id=instance_id, node=node, reason=why))

    def _node_replaced(self, node: int, instance_id: str, replaced_id: str) -> None:
        self.emit(events.InstanceReplaced(instance_id=instance_id, node=node, replaced_id=replaced_id))

    def _metrics(self, node: int, instance_id: str, figures: dict[str, float]) -> None:
        self.emit(events.Metrics(instance_id=instance_id, node=node, **figures))

    def _watch(self, deadline: float, idle_timeout: float | None) -> None:
        timeout = self.pool.spec.timeout

        def watch() -> None:
            while True:
                limit = deadline
                if idle_timeout is not None:
                    limit = min(limit, self.engine.idle_since() + idle_timeout)
                left = limit - time.monotonic()
                if left > 0:
                    if self._over.wait(left):
                        return
                    continue
                what = "timeout" if limit == deadline else "idle_timeout"
                seconds = timeout if limit == deadline else idle_timeout
                self._end_pool(
                    PoolTimeoutError(
                        f"the pool's {what} of {seconds:g} s has passed: its machines were destroyed and calls that "
                        f"had not finished are lost. Raise {what}=, or enter the pool again."
                    )
                )
                return

        threading.Thread(target=watch, name="skyward-timeout", daemon=True).start()

    def _end_pool(self, reason: BaseException) -> None:
        if self.pool._session is self:
            self._tell_error(reason)
            self.pool._stop(reason)

    def cost(self) -> float:
        """Return what the pool has cost so far, in USD."""
        return self._provisioner.cost().accumulated_cost if self._provisioner is not None else 0.0

    def _watch_cost(self, provisioner: Provisioner) -> None:
        """Tell of the cost now and then, and end the pool, or its start, when it has cost what it may."""
        most = self.pool.spec.max_cost

        def watch() -> None:
            tell_at = 0.0
            while not self._over.wait(_LOOK_AT_COST_S):
                cost = provisioner.cost()
                if time.monotonic() >= tell_at and cost.elapsed_seconds:
                    self.emit(cost)
                    tell_at = time.monotonic() + _TELL_COST_S
                if most is None or cost.accumulated_cost < most:
                    continue
                text = f"the pool has cost {cost.accumulated_cost:.4f} USD, and max_cost is {most:g}: its machines were"
                if hasattr(self, "engine"):
                    self._end_pool(
                        PoolBudgetError(f"{text} destroyed and calls that had not finished are lost. Raise max_cost=")
                    )
                    return
                error = PoolBudgetError(f"{text} destroyed before they were ready. Raise max_cost=")
                provisioner.close(error)
                if hasattr(self, "cluster"):
                    self.cluster.abort(error)

        threading.Thread(target=watch, name="skyward-cost", daemon=True).start()


class _Hosts:
    """Hosts that are there already, as where a cluster's machines come from."""

    def __init__(self, provider: SSH, record: PoolRecord) -> None:
        self._provider = provider
        self._record = record

    def more(self, nodes: Sequence[int], taken: Sequence[str]) -> list[Machine]:
        found = self._provider.machines(len(nodes), taken)
        self._record.add(found)
        self._record.number(found, nodes)
        return found

    def gone(self, machines: Sequence[Machine]) -> tuple[()]:  # noqa: ARG002 - nobody can be asked
        return ()

    def discard(self, machine: Machine) -> None:
        """Leave it: it is the user's."""


_MOST_CHUNKS = 16_384
"""Chunks that may be on their way at once, each with its own connection: two for each of many thousand slots."""
_filtering = threading.Lock()  # `catch_warnings` is for one thread at a time


def _connect(cluster: SkyCluster, direct: bool) -> Client:
    from distributed import Client
    from distributed.versions import VersionMismatchWarning

    from skyward.cluster.joined import JoinedCluster

    with _filtering, warnings.catch_warnings():
        if not isinstance(cluster, JoinedCluster):
            # What has to be the same on both sides is pinned; Dask also tells of packages that nobody asked for there.
            warnings.simplefilter("ignore", VersionMismatchWarning)
        client = Client.__new__(Client)
        try:
            # Not the default client: that is for the caller to choose.
            client.__init__(
                cluster, set_as_default=False, direct_to_workers=direct, connection_limit=_MOST_CHUNKS
            )
        except BaseException:
            # Usually Ctrl-C. Left to the garbage collector, it would wait for an event loop that has ended by then.
            with contextlib.suppress(Exception):
                client.close(timeout=2)
            client.status = "closed"
            raise
        return client


def _disconnect(client: Client) -> None:
    log = logging.getLogger("distributed.client")
    log.addFilter(_is_no_search)
    try:
        client.close()
    finally:
        log.removeFilter(_is_no_search)


def _is_no_search(record: logging.LogRecord) -> bool:
    """Refuse what a client logs when it is closed while it looks for a scheduler that is gone: errors, to Dask."""
    is_cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not is_cancelled and not str(record.msg).startswith("Failed to reconnect")


def _register_joblib() -> None:
    """Make joblib know the name "skyward", without loading the backend before it is asked for."""
    from joblib.parallel import EXTERNAL_BACKENDS

    EXTERNAL_BACKENDS.setdefault("skyward", functools.partial(importlib.import_module, "skyward_joblib"))


def _shared_folders(pool_id: str) -> list[Path]:
    """Make the folders for large arguments, readable by this user only: in memory if possible, and on disk."""
    folders = []
    with contextlib.suppress(OSError):  # there is none, or it is full or read-only
        folders.append(tempfile.mkdtemp(prefix=f"skyward-{pool_id}-", dir="/dev/shm"))
    folders.append(tempfile.mkdtemp(prefix=f"skyward-{pool_id}-"))
    return [Path(folder) for folder in folders]
