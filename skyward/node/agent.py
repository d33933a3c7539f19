"""The agent: a process that runs a node's part of the Dask cluster, and ends with the process that started it.

Talks in lines of JSON: commands to it, events from it. On this host it is a child process and talks over standard
input and output, whose end means that the caller is gone; for local pools one agent plays all nodes. On a machine of
its own it is started with ``--serve FOLDER``, reads its configuration from there and talks over a socket in it; the
caller may come and go, until it has not been heard for too long. Either way an agent without a caller kills all that
it has started, removes its files and ends.

Run as ``python -m skyward.node.agent``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from skyward.node import descendants, metrics, reach, spot_notice
from skyward.node.config import AgentConfig, NodeSpec
from skyward.node.relay import INTERPRETER, RelayServer
from skyward.node.watch import Watch
from skyward.scripts.bootstrap import POWER_OFF
from skyward.scripts.volumes import UNMOUNT_ALONE
from skyward.worker import buffer_files, capture

HEADROOM_S = 60.0
"""Seconds beyond the pool's time-out after which an agent ends by itself, whatever its caller does."""

SOCKET = "agent.sock"
CONFIG = "config.json"
LOG = "agent.log"
_ATTEMPTS = 3
"""How often a worker process may fail to come up at first. Chosen, not measured: more than one is a rare race, not a
fault."""
_AGAIN_S = 1.0
_TOLD_LINES = 500
"""Lines of its log that an agent sends with a failure: its folder may be gone when they are asked for."""
_SHORT = 80
"""Length of a folder's path from which on a socket in it would have too long a name: unix(7) allows 108, macOS 104."""


def main() -> None:
    serve = Path(sys.argv[2]) if sys.argv[1:2] == ["--serve"] else None
    events = None
    if serve is None:
        events = _take_standard_output()
        config = AgentConfig.from_json(_read_line().decode())
    else:
        config = AgentConfig.from_json((serve / CONFIG).read_text())
        (serve / CONFIG).unlink()  # it holds the key
        with contextlib.suppress(OSError):  # that is what setsid(1) has done, where there is one
            os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who tells us
    _end_after(config.ttl_s + HEADROOM_S, config)
    log = Path(config.folder) / LOG
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(_environment(config))
    descendants.adopt_orphans()
    _start_forkserver(config)
    try:
        asyncio.run(_run(config, events))
    except BaseException:
        logging.getLogger(__name__).exception("agent failed")
        raise
    finally:
        _end(config)


async def _run(config: AgentConfig, events: int | None) -> None:
    await _Agent(config, events).run()


def _environment(config: AgentConfig) -> dict[str, str]:
    from skyward.worker.runtime import thread_environment

    own = {"SKYWARD_POOL": config.pool_id}
    if "SKYWARD_NODE_CORES" not in config.environment:
        import dask.system

        slots = max((len(n.environments) for n in config.nodes), default=1)
        cores = dask.system.CPU_COUNT
        own |= {"SKYWARD_NODE_CORES": str(cores), **thread_environment(max(1, cores // slots))}
    own |= config.environment
    if path := own.get("PYTHONPATH"):
        sys.path[:0] = path.split(os.pathsep)  # workers have our import path
        own["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
    return own


def _take_standard_output() -> int:
    """Keep standard output for events alone: whatever else prints, prints into the log."""
    events = os.dup(1)
    os.set_inheritable(events, False)
    return events


def _read_line() -> bytes:
    """Read one line and not a byte more: what follows belongs to the event loop's reader."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


def _end(config: AgentConfig, *, alone: bool = False) -> None:
    """Remove all files, kill all that this agent has started, and itself: it leads its own process group.

    `alone`: nobody has asked for it, so a machine that exists for the pool only sends what was written to its volumes
    and is switched off.
    """
    for folder in (config.folder, *config.remove):
        shutil.rmtree(folder, ignore_errors=True)
    if alone and config.power_off:
        _kill_all(config.pool_id)  # what is still open can't be sent
        # None of those that are killed with the pool: it goes on when this process ends.
        unmarked = {name: value for name, value in os.environ.items() if name != "SKYWARD_POOL"}
        command = ["sh", "-c", f"{UNMOUNT_ALONE}; {POWER_OFF}", descendants.LEAVE]
        with contextlib.suppress(OSError):
            subprocess.run(command, stdin=subprocess.DEVNULL, env=unmarked, start_new_session=True)
    _kill_all(config.pool_id)
    os._exit(1)


def _kill_all(pool_id: str) -> None:
    """Kill what we have started: it is below us, has the pool's id with it, or is of the process group that we lead."""
    import psutil

    descendants.kill_descendants(os.getpid())
    ours = os.getpgrp() if os.getpgrp() == os.getpid() else None
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # gone meanwhile, or another user's
            if process.pid == os.getpid():
                continue
            descends = os.getpgid(process.pid) == ours or process.environ().get("SKYWARD_POOL") == pool_id
            if descends and descendants.TRACKER not in " ".join(process.cmdline()):
                process.kill()


def _end_after(seconds: float, config: AgentConfig) -> None:
    def end() -> None:
        time.sleep(seconds)
        _end(config, alone=True)

    threading.Thread(target=end, name="dead-man", daemon=True).start()


def _start_forkserver(config: AgentConfig) -> None:
    """Start the warm parent of all workers now, so that its imports run beside ours."""
    import multiprocessing
    from multiprocessing import forkserver

    if len(config.folder) < _SHORT:
        # Its socket would lie in a separate folder, which nobody removes when we are killed.
        multiprocessing.current_process()._config["tempdir"] = config.folder  # type: ignore[attr-defined]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["skyward.node.adoption", "distributed.worker", "skyward.worker.preload"])
    forkserver.ensure_running()


class _Agent:
    def __init__(self, config: AgentConfig, events: int | None) -> None:
        self.config = config
        self._pipe = os.fdopen(events, "w", buffering=1) if events is not None else None
        self._kept_events: list[str] = []  # every event that is kept, for a caller that comes back
        self._writers: set[asyncio.StreamWriter] = set()
        self._relay_server = RelayServer()
        self._taken = 0  # commands that a caller who comes back need not give again
        self._watch: Watch | None = None
        self._stopped = asyncio.Event()
        self._scheduler: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._nannies: dict[tuple[int, int], Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._security: Any = None
        self._door: asyncio.Server | None = None  # for other nodes, which try whether they reach this one
        self._show_dashboard: Callable[[], Coroutine[Any, Any, None]] | None = None

    # --- to and from the caller -----------------------------------------------------------------------------

    def _tell(self, event: str, *, keep: bool = True, **facts: Any) -> None:
        """Tell the caller, and one that comes back later too if this is to be kept."""
        line = json.dumps({"event": event, **facts}) + "\n"
        if self._pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                self._pipe.write(line)
            return
        if keep:
            self._kept_events.append(line)
        for writer in self._writers:
            writer.write(line.encode())

    def _fail(self, error: str) -> None:
        lines = []
        with contextlib.suppress(OSError):
            lines = (Path(self.config.folder) / LOG).read_text(errors="replace").splitlines()
        self._tell("failed", error=error, last_lines=lines[-_TOLD_LINES:])

    async def run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if self._pipe is None:
                folder = Path(self.config.folder)
                (folder / INTERPRETER).symlink_to(sys.executable)
                self._watch = Watch(folder, self.config.heartbeat_s, lambda: _end(self.config, alone=True))
                # Heard before anything is started: what takes long is then seen to be under way.
                server = await asyncio.start_unix_server(self._serve, folder / SOCKET)
                stack.push_async_callback(_close, server)
                stack.callback(self._relay_server.close)
            else:
                self._spawn(self._read_standard_input())
            try:
                await self._start(stack)
            except reach.UnreachableError as exc:
                self._fail(str(exc))
            except Exception as exc:  # whatever keeps a scheduler from starting; the caller is told, and says stop
                logging.getLogger(__name__).exception("agent failed")
                self._fail(reach.reason(exc))
            await self._stopped.wait()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read_standard_input(self) -> None:
        reader = asyncio.StreamReader(limit=1 << 26)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer
        )
        while line := await reader.readline():
            await self._do(json.loads(line))
        if not self._stopped.is_set():
            _end(self.config, alone=True)  # standard input ended without a word: the caller died

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError), contextlib.closing(writer):
            hello = json.loads(await reader.readline() or b"{}")
            if "relay" in hello:
                await self._relay_server.serve(hello, reader, writer)
            if "seen" not in hello:
                return
            for other in self._writers:
                other.transport.abort()  # stuck, or there would not be another: nothing more is to come from it
            have = json.dumps({"commands": self._taken}) + "\n"
            writer.write((have + "".join(self._kept_events[hello["seen"] :])).encode())
            self._writers.add(writer)
            try:
                while line := await reader.readline():
                    if self._watch is not None:
                        self._watch.heard()
                    command = json.loads(line)
                    self._taken += command["do"] != "beat"
                    await self._do(command)
            finally:
                self._writers.discard(writer)

    async def _do(self, command: dict[str, Any]) -> None:
        match command["do"]:
            case "beat":
                pass
            case "join":
                self._spawn(self._join(command["address"]))
            case "add":
                for raw in command["nodes"]:
                    self._add(NodeSpec.from_dict(raw))
            case "remove":
                gone = [self._nannies.pop(k) for k in list(self._nannies) if k[0] in command["nodes"]]
                await asyncio.gather(*(n.close(timeout=2) for n in gone), return_exceptions=True)
                self._tell("removed", nodes=command["nodes"])
            case "stop":
                self._stopped.set()
            case other:
                raise ValueError(f"unknown command {other!r}")

    # --- scheduler and workers ------------------------------------------------------------------------------

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        import dask

        from skyward.node.tls import Credentials

        host = reach.own_address(self.config.networks, self.config.host)
        config = self.config = replace(self.config, host=host)
        dask.config.set(
            {
                "temporary-directory": config.folder,
                "distributed.worker.multiprocessing-method": "forkserver",
                # Tasks may start processes of their own, as torch's DataLoader does; daemons may not.
                "distributed.worker.daemon": False,
                # A call that kills its worker is counted and rerun by the engine, which knows calls, not tasks.
                "distributed.scheduler.allowed-failures": 0,
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
        self._tell("ready")
        if config.metrics:
            self._spawn(self._tell_metrics())
        if config.notice:
            self._spawn(self._watch_notice(config.notice))
        self._security = Credentials(config.ca, config.certificate, config.key).security()
        if config.scheduler is None:
            await self._start_scheduler(stack)
        elif config.scheduler:
            self._scheduler.set_result(config.scheduler)
        stack.push_async_callback(self._kill_workers)
        for node in config.nodes:
            self._add(node)

    async def _join(self, scheduler: str) -> None:
        if self._scheduler.done():
            return
        try:
            self._door = await reach.meet(scheduler, self.config.nodes[0].node, self.config.host, self._security)
        except reach.UnreachableError as exc:
            self._fail(str(exc))
        else:
            self._scheduler.set_result(scheduler)

    async def _tell_metrics(self) -> None:
        with contextlib.closing(metrics.Sampler()) as sampler:
            await sampler.sample()
            while True:
                await asyncio.sleep(metrics.PERIOD_S)
                self._tell("metrics", keep=False, **await sampler.sample())

    async def _watch_notice(self, cloud: str) -> None:
        while (seconds := await asyncio.to_thread(spot_notice.seconds_left, cloud)) is None:
            await asyncio.sleep(spot_notice.PERIOD_S)
        self._tell("notice", seconds=seconds)

    async def _start_scheduler(self, stack: contextlib.AsyncExitStack) -> None:
        from distributed import Scheduler

        from skyward.scheduler.barrier import barrier_plugin
        from skyward.scheduler.page_data import PageDataPlugin
        from skyward.scheduler.task_stream import ReportsPlugin

        scheduler = Scheduler(
            host=_dask_host(self.config.host),
            port=0,
            protocol="tls",
            security=self._security,
            dashboard=False,  # for now: see `_add_dashboard`
            dashboard_address="127.0.0.1:0",  # reached through the caller's tunnel only
            plugins=[barrier_plugin(self.config.pool_id), ReportsPlugin(), PageDataPlugin(), reach.meeting_plugin()],
        )
        await stack.enter_async_context(scheduler)
        self._scheduler.set_result(scheduler.address)
        self._show_dashboard = lambda: self._add_dashboard(scheduler)
        self._tell("scheduler", address=scheduler.address, dashboard=_http_port(scheduler))

    async def _add_dashboard(self, scheduler: Any) -> None:
        """Add the dashboard to the scheduler's server, late: what it imports would keep the pool waiting."""
        dashboard = await asyncio.to_thread(importlib.import_module, "distributed.dashboard.scheduler")
        if self.config.metrics:
            page = await asyncio.to_thread(importlib.import_module, "skyward.scheduler.page")
            page.add_page(scheduler)
        dashboard.connect(scheduler.http_application, scheduler.http_server, scheduler)
        self._tell("dashboard")

    def _add(self, node: NodeSpec) -> None:
        for slot in range(len(node.environments)):
            self._nannies[node.node, slot] = None
            self._spawn(self._keep_worker(node, slot))

    async def _keep_worker(self, node: NodeSpec, slot: int) -> None:
        """Have a worker in this slot until it is removed: its nanny restarts it, this restarts the nanny."""
        path = f"{self.config.folder}/output-{uuid.uuid4().hex}"
        with capture.pipes(path) as output:

            def exited(address: str | None) -> None:
                self._tell("exited", address=address, output=_last_lines(node.node, output))

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
                    self._fail(f"worker {name} did not start: {reach.reason(exc)}")
                    return
                await asyncio.sleep(0 if failures < _ATTEMPTS else _AGAIN_S)
                continue
            failures, came_up = 0, True
            if self._show_dashboard is not None:
                self._spawn(self._show_dashboard())
                self._show_dashboard = None
            self._tell("worker", node=node.node, slot=slot, address=nanny.worker_address, pid=nanny.pid)
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
            host=_dask_host(self.config.host),
            security=self._security,
            protocol="tls",
            env={
                **node.environments[slot],
                buffer_files.VARIABLE: f"{self.config.folder}/buffer-files",
                **environment,
                "SKYWARD_NODE": str(node.node),
                "SKYWARD_SLOT": str(slot),
            },
            resources=node.resources[slot],
            memory_limit=0,
            local_directory=self.config.folder,
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
    lines = [(now, *line) for line in (*output.read(), *output.rest())][-_TOLD_LINES:]
    return {"node": node, "process": uuid.uuid4().hex, "first": 0, "lines": lines}


async def _close(server: asyncio.Server) -> None:
    server.close()


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


if __name__ == "__main__":
    main()
