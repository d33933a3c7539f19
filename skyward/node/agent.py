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
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from skyward.node import descendants, log_size, metrics, reach, spot_notice
from skyward.node.config import AgentConfig, NodeSpec
from skyward.node.dask_processes import DaskProcesses, start_forkserver
from skyward.node.relay import INTERPRETER, RelayServer
from skyward.node.teardown import end, end_after
from skyward.node.watch import Watch
from skyward.node.worker_slot import KEPT_LINES

HEADROOM_S = 60.0
"""Seconds beyond the pool's time-out after which an agent ends by itself, whatever its caller does."""

SOCKET = "agent.sock"
CONFIG = "config.json"
LOG = "agent.log"


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
    end_after(config.ttl_s + HEADROOM_S, config)
    log = Path(config.folder) / LOG
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(_environment(config))
    descendants.adopt_orphans()
    start_forkserver(config)
    try:
        asyncio.run(_run(config, events))
    except BaseException:
        logging.getLogger(__name__).exception("agent failed")
        raise
    finally:
        end(config)


async def _run(config: AgentConfig, events: int | None) -> None:
    await _Agent(config, events).run()
    end(config)  # now: asyncio would first wait for all that still runs to be cancelled


def _environment(config: AgentConfig) -> dict[str, str]:
    from skyward.worker.threads import thread_environment

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


class _Agent:
    def __init__(self, config: AgentConfig, events: int | None) -> None:
        self._config = config
        self._pipe = os.fdopen(events, "w", buffering=1) if events is not None else None
        self._kept_events: list[str] = []  # every event that is kept, for a caller that comes back
        self._writers: set[asyncio.StreamWriter] = set()
        self._relay_server = RelayServer()
        self._taken = 0  # commands that a caller who comes back need not give again
        self._watch: Watch | None = None
        self._stopped = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._processes = DaskProcesses(config, self)

    # --- to and from the caller -----------------------------------------------------------------------------

    def tell(self, event: str, *, keep: bool = True, **facts: Any) -> None:
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

    def fail(self, error: str, **facts: Any) -> None:
        lines = []
        with contextlib.suppress(OSError):
            lines = (Path(self._config.folder) / LOG).read_text(errors="replace").splitlines()
        self.tell("failed", error=error, last_lines=lines[-KEPT_LINES:], **facts)

    async def run(self) -> None:
        self.spawn(log_size.watch(Path(self._config.folder) / LOG))
        async with contextlib.AsyncExitStack() as stack:
            if self._pipe is None:
                folder = Path(self._config.folder)
                (folder / INTERPRETER).symlink_to(sys.executable)
                self._watch = Watch(folder, self._config.heartbeat_s, lambda: end(self._config, alone=True))
                # Heard before anything is started: what takes long is then seen to be under way.
                server = await asyncio.start_unix_server(self._serve, folder / SOCKET)
                stack.push_async_callback(_close, server)
                stack.callback(self._relay_server.close)
            else:
                self.spawn(self._read_standard_input())
            try:
                self._start()
            except reach.UnreachableError as exc:
                self.fail(str(exc))
            except Exception as exc:  # whatever keeps it from starting; the caller is told, and says stop
                logging.getLogger(__name__).exception("agent failed")
                self.fail(reach.reason(exc))
            await self._stopped.wait()

    def spawn(self, coroutine: Any) -> None:
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
            end(self._config, alone=True)  # standard input ended without a word: the caller died

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
            case "scheduler":
                self._processes.start_scheduler()
            case "join":
                self._processes.join(command["address"])
            case "add":
                for raw in command["nodes"]:
                    self._processes.add(NodeSpec.from_dict(raw))
            case "remove":
                await self._processes.remove(command["nodes"])
                self.tell("removed", nodes=command["nodes"])
            case "stop":
                self._stopped.set()
            case other:
                raise ValueError(f"unknown command {other!r}")

    # --- what it runs and watches ---------------------------------------------------------------------------

    def _start(self) -> None:
        self._processes.configure()
        self.tell("ready")
        if self._config.metrics:
            self.spawn(self._tell_metrics())
        if self._config.notice:
            self.spawn(self._watch_notice(self._config.notice))
        self._processes.start()

    async def _tell_metrics(self) -> None:
        with contextlib.closing(metrics.Sampler()) as sampler:
            await sampler.sample()
            while True:
                await asyncio.sleep(metrics.PERIOD_S)
                self.tell("metrics", keep=False, **await sampler.sample())

    async def _watch_notice(self, cloud: str) -> None:
        while (seconds := await asyncio.to_thread(spot_notice.seconds_left, cloud)) is None:
            await asyncio.sleep(spot_notice.PERIOD_S)
        self.tell("notice", seconds=seconds)


async def _close(server: asyncio.Server) -> None:
    server.close()


if __name__ == "__main__":
    main()
