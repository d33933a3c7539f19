"""What an active pool holds: cluster, client, engine and timers, from entering the block to leaving it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import secrets
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client
from distributed.versions import VersionMismatchWarning

from skyward import events
from skyward.cluster import joined
from skyward.cluster.cluster import AgentCluster, SkyCluster
from skyward.cluster.joined import JoinedCluster
from skyward.cluster.local import local_cluster
from skyward.cluster.machines import machine_cluster
from skyward.cluster.record import Record
from skyward.cluster.slot import LOG_TOPIC
from skyward.console import Console
from skyward.engine import Engine
from skyward.errors import PoolTimeoutError
from skyward.logfile import LogFile
from skyward.providers.base import Machine
from skyward.providers.dask import Dask
from skyward.providers.local import Local
from skyward.providers.ssh import SSH
from skyward.termination import unwind_on_termination

if TYPE_CHECKING:
    from skyward.pool import ComputePool


class Session:
    """What an active pool holds: cluster, client, engine, timers. Made to be thrown away."""

    def __init__(self, pool: ComputePool) -> None:
        self.pool = pool
        self.pool_id = secrets.token_hex(4)
        self._stack = contextlib.ExitStack()
        self._over = threading.Event()
        self._emitter: Any = None
        self._record: Record | None = None
        self.cluster: SkyCluster
        self.client: Client
        self.engine: Engine

    def emit(self, event: Any) -> None:
        if self._emitter is not None:
            self._emitter.emit(event)

    def listen(self, callback: events.Callback) -> None:
        """Let `callback` hear of what happens from now on."""
        if self._emitter is not None:
            self._emitter.add(callback)

    def start(self) -> None:
        """Bring everything up. Whoever calls also calls `stop`, whether or not this succeeds."""
        pool, spec, stack = self.pool, self.pool.spec, self._stack
        log = spec.logging
        console = Console("quiet" if log is not None and not log.console else spec.display)
        listeners: list[events.Callback] = [console, *pool.callbacks()]
        if log is not None and log.file is not None:
            file = LogFile(log, self.pool_id)
            stack.callback(file.close)
            listeners.append(file)
        self._emitter = events.emitter(*listeners)
        stack.callback(unwind_on_termination())
        share = None
        if not isinstance(pool.provider, SSH):  # whose machines see no folder of this one
            share = _shared_folder(self.pool_id)
            stack.callback(shutil.rmtree, share, ignore_errors=True)
        started = time.monotonic()
        self.emit(events.InfraCreating())

        self.cluster = cluster = self._make_cluster(share)
        own = cluster if isinstance(cluster, AgentCluster) else None
        stack.callback(cluster.stop)
        joblib = threading.Thread(target=_register_joblib, name="skyward-joblib", daemon=True)
        joblib.start()  # meanwhile, because it takes a while too
        cluster.start()
        # Machines of a pool's own let nobody in but through the scheduler's tunnel.
        direct = self._record is None
        self.client = client = _connect(cluster, direct)
        stack.callback(client.close)
        see_share = direct
        if isinstance(cluster, JoinedCluster):
            stack.callback(joined.forget, client, cluster)
            assert share is not None
            see_share = joined.prepare(client, cluster, share, spec.image.pip)
        accelerator = spec.accelerator
        self.engine = engine = Engine(
            client,
            cluster.slots,
            pool_id=self.pool_id,
            # Somebody else's cluster promises nothing.
            expected=(lambda: own.expected) if own is not None else (lambda: 1),
            retries=spec.retries,
            share=share if see_share else None,
            direct=direct,
            cores_per_slot=own.cores_per_slot if own is not None else 1,
            accelerator=accelerator.name if accelerator else None,
            accelerators_per_node=accelerator.count if accelerator else 0,
        )
        stack.callback(engine.close)
        cluster.on_change = engine.roster_changed
        cluster.on_lost = self._lost
        if own is not None:
            own.demand = engine.demand
            own.on_node_lost = self._node_lost
            own.on_metrics = self._metrics
        engine.wait_ready()
        client.subscribe_topic(LOG_TOPIC, pool._receive_lines)
        joblib.join()
        if self._record is not None:
            self._record.running()
        self._watch(spec.timeout, spec.idle_timeout)
        self.emit(events.PoolStarted())
        console.ready(pool, str(cluster.dashboard_link), time.monotonic() - started)

    def _make_cluster(self, share: Path | None) -> SkyCluster:
        provider, spec = self.pool.provider, self.pool.spec
        match provider:
            case Dask():
                return joined.joined_cluster(provider, self.pool_id)
            case Local():
                assert share is not None
                return local_cluster(provider, spec, self.pool_id, share)
            case SSH():
                machines = provider.machines(spec.nodes)
                expires = time.time() + spec.timeout
                self._record = record = Record(self.pool_id, provider.name, expires, machines)
                self._stack.callback(record.close)

                def more(count: int, taken: Sequence[str]) -> list[Machine]:
                    found = provider.machines(count, taken)
                    record.add(found)
                    return found

                cluster = machine_cluster(machines, more, spec, self.pool_id, self.emit)
                record.left = cluster.left
                return cluster

    def stop(self, reason: BaseException) -> None:
        self._over.set()
        self.emit(events.PoolStopping())
        if hasattr(self, "engine"):
            self.engine.fail(reason)
        self._stack.close()

    def _lost(self, reason: BaseException) -> None:
        self.engine.fail(reason)

    def _node_lost(self, node: int, instance_id: str, why: str) -> None:
        self.emit(events.InstanceLost(instance_id=instance_id, node=node, reason=why))

    def _metrics(self, node: int, instance_id: str, figures: dict[str, float]) -> None:
        self.emit(events.Metrics(instance_id=instance_id, node=node, **figures))

    def _watch(self, timeout: float, idle_timeout: float | None) -> None:
        def watch() -> None:
            deadline = time.monotonic() + timeout
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
                reason = PoolTimeoutError(
                    f"the pool's {what} of {seconds:g} s has passed: its machines were destroyed and calls that had "
                    f"not finished are lost. Raise {what}=, or enter the pool again."
                )
                if self.pool._session is self:
                    self.pool._stop(reason)
                return

        threading.Thread(target=watch, name="skyward-timeout", daemon=True).start()


_filtering = threading.Lock()  # `catch_warnings` is for one thread at a time


def _connect(cluster: SkyCluster, direct: bool) -> Client:
    with _filtering, warnings.catch_warnings():
        if not isinstance(cluster, JoinedCluster):
            # What has to be the same on both sides is pinned; Dask also tells of packages that nobody asked for there.
            warnings.simplefilter("ignore", VersionMismatchWarning)
        client = Client.__new__(Client)
        try:
            # Not the default client: that is for the caller to choose.
            client.__init__(cluster, set_as_default=False, direct_to_workers=direct)
        except BaseException:
            # Ctrl-C as a rule. Left to the garbage collector, it would wait for an event loop that has ended by then.
            with contextlib.suppress(Exception):
                client.close(timeout=2)
            client.status = "closed"
            raise
        return client


def _register_joblib() -> None:
    """Make joblib know the name "skyward", without loading the backend before it is asked for."""
    from joblib.parallel import EXTERNAL_BACKENDS

    EXTERNAL_BACKENDS.setdefault("skyward", functools.partial(importlib.import_module, "skyward_joblib"))


def _shared_folder(pool_id: str) -> Path:
    """Make the folder for large arguments: in memory where the system offers that, readable by this user only."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() else None
    return Path(tempfile.mkdtemp(prefix=f"skyward-{pool_id}-", dir=parent))
