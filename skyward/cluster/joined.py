"""Join a Dask cluster that exists already, after checking that its workers can run our calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import distributed
from distributed.core import Status
from distributed.objects import SchedulerInfo

from skyward.cluster.base import SkyCluster
from skyward.cluster.requirements import parsed
from skyward.errors import PoolError, PoolTimeoutError, VersionMismatchError
from skyward.providers.dask import Dask
from skyward.scheduler.barrier import barrier_plugin, remove_barrier
from skyward.transfer.wire import Slot, barrier_handler
from skyward.version import __version__

logger = logging.getLogger(__name__)

TELL_S = 5.0
"""Seconds without a worker after which the user is told. A cluster on this machine scales up within 2."""


class JoinedCluster(SkyCluster):
    """Somebody else's Dask cluster: nodes are its hosts, slots its worker threads. Closing leaves it as it was."""

    _supports_scaling = False

    def __init__(self, name: str, address: str, security: Any) -> None:
        super().__init__(name, security)
        self._address = address
        self.hears: threading.Event = threading.Event()  # set by the first entry of the scheduler's event log
        self.has_dashboard.set()  # or it never will have one

    def start(self) -> None:
        try:
            self._open_rpc(self._address)
            self.sync(self.refresh)
        except OSError as exc:
            self.stop()
            raise PoolError(f"no Dask scheduler answers at {self._address}: {exc}") from exc
        except BaseException:
            self.stop()
            raise
        self.status = Status.running

    async def refresh(self) -> None:
        """Ask the scheduler for its workers.

        Not through the subscription that Dask's own cluster objects use: a scheduler has room for one subscriber,
        and that is up to the cluster's owner.
        """
        self.scheduler_info: SchedulerInfo = SchedulerInfo(await self.scheduler_comm.identity(n_workers=-1))
        self.changed.set()
        self.listener.workers_changed()

    async def heard(self, _: tuple[float, Any]) -> None:
        """Take note that a worker has come or gone."""
        self.hears.set()
        await self.refresh()

    def slots(self) -> list[Slot]:
        workers = self.scheduler_info["workers"]
        hosts = sorted({w["host"] for w in workers.values()})
        counts = dict.fromkeys(hosts, 0)
        found = []
        for address in sorted(workers, key=lambda a: (str(workers[a]["name"]).zfill(8), a)):
            host = workers[address]["host"]
            found.append(Slot(address, hosts.index(host), counts[host], workers[address]["nthreads"]))
            counts[host] += 1
        return sorted(found, key=lambda s: (s.node, s.number))

    async def wait_for_worker(self, client: Any, is_over: Callable[[], bool]) -> Any:
        """Wait until `is_over`, with a task that needs a worker: a cluster that scales by demand starts one for it.

        Returns the task's future. While it is held, Dask's `adapt` does not end the last worker.
        """
        probe = client.submit(int, key=f"skyward-wait-{secrets.token_hex(8)}", pure=False)
        tell = asyncio.get_running_loop().call_later(
            TELL_S,
            logger.warning,
            "waiting for the first worker of the Dask cluster at %s; if it does not scale by demand, start one where "
            "it was made, e.g. with cluster.scale(1)",
            self.scheduler_address,
        )
        try:
            while not is_over() and not probe.cancelled():  # it is when the cluster has ended
                await asyncio.sleep(0.05)
                with contextlib.suppress(OSError):
                    await self.refresh()
        finally:
            tell.cancel()
        return probe

    def scale(self, n: int) -> None:
        raise PoolError(f"can't scale a joined cluster to {n} nodes: scale it where it was created")

    def adapt(self, **_: Any) -> Any:
        raise PoolError("can't adapt a joined cluster: adapt it where it was created")


def joined_cluster(provider: Dask, pool_id: str) -> JoinedCluster:
    return JoinedCluster(pool_id, provider.address(), provider.credentials())


def prepare(
    client: Any,
    cluster: JoinedCluster,
    share: Sequence[Path],
    requirements: Sequence[str] = (),
    *,
    timeout: float,
    is_abandoned: Callable[[], bool],
) -> bool:
    """Check versions, add the barrier, and tell whether all workers see the folders `share`.

    `requirements` are the packages that the workers must have, as pip takes them. If there is no worker, wait up to
    `timeout` seconds for one, or until `is_abandoned` returns true.

    Raises
    ------
    PoolTimeoutError
        The cluster has no worker after `timeout` seconds.
    PoolError
        The cluster ended, or the pool was closed, during that wait.
    VersionMismatchError
        A worker lacks skyward or a requirement, or has another Python; the message is a table.
    """
    kept = None if cluster.slots() else _wait_for_worker(client, cluster, timeout, is_abandoned)
    token = secrets.token_hex(8)
    tokens = [folder / token for folder in share]
    for path in tokens:
        path.touch()
    # A function made here travels by value, so it runs on a worker that has no skyward.
    named = filter(None, map(parsed, requirements))
    wanted = [r for r in named if r.marker is None or r.marker.evaluate()]
    answers = client.run(_make_probe(), list(map(str, tokens)), [r.name for r in wanted])
    for path in tokens:
        path.unlink()
    rows = [
        (package, here, str(there.get(package) or "missing"))
        for package, here in _versions().items()
        for there in answers.values()
        if not _fits(package, here, there.get(package))
    ]
    rows += [
        (r.name, str(r.specifier) or "any", there[r.name] or "missing")
        for r in wanted
        for there in answers.values()
        if there[r.name] is None or not r.specifier.contains(there[r.name], prereleases=True)
    ]
    if rows:
        table = "\n".join(f"  {p:<12} {h:<12} {t}" for p, h, t in dict.fromkeys(rows))
        raise VersionMismatchError(
            f"the workers at {cluster.scheduler_address} can't run this pool's calls:\n"
            f"  {'package':<12} {'here':<12} there\n{table}\n"
            "Install the versions under 'here' on the workers, or those under 'there' here.",
            table=tuple(dict.fromkeys(rows)),
        )
    client.register_plugin(barrier_plugin(cluster.name))
    topic = barrier_handler(cluster.name)
    client.subscribe_topic(topic, cluster.heard)
    while not cluster.hears.wait(0.01):  # the subscription is sent by another way than requests, which may be faster
        client.log_event(topic, {})
    cluster.sync(cluster.refresh)  # what changed before the subscription
    del kept  # until here, so that the worker stays
    return all(there["share"] for there in answers.values())


def _wait_for_worker(
    client: Any, cluster: JoinedCluster, timeout: float, is_abandoned: Callable[[], bool]
) -> Any:
    def is_over() -> bool:
        return bool(cluster.slots()) or is_abandoned()

    try:
        probe = client.sync(cluster.wait_for_worker, client, is_over, callback_timeout=timeout)
    except TimeoutError:
        raise PoolTimeoutError(
            f"the Dask cluster at {cluster.scheduler_address} had no worker within the pool's timeout of {timeout:g} "
            "s. Start a worker there, or raise timeout="
        ) from None
    if is_abandoned():
        raise PoolError("the pool was closed while it started")
    if not cluster.slots():
        raise PoolError(f"the Dask cluster at {cluster.scheduler_address} ended before it had a worker")
    return probe


def forget(client: Any, cluster: JoinedCluster) -> None:
    """Undo what `prepare` has done to the scheduler."""
    if client.status == "running":  # otherwise the cluster has ended before us
        with contextlib.suppress(OSError):  # ... or does so now
            remove_barrier(client, cluster.name)


def _versions() -> dict[str, str]:
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "skyward": __version__,
        "distributed": distributed.__version__,
        "cloudpickle": cloudpickle.__version__,
    }


def _fits(package: str, here: str, there: str | None) -> bool:
    if there is None:
        return False
    exact = package in ("python", "skyward")
    return here == there if exact else here.split(".")[0] == there.split(".")[0]


def _make_probe() -> Any:
    def probe(paths: list[str], packages: list[str]) -> dict[str, Any]:
        import importlib
        import importlib.metadata
        import pathlib
        import sys

        found: dict[str, Any] = {"share": all(pathlib.Path(path).exists() for path in paths)}
        found["python"] = f"{sys.version_info[0]}.{sys.version_info[1]}"
        for name in ("skyward", "distributed", "cloudpickle"):
            try:
                found[name] = importlib.import_module(name).__version__
            except ImportError:
                found[name] = None
        for name in packages:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
        return found

    probe.__module__ = "__main__"  # by value, wherever it runs
    return probe
