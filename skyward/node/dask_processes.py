"""A node's part of a Dask cluster: the scheduler, where the node has it, and a nanny with a worker for each slot."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Protocol

from skyward.node import reach
from skyward.node.config import AgentConfig, NodeSpec
from skyward.worker import buffer_files, capture

KEPT_LINES = 500
"""Lines of its log that an agent sends with a failure: its folder may be gone when they are asked for."""
_ATTEMPTS = 3
"""How often a worker process may fail to come up at first. Chosen, not measured: more than one is a rare race, not a
fault."""
_AGAIN_S = 1.0
_SHORT = 80
"""Length of a folder's path from which on a socket in it would have too long a name: unix(7) allows 108, macOS 104."""


class Caller(Protocol):
    """The agent, as what it runs sees it."""

    def tell(self, event: str, *, keep: bool = True, **facts: Any) -> None:
        """Tell the pool of an event."""

    def fail(self, error: str) -> None:
        """Tell the pool that the node can't take part."""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside all others."""


def start_forkserver(config: AgentConfig) -> None:
    """Start the warm parent of all workers now, so that its imports run beside ours."""
    import multiprocessing
    from multiprocessing import forkserver

    if len(config.folder) < _SHORT:
        # Its socket would lie in a separate folder, which nobody removes when we are killed.
        multiprocessing.current_process()._config["tempdir"] = config.folder  # type: ignore[attr-defined]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["skyward.node.adoption", "distributed.worker", "skyward.worker.preload"])
    forkserver.ensure_running()


class DaskProcesses:
    """The Dask processes of an agent's nodes. For one event loop."""

    def __init__(self, config: AgentConfig, caller: Caller) -> None:
        self._config = config
        self._caller = caller
        self._scheduler: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._nannies: dict[tuple[int, int], Any] = {}
        self._security: Any = None
        self._door: asyncio.Server | None = None  # for other nodes, which try whether they reach this one
        self._show_dashboard: Callable[[], Coroutine[Any, Any, None]] | None = None

    def configure(self) -> None:
        """Find the node's own address and set Dask's options.

        Raises
        ------
        UnreachableError
            None of the host's addresses is in the networks asked for.
        """
        import dask

        host = reach.own_address(self._config.networks, self._config.host)
        config = self._config = replace(self._config, host=host)
        dask.config.set(
            {
                "temporary-directory": config.folder,
                "distributed.worker.multiprocessing-method": "forkserver",
                # Tasks may start processes of their own, as torch's DataLoader does; daemons may not.
                "distributed.worker.daemon": False,
                # A call may hold the interpreter lock for hours; then its worker sends no heartbeats. The end of a
                # worker or its machine is seen without them: by its connection, its nanny, or the machine's agent.
                "distributed.scheduler.worker-ttl": None,
                # Chunks for workers that the caller can't reach itself go through the scheduler.
                "distributed.scheduler.reuse-broadcast-comm": True,
                # Tasks may hold the interpreter lock for long; that alone is no reason for a warning.
                "distributed.admin.tick.limit": "1h",
                # What looks in often takes the interpreter lock, and time, from tasks.
                "distributed.admin.tick.interval": "1s",
                "distributed.worker.profile.interval": "50ms",
                # We measure GPUs ourselves. Dask's monitor ends a worker at its start if CUDA_VISIBLE_DEVICES names
                # a GPU that is not there, as after `sky.Local(gpus=...)`, and asks of partitions what NVML can't say.
                "distributed.diagnostics.nvml": False,
                "distributed.worker.memory.target": False,
                "distributed.worker.memory.spill": False,
                "distributed.worker.memory.pause": False,
                "distributed.worker.memory.terminate": False,
                "distributed.logging": {"distributed": "warning"},
            }
        )

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        """Start them; what ends them is pushed on `stack`."""
        from skyward.node.tls import Credentials

        config = self._config
        self._security = Credentials(config.ca, config.certificate, config.key).security()
        if config.scheduler is None:
            await self._start_scheduler(stack)
        elif config.scheduler:
            self._scheduler.set_result(config.scheduler)
        stack.push_async_callback(self._kill_workers)
        for node in config.nodes:
            self.add(node)

    async def remove(self, nodes: Sequence[int]) -> None:
        gone = [self._nannies.pop(k) for k in list(self._nannies) if k[0] in nodes]
        await asyncio.gather(*(n.close(timeout=2) for n in gone), return_exceptions=True)

    async def join(self, scheduler: str) -> None:
        if self._scheduler.done():
            return
        try:
            self._door = await reach.meet(scheduler, self._config.nodes[0].node, self._config.host, self._security)
        except reach.UnreachableError as exc:
            self._caller.fail(str(exc))
        else:
            self._scheduler.set_result(scheduler)

    async def _start_scheduler(self, stack: contextlib.AsyncExitStack) -> None:
        from distributed import Scheduler

        from skyward.scheduler.barrier import barrier_plugin
        from skyward.scheduler.losses import LossesPlugin
        from skyward.scheduler.page_data import PageDataPlugin
        from skyward.scheduler.task_stream import ReportsPlugin

        scheduler = Scheduler(
            host=_dask_host(self._config.host),
            port=0,
            protocol="tls",
            security=self._security,
            dashboard=False,  # for now: see `_add_dashboard`
            dashboard_address="127.0.0.1:0",  # reached through the caller's tunnel only
            plugins=[
                barrier_plugin(self._config.pool_id),
                ReportsPlugin(),
                LossesPlugin(),
                PageDataPlugin(),
                reach.meeting_plugin(),
            ],
        )
        await stack.enter_async_context(scheduler)
        self._scheduler.set_result(scheduler.address)
        self._show_dashboard = lambda: self._add_dashboard(scheduler)
        self._caller.tell("scheduler", address=scheduler.address, dashboard=_http_port(scheduler))

    async def _add_dashboard(self, scheduler: Any) -> None:
        """Add the dashboard to the scheduler's server, late: what it imports would keep the pool waiting."""
        dashboard = await asyncio.to_thread(importlib.import_module, "distributed.dashboard.scheduler")
        if self._config.metrics:
            page = await asyncio.to_thread(importlib.import_module, "skyward.scheduler.page")
            page.add_page(scheduler)
        dashboard.connect(scheduler.http_application, scheduler.http_server, scheduler)
        self._caller.tell("dashboard")

    def add(self, node: NodeSpec) -> None:
        for slot in range(len(node.environments)):
            self._nannies[node.node, slot] = None
            self._caller.spawn(self._keep_worker(node, slot))

    async def _keep_worker(self, node: NodeSpec, slot: int) -> None:
        """Have a worker in this slot until it is removed: its nanny restarts it, this restarts the nanny."""
        path = f"{self._config.folder}/output-{uuid.uuid4().hex}"
        with capture.pipes(path) as output:

            def exited(address: str | None) -> None:
                self._caller.tell("exited", address=address, output=_last_lines(node.node, output))

            await self._keep_worker_with(node, slot, {capture.VARIABLE: path}, exited)

    async def _keep_worker_with(
        self, node: NodeSpec, slot: int, environment: dict[str, str], exited: Callable[[str | None], None]
    ) -> None:
        place, name = (node.node, slot), f"{node.node}-{slot}"
        failures, came_up = 0, False
        while place in self._nannies:
            nanny = self._nannies[place] = await self._nanny(node, slot, name, environment, exited)
            try:
                await nanny
            except Exception as exc:  # whatever keeps a process from starting, its own death at once included
                failures += 1
                if failures >= _ATTEMPTS and not came_up:
                    self._caller.fail(f"worker {name} did not start: {reach.reason(exc)}")
                    return
                await asyncio.sleep(0 if failures < _ATTEMPTS else _AGAIN_S)
                continue
            failures, came_up = 0, True
            if self._show_dashboard is not None:
                self._caller.spawn(self._show_dashboard())
                self._show_dashboard = None
            self._caller.tell("worker", node=node.node, slot=slot, address=nanny.worker_address, pid=nanny.pid)
            await nanny.finished()

    async def _nanny(
        self, node: NodeSpec, slot: int, name: str, environment: dict[str, str], exited: Callable[[str | None], None]
    ) -> Any:
        from skyward.worker.nanny import SlotNanny

        return SlotNanny(
            await self._scheduler,
            on_exit=exited,
            nthreads=1,
            name=name,
            host=_dask_host(self._config.host),
            security=self._security,
            protocol="tls",
            env={
                **node.environments[slot],
                buffer_files.VARIABLE: self._config.environment.get(
                    buffer_files.VARIABLE, f"{self._config.folder}/buffer-files"
                ),
                **environment,
                "SKYWARD_NODE": str(node.node),
                "SKYWARD_SLOT": str(slot),
            },
            resources=node.resources[slot],
            memory_limit=0,
            local_directory=self._config.folder,
            preload=["skyward.worker.preload"],
            dashboard=False,
            dashboard_address="127.0.0.1:0",  # its HTTP server has no TLS
        )

    async def _kill_workers(self) -> None:
        # What still runs was cancelled by the caller before it said stop: there is nothing to wait for.
        for nanny in self._nannies.values():
            if nanny is not None and nanny.process is not None and nanny.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    nanny.auto_restart = False
                    os.kill(nanny.process.pid, signal.SIGKILL)


def _last_lines(node: int, output: capture.Reader) -> dict[str, Any]:
    """Return what a worker process that has ended has printed and not sent, in the form in which workers send it."""
    now = time.time()
    lines = [(now, *line) for line in (*output.read(), *output.rest())][-KEPT_LINES:]
    return {"node": node, "process": uuid.uuid4().hex, "first": 0, "lines": lines}


def _dask_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _http_port(scheduler: Any) -> int | None:
    port: int
    dashboard: Any = getattr(scheduler.services.get("dashboard"), "server", None)
    if getattr(dashboard, "port", None):
        port = dashboard.port
        return port
    for socket in getattr(getattr(scheduler, "http_server", None), "_sockets", {}).values():
        port = socket.getsockname()[1]
        return port
    return None
