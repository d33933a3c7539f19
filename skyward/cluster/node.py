"""The agent: a process that runs a node's part of the Dask cluster, and ends with whoever started it.

Talks in lines of JSON: a configuration and then commands on standard input, events on standard output. The end
of standard input means that the caller is gone: everything that the agent started is killed at once. For local
pools one agent plays all nodes.

Run as ``python -m skyward.cluster.node``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEDULER_HEADROOM_S = 60.0
"""Seconds beyond the pool's time-out after which an agent ends by itself, whatever its caller does."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One node to run: its number and, for each slot, environment and Dask resources."""

    node: int
    environments: tuple[dict[str, str], ...]
    resources: tuple[dict[str, float], ...]


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """All that an agent is told. Travels on standard input: keys never appear in a process list."""

    pool_id: str
    folder: str  # for workers' files and logs; removed when the agent ends
    ttl_s: float
    ca: str
    certificate: str
    key: str = field(repr=False)
    nodes: tuple[NodeSpec, ...] = ()
    scheduler: str | None = None  # address to join; None: run the scheduler here
    host: str = "127.0.0.1"
    dashboard_port: int = 0
    remove: tuple[str, ...] = ()  # further folders to remove at the end
    preload: tuple[str, ...] = ()  # modules that the parent of all workers imports, besides dask

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> AgentConfig:
        raw = json.loads(text)
        nodes = tuple(_node_spec(n) for n in raw.pop("nodes"))
        raw["remove"], raw["preload"] = tuple(raw["remove"]), tuple(raw["preload"])
        return AgentConfig(nodes=nodes, **raw)


def _node_spec(raw: dict[str, Any]) -> NodeSpec:
    return NodeSpec(raw["node"], tuple(raw["environments"]), tuple(raw["resources"]))


def main() -> None:
    events = _take_standard_output()
    config = AgentConfig.from_json(_read_line().decode())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who tells us
    _end_after(config.ttl_s + SCHEDULER_HEADROOM_S, config)
    log = Path(config.folder) / "agent.log"
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _start_forkserver(config.preload)
    try:
        asyncio.run(_Agent(config, events).run())
    except BaseException:
        logging.getLogger(__name__).exception("agent failed")
        raise
    finally:
        _clean(config)
        _kill_group()


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


def _clean(config: AgentConfig) -> None:
    for folder in (config.folder, *config.remove):
        shutil.rmtree(folder, ignore_errors=True)


def _kill_group() -> None:
    """Kill all that this agent started, and itself. It leads a process group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _end_after(seconds: float, config: AgentConfig) -> None:
    def end() -> None:
        time.sleep(seconds)
        _clean(config)
        _kill_group()

    threading.Thread(target=end, name="dead-man", daemon=True).start()


def _start_forkserver(preload: tuple[str, ...]) -> None:
    """Start the warm parent of all workers now, so that its imports run beside ours."""
    import multiprocessing
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed.nanny", "distributed.worker", "skyward.cluster.slot", *preload])
    forkserver.ensure_running()


class _Agent:
    def __init__(self, config: AgentConfig, events: int) -> None:
        self.config = config
        self._events = os.fdopen(events, "w", buffering=1)
        self._nannies: dict[tuple[int, int], Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._security: Any = None
        self._scheduler_address = config.scheduler

    def _tell(self, event: str, **facts: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._events.write(json.dumps({"event": event, **facts}) + "\n")

    def _fail(self, error: str) -> None:
        with contextlib.suppress(OSError):
            lines = (Path(self.config.folder) / "agent.log").read_text(errors="replace").splitlines()
            self._tell("failed", error=error, last_lines=lines[-20:])

    async def run(self) -> None:
        commands = await _read_standard_input()
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._start(stack)
                while line := await commands.readline():
                    command = json.loads(line)
                    if command["do"] == "stop":
                        return
                    await self._do(command)
                _clean(self.config)  # standard input ended without a word: the caller died
                _kill_group()
        except Exception as exc:
            self._fail(f"{type(exc).__name__}: {exc}")
            raise

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        import dask
        from distributed import Scheduler

        from skyward.cluster.barrier import barrier_plugin
        from skyward.cluster.security import Credentials

        config = self.config
        dask.config.set(
            {
                "distributed.worker.multiprocessing-method": "forkserver",
                # Tasks may start processes of their own, as torch's DataLoader does; daemons may not.
                "distributed.worker.daemon": False,
                # A call that kills its worker is counted and rerun by the engine, which knows calls, not tasks.
                "distributed.scheduler.allowed-failures": 0,
                "distributed.scheduler.worker-ttl": "5 minutes",
                # Tasks may hold the interpreter lock for long; that alone is no reason for a warning.
                "distributed.admin.tick.limit": "1h",
                "distributed.worker.memory.target": False,
                "distributed.worker.memory.spill": False,
                "distributed.worker.memory.pause": False,
                "distributed.worker.memory.terminate": False,
                "distributed.logging": {"distributed": "warning"},
            }
        )
        self._security = Credentials(config.ca, config.certificate, config.key).security()
        if self._scheduler_address is None:
            scheduler = Scheduler(
                host=config.host,
                port=0,
                protocol="tls",
                security=self._security,
                dashboard_address=f"{config.host}:{config.dashboard_port}",
                plugins=[barrier_plugin(config.pool_id)],
            )
            await stack.enter_async_context(scheduler)
            self._scheduler_address = scheduler.address
            dashboard = scheduler.services.get("dashboard")
            self._tell(
                "scheduler",
                address=scheduler.address,
                dashboard=getattr(getattr(dashboard, "server", None), "port", None) or _http_port(scheduler),
            )
        stack.push_async_callback(self._stop_workers)
        for node in config.nodes:
            self._add(node)

    def _add(self, node: NodeSpec) -> None:
        for slot in range(len(node.environments)):
            task = asyncio.get_running_loop().create_task(self._start_worker(node, slot))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _start_worker(self, node: NodeSpec, slot: int) -> None:
        from distributed import Nanny

        name = f"{node.node}-{slot}"
        nanny = Nanny(
            self._scheduler_address,
            nthreads=1,
            name=name,
            host=self.config.host,
            security=self._security,
            protocol="tls",
            env={
                **node.environments[slot],
                "SKYWARD_NODE": str(node.node),
                "SKYWARD_SLOT": str(slot),
                "SKYWARD_POOL": self.config.pool_id,
            },
            resources=node.resources[slot],
            memory_limit=0,
            local_directory=self.config.folder,
            preload=["skyward.cluster.slot"],
            dashboard=False,
        )
        self._nannies[node.node, slot] = nanny
        try:
            await nanny
        except Exception as exc:  # whatever keeps a process from starting: reported, the caller decides
            self._fail(f"worker {name} did not start: {type(exc).__name__}: {exc}")
            return
        self._tell("worker", node=node.node, slot=slot, address=nanny.worker_address, pid=nanny.process.pid)

    async def _do(self, command: dict[str, Any]) -> None:
        match command["do"]:
            case "add":
                for raw in command["nodes"]:
                    self._add(_node_spec(raw))
            case "remove":
                gone = [self._nannies.pop(k) for k in list(self._nannies) if k[0] in command["nodes"]]
                await asyncio.gather(*(n.close(timeout=2) for n in gone), return_exceptions=True)
                self._tell("removed", nodes=command["nodes"])
            case other:
                raise ValueError(f"unknown command {other!r}")

    async def _stop_workers(self) -> None:
        # What still runs was cancelled by the caller before it said stop: there is nothing to wait for.
        for nanny in self._nannies.values():
            if nanny.process is not None and nanny.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    nanny.auto_restart = False
                    os.kill(nanny.process.pid, signal.SIGKILL)


def _http_port(scheduler: Any) -> int | None:
    server = getattr(scheduler, "http_server", None)
    for socket in getattr(server, "_sockets", {}).values():
        port: int = socket.getsockname()[1]
        return port
    return None


async def _read_standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=1 << 26)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    return reader


if __name__ == "__main__":
    main()
