"""The machines of a pool: from their provider to a Dask cluster, with their record in the journal and their cost."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyward import events
from skyward.errors import PoolError, VolumeError
from skyward.providers import Resolved, provider_names
from skyward.providers.base import Cloud, Machine
from skyward.providers.dask import Dask
from skyward.providers.local import Local
from skyward.providers.ssh import SSH
from skyward.session.limits import watch_cost
from skyward.spec.pool import PoolSpec

# Dask and what needs it is imported where it is used: a local pool's agent starts meanwhile.
if TYPE_CHECKING:
    from skyward.cleanup.pool_record import PoolRecord
    from skyward.cluster.base import SkyCluster
    from skyward.cluster.cluster import AgentCluster
    from skyward.launch.provisioner import Provisioner


class Machines:
    """The machines of one run of a pool. `open` brings them up; closing its stack ends them.

    Parameters
    ----------
    stack
        Gets what `open` has to undo.
    over
        Set when the pool ends.
    emit
        Hears of what happens.
    is_up, end
        Whether the pool has started, and what ends it when it has cost `max_cost`.
    """

    def __init__(
        self,
        spec: PoolSpec,
        provider: Resolved,
        pool_id: str,
        *,
        stack: contextlib.ExitStack,
        over: threading.Event,
        emit: Callable[[Any], None],
        is_up: Callable[[], bool],
        end: Callable[[Exception], None],
    ) -> None:
        self._spec = spec
        self._provider = provider
        self._pool_id = pool_id
        self._stack = stack
        self._over = over
        self._emit = emit
        self._is_up = is_up
        self._end = end
        self._expires = time.time() + spec.timeout
        self._record: PoolRecord | None = None
        self._provisioner: Provisioner | None = None
        self.cluster: AgentCluster | None = None  # None until there is one, and where one is joined
        self.share: list[Path] = []  # folders for large arguments, which caller and workers may both see

    @property
    def are_remote(self) -> bool:
        """Whether they are reached only through the scheduler's tunnel."""
        return self._record is not None

    def open(self) -> SkyCluster:
        """Return the cluster, not yet started; of a cloud, the machines are launched."""
        provider = self._provider
        if isinstance(provider, (Local, Dask)):  # other machines see no folder of this one
            self.share = _shared_folders(self._pool_id)
            for folder in self.share:
                self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        self._emit(events.InfraCreating())
        if isinstance(provider, Dask):
            from skyward.cluster.joined import joined_cluster

            return joined_cluster(provider, self._pool_id)
        self.cluster = self._open(provider)
        return self.cluster

    def _open(self, provider: Local | SSH | tuple[Cloud, ...]) -> AgentCluster:
        match provider:
            case Local():
                from skyward.cleanup import journal
                from skyward.cluster.local import local_cluster

                self._stack.callback(journal.close, self._pool_id)  # what `note_running` opens, after all else
                return local_cluster(provider, self._spec, self._pool_id, self.share, self._emit)
            case SSH():
                return self._open_hosts(provider)
            case tuple():
                return self._launch(provider)

    def _open_hosts(self, provider: SSH) -> AgentCluster:
        from skyward.cleanup.pool_record import PoolRecord
        from skyward.cluster.machines import environment, machine_cluster

        recipe = environment(self._spec)  # raises before a host is used
        machines = provider.machines(self._spec.nodes)
        self._record = record = PoolRecord(self._pool_id, provider.name, self._expires, machines)
        self._stack.callback(record.close)
        for node, machine in enumerate(machines):
            self._emit(provisioned(node, machine.id, machine.provider, machine))
        self._emit(events.ProvisioningCompleted())
        hosts = _Hosts(provider, record)
        cluster = machine_cluster(
            machines, hosts, self._spec, self._pool_id, self._emit, recipe=recipe, expires=self._expires
        )
        record.left = cluster.left
        return cluster

    def _launch(self, clouds: tuple[Cloud, ...]) -> AgentCluster:
        from skyward.cleanup.pool_record import PoolRecord
        from skyward.cluster.machines import environment, machine_cluster
        from skyward.launch.plan import make_plan
        from skyward.launch.provisioner import Provisioner
        from skyward.scripts.volumes import buckets
        from skyward.spec.volume import S3Volume

        spec, pool_id, emit = self._spec, self._pool_id, self._emit
        recipe = environment(spec)  # raises before a machine is launched
        plan = make_plan(clouds, spec)
        written = buckets([volume for volume in spec.volume if isinstance(volume, S3Volume)])
        self._record = record = PoolRecord(pool_id, provider_names(clouds), self._expires, volumes=written)
        self._provisioner = provisioner = Provisioner(plan, spec, pool_id, record, emit, self._expires)
        self._stack.callback(self._end_launched, provisioner, record, list(written))
        if self._over.is_set():  # aborted before there was anything to close
            provisioner.close()
        watch_cost(
            provisioner.cost, spec.max_cost,
            over=self._over, emit=emit, is_up=self._is_up, end=self._end, abort=self.abort,
        )  # fmt: skip
        machines = provisioner.launch()
        return machine_cluster(machines, provisioner, spec, pool_id, emit, recipe=recipe, expires=self._expires)

    def _end_launched(self, provisioner: Provisioner, record: PoolRecord, mounts: Sequence[str]) -> None:
        try:
            if self.cluster is not None and self.cluster.has_unsent:
                # Ctrl-C, or the like, while data was being sent: the guardian continues.
                record.left = ["data is still being sent"]
                self._emit(events.Error(message=str(_still_sending(self._pool_id, mounts))))
                return
            record.left = provisioner.end()
            self._emit(provisioner.final_cost())
        except BaseException:  # Ctrl-C, a second time: the guardian does it
            record.left = ["not confirmed"]
            raise
        finally:
            record.close()

    def note_running(self) -> None:
        """Note in the journal that the pool is up, and where its scheduler is. A joined cluster is not in it."""
        from skyward.cleanup.pool_record import note_local

        if self.cluster is None:
            return
        port = self.cluster.dashboard_port
        if self._record is not None:
            self._record.running(port, self.cluster.kept_node)
        else:
            note_local(self._pool_id, expires=self._expires, folder=self.cluster.folder, dashboard_port=port)

    def close(self) -> None:
        """Launch nothing more."""
        if self._provisioner is not None:
            self._provisioner.close()

    def abort(self, error: Exception) -> None:
        """Let `open` or the cluster's start, which run in another thread, fail soon with `error`."""
        if self._provisioner is not None:
            self._provisioner.close(error)
        if self.cluster is not None:
            self.cluster.abort(error)

    @property
    def cost(self) -> float:
        """What they have cost so far, in USD."""
        return self._provisioner.cost().accumulated_cost if self._provisioner is not None else 0.0

    @property
    def loss(self) -> VolumeError | None:
        """What was written to volumes and could not be sent when machines ended; None: nothing."""
        losses = self.cluster.losses if self.cluster is not None else []
        if len(losses) < 2:
            return losses[0] if losses else None
        return VolumeError("\n".join(map(str, losses)), **losses[0].__dict__)


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


def provisioned(node: int, instance_id: str, provider: str, machine: Machine | None) -> events.InstanceProvisioned:
    """Return the event of a machine that no cloud has launched; `machine` is None for one that is this host."""
    host = machine.login.host if machine is not None else None
    return events.InstanceProvisioned(instance_id=instance_id, node=node, spot=False, provider=provider, ip=host)


def _still_sending(pool_id: str, mounts: Sequence[str]) -> PoolError:
    from skyward import paths
    from skyward.cleanup import guardian

    return PoolError(
        f"interrupted while machines were uploading data from {', '.join(mounts)}: the pool's guardian continues "
        f"the upload and then destroys them. `skyward ps` shows pool {pool_id} until then; its log is "
        f"{paths.data_folder() / guardian.LOG}"
    )


def _shared_folders(pool_id: str) -> list[Path]:
    """Make the folders for large arguments, readable by this user only: in memory if possible, and on disk."""
    folders = []
    with contextlib.suppress(OSError):  # there is none, or it is full or read-only
        folders.append(tempfile.mkdtemp(prefix=f"skyward-{pool_id}-", dir="/dev/shm"))
    folders.append(tempfile.mkdtemp(prefix=f"skyward-{pool_id}-"))
    return [Path(folder) for folder in folders]
