"""Dask clusters as skyward runs them: one on an agent of our own, one that was there before and is only joined."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distributed.core import Status, rpc
from distributed.deploy import Cluster
from distributed.deploy.adaptive import Adaptive
from distributed.objects import SchedulerInfo

from skyward.cluster.node import AgentConfig, NodeSpec
from skyward.errors import BootstrapError, PoolError
from skyward.wire import Slot

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Seconds that scheduler and workers of a local pool have to come up. By feel: far more than a loaded laptop needs."""


class SkyCluster(Cluster):  # type: ignore[misc]
    """A `distributed.deploy.Cluster` that knows which workers are slots of which node.

    `on_change` is called, in the event loop, whenever a worker comes or goes.
    """

    _name = "SkyCluster"

    def __init__(self, name: str, security: Any = None) -> None:
        super().__init__(asynchronous=False, quiet=True, name=name)
        self.security = security
        self.on_change: Callable[[], None] = lambda: None
        self.on_lost: Callable[[BaseException], None] = lambda _: None
        self.changed = asyncio.Event()
        self._loop_runner.start()

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
            self.close(timeout=10)
        with contextlib.suppress(Exception):
            self._loop_runner.stop()


class AgentCluster(SkyCluster):
    """A cluster on this host, run by an agent process that ends with us.

    Parameters
    ----------
    config
        What the agent is told first.
    environment
        Environment of the agent, which its workers inherit.
    node_spec
        Makes the specification of a further node, for `scale`.
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        security: Any,
        environment: dict[str, str],
        node_spec: Callable[[int], NodeSpec],
    ) -> None:
        super().__init__(config.pool_id, security)
        self._config = config
        self._environment = environment
        self._node_spec = node_spec
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = {n.node: len(n.environments) for n in config.nodes}
        self._up: asyncio.Future[dict[str, Any]] | None = None
        self._stopping = False
        self.demand: Callable[[], int] = lambda: 0  # calls that wait or run; the engine's, for adapt

    def start(self) -> None:
        """Start agent, scheduler and workers; return when all workers are there.

        Raises
        ------
        BootstrapError
            The agent or a worker did not start. Nothing is left running.
        """
        try:
            self.sync(self._start)
        except BaseException:
            self.stop()
            raise

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._up = loop.create_future()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "skyward.cluster.node"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # a process group of its own: Ctrl-C does not reach it, one kill ends it all
        )
        _forget_after_fork(self._process)
        threading.Thread(target=self._listen, args=[loop], name="skyward-agent", daemon=True).start()
        self._send(self._config.to_json())
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                scheduler = await self._up
                self._open_rpc(scheduler["address"])
                await super()._start()
                await self._all_there()
        except TimeoutError:
            raise BootstrapError(
                f"scheduler and workers of pool {self.name} did not start within {START_TIMEOUT_S:g} s; "
                f"{len(self.scheduler_info['workers'])} of {sum(self._wanted.values())} workers are up",
                machine="local",
                step="workers",
                last_lines=(),
            ) from None

    async def _all_there(self) -> None:
        while len(self.slots()) < sum(self._wanted.values()):
            self.changed.clear()
            wait = asyncio.ensure_future(self.changed.wait())
            assert self._up is not None
            if self._failed is not None:
                raise self._failed
            await wait

    _failed: BaseException | None = None

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(RuntimeError):  # the loop has ended before the agent
                loop.call_soon_threadsafe(self._heard, json.loads(line))
        status = self._process.wait()
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._heard, {"event": "ended", "status": status})

    def _heard(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "scheduler":
                if self._up is not None and not self._up.done():
                    self._up.set_result(event)
            case "failed":
                lines = tuple(event.get("last_lines", ()))
                self._fail(
                    BootstrapError(
                        "\n  ".join([f"pool {self.name} could not start: {event['error']}", *lines]),
                        machine="local",
                        step="workers",
                        last_lines=lines,
                    )
                )
            case "ended" if not self._stopping:
                self._fail(
                    PoolError(
                        f"the agent of pool {self.name}, and with it the Dask scheduler, ended unexpectedly "
                        f"(status {event['status']}); calls that had not finished are lost. Enter the pool again."
                    )
                )

    def _fail(self, error: BaseException) -> None:
        self._failed = self._failed or error
        self.changed.set()
        if self._up is not None and not self._up.done():
            self._up.set_exception(error)
        elif self.status == Status.running:
            # From a thread: what follows closes this loop's clients, which can't be awaited here.
            threading.Thread(target=self.on_lost, args=[error], daemon=True).start()

    def _send(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it died: `_listen` reports that
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    async def _close(self) -> None:
        self._stopping = True
        with contextlib.suppress(Exception):  # the scheduler may be dead
            await asyncio.wait_for(super()._close(), 2)
        self.status = Status.closed
        process = self._process
        if process is None:
            return
        self._send('{"do": "stop"}')
        try:
            await asyncio.to_thread(process.wait, 3)
        except subprocess.TimeoutExpired:
            logger.debug("agent %s did not stop, killed", process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, 9)  # whatever of its group is left, e.g. processes that tasks have started
        await asyncio.to_thread(process.wait)
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for folder in (self._config.folder, *self._config.remove):
            shutil.rmtree(folder, ignore_errors=True)

    # --- nodes ----------------------------------------------------------------------------------------------

    def slots(self) -> list[Slot]:
        found = []
        for address, worker in self.scheduler_info["workers"].items():
            node, _, index = str(worker["name"]).partition("-")
            found.append(Slot(address, int(node), int(index), worker["nthreads"]))
        return sorted(found, key=lambda s: (s.node, s.number))

    @property
    def plan(self) -> set[int]:
        return set(self._wanted)

    requested = plan

    @property
    def observed(self) -> set[int]:
        return {slot.node for slot in self.slots()}

    def scale(self, n: int) -> None:
        """Grow or shrink to `n` nodes. Returns at once; node 0 always stays."""
        if n < 1:
            raise ValueError(f"a cluster has at least 1 node, not {n}")
        self.loop.add_callback(self._scale, n)

    def _scale(self, n: int) -> None:
        have = sorted(self._wanted)
        if n < len(have):
            self.scale_down(have[n:])
            return
        free = (i for i in range(n + len(have)) if i not in self._wanted)
        new = [self._node_spec(next(free)) for _ in range(n - len(have))]
        self._wanted.update((spec.node, len(spec.environments)) for spec in new)
        if new:
            nodes = [
                {"node": s.node, "environments": s.environments, "resources": s.resources} for s in new
            ]
            self._send(json.dumps({"do": "add", "nodes": nodes}))

    def scale_down(self, workers: Sequence[int]) -> None:
        """Remove nodes, by number. Dask's name for the argument; the work on them is run again elsewhere."""
        gone = [n for n in workers if n != 0 and self._wanted.pop(n, None) is not None]
        if gone:
            self._send(json.dumps({"do": "remove", "nodes": gone}))

    def adapt(self, *, minimum: int = 1, maximum: int, **options: Any) -> Any:
        """Keep between `minimum` and `maximum` nodes, as many as the waiting calls can use."""
        return super().adapt(Adaptive=_NodeAdaptive, minimum=minimum, maximum=maximum, **options)


class _NodeAdaptive(Adaptive):  # type: ignore[misc]
    """Dask's adaptive scaling, counted in nodes and driven by what waits in the engine."""

    async def target(self) -> int:
        slots: int = max([1, *self.cluster._wanted.values()])
        wanted: int = self.cluster.demand()
        return math.ceil(wanted / slots)

    async def workers_to_close(self, target: int) -> list[int]:
        busy_workers = await self.cluster.scheduler_comm.processing()
        busy = {s.node for s in self.cluster.slots() if busy_workers.get(s.address)}
        idle = sorted(self.cluster.observed - busy - {0}, reverse=True)
        return idle[: max(0, len(self.cluster.plan) - target)]

    async def scale_down(self, workers: Any) -> None:
        self.cluster.scale_down(list(workers))

    async def scale_up(self, n: int) -> None:
        self.cluster._scale(n)


class JoinedCluster(SkyCluster):
    """Somebody else's Dask cluster: nodes are its hosts, slots its worker threads. Closing leaves it as it was."""

    _supports_scaling = False

    def __init__(self, name: str, address: str, security: Any) -> None:
        super().__init__(name, security)
        self._address = address

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
        and that is whoever made the cluster.
        """
        self.scheduler_info = SchedulerInfo(await self.scheduler_comm.identity(n_workers=-1))
        self.changed.set()
        self.on_change()

    async def heard(self, event: tuple[float, Any]) -> None:
        """Take an entry of the scheduler's event log."""
        message = event[1]
        if isinstance(message, dict) and message.get("action") in ("add-worker", "remove-worker"):
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

    def scale(self, n: int) -> None:
        raise PoolError(f"can't scale to {n} nodes: this cluster was only joined; scale it where it was made")

    def adapt(self, **_: Any) -> Any:
        raise PoolError("can't adapt: this cluster was only joined; adapt it where it was made")


def _forget_after_fork(process: subprocess.Popen[bytes]) -> None:
    """Keep a forked child from holding the agent's standard input open, and the agent alive, after we are gone."""

    def close() -> None:
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                os.close(process.stdin.fileno())

    os.register_at_fork(after_in_child=close)


def tail(path: Path, lines: int = 20) -> tuple[str, ...]:
    """Return the last lines of a text file, or none when it is not there."""
    with contextlib.suppress(OSError):
        return tuple(path.read_text(errors="replace").splitlines()[-lines:])
    return ()
