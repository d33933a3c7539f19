"""The caller's end of an agent: one on this host, a child process. Agents on other hosts are in `remote`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from skyward.cluster import boot_logs
from skyward.node.config import AgentConfig
from skyward.providers.base import Machine

logger = logging.getLogger(__name__)

Heard = Callable[[dict[str, Any]], None]


class Agent(Protocol):
    """Runs one or more nodes of a cluster. Used in one event loop."""

    nodes: set[int]
    machine: str  # its name in messages

    @property
    def facts(self) -> Machine | None:
        """What is known of its machine; None for this host."""

    def instance_id(self, node: int) -> str:
        """Return the name of the machine that `node` is on."""

    async def start(self, heard: Heard) -> None:
        """Start it; from then on its events go to `heard`.

        Raises
        ------
        BootstrapError
            The machine can't be made ready.
        """

    @property
    def has_unsent(self) -> bool:
        """Whether data may be on its machine that has not arrived in a bucket, and that `stop` sends."""

    async def keep_log(self, step: str, error: str) -> Path | None:
        """Keep on this computer what its machine has logged, which ends with the pool; return the path, if any."""

    async def answers(self) -> bool:
        """Tell whether its machine is there now, and answers."""

    def send(self, command: dict[str, Any]) -> None:
        """Send a command. One that can't be delivered is dropped: `heard` is told of an agent that is gone."""

    async def reach(self, port: int) -> tuple[str, int]:
        """Return the host and port by which the caller reaches `port` on the agent's own loopback."""

    async def reach_scheduler(self, address: str) -> tuple[str, int]:
        """Return the host and port by which the caller reaches the scheduler that listens at `address` over there."""

    async def stop(self) -> str | None:
        """End all that it runs and remove its files; return what may be left, and why, or None when that is confirmed.

        May be called twice, and before `start` has ended. Takes as long as data is being sent.

        Raises
        ------
        VolumeError
            Data could not be sent; everything else has ended.
        """


class LocalAgent:
    """An agent on this host, which ends with us: it plays all nodes of the pool."""

    machine = "local"
    facts: Machine | None = None
    has_unsent = False

    def __init__(self, config: AgentConfig, environment: dict[str, str]) -> None:
        self.nodes: set[int] = {n.node for n in config.nodes}
        self._config = config
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def __repr__(self) -> str:
        return f"<LocalAgent of nodes {sorted(self.nodes)}>"

    def instance_id(self, node: int) -> str:
        return instance_id(self._config.pool_id, node)

    def spawn(self) -> None:
        """Start its process early, so that it starts while this process still imports modules.

        The caller also calls `stop`, or `kill` where there is no event loop.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "skyward.node.agent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # a new process group: Ctrl-C does not reach it, one kill ends it all
        )
        _forget_after_fork(self._process)
        self._write(self._config.to_json())

    async def start(self, heard: Heard) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, args=[loop, heard], name="skyward-agent", daemon=True).start()

    def _listen(self, loop: asyncio.AbstractEventLoop, heard: Heard) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "failed":
                path = self._keep([event["error"], "", *event["last_lines"]])
                event["log"] = path and str(path)
            with contextlib.suppress(RuntimeError):  # the loop has ended before the agent
                loop.call_soon_threadsafe(heard, event)
        status = self._process.wait()
        if not self._stopping:
            why = f"status {status}"
            if path := self._keep_file("agent", why):
                why += f"; its log is {path}"
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(heard, {"event": "ended", "why": why})

    async def keep_log(self, step: str, error: str) -> Path | None:
        return await asyncio.to_thread(self._keep_file, step, error)

    def _keep_file(self, step: str, error: str) -> Path | None:
        """Keep the log that agent, scheduler and workers write; None if it is gone, or empty."""
        from skyward.node.agent import LOG

        text = ""
        with contextlib.suppress(OSError):
            text = (Path(self._config.folder) / LOG).read_text(errors="replace")
        return self._keep([f"failed at {step}: {error}", "", text]) if text else None

    def _keep(self, lines: Sequence[str]) -> Path | None:
        return boot_logs.keep(self._config.pool_id, self.machine, "\n".join([*lines, ""]))

    async def answers(self) -> bool:
        return True  # this host does

    def send(self, command: dict[str, Any]) -> None:
        self._write(json.dumps(command))

    def _write(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it died: `_listen` reports that
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    async def reach(self, port: int) -> tuple[str, int]:
        return "127.0.0.1", port

    async def reach_scheduler(self, address: str) -> tuple[str, int]:
        return "127.0.0.1", int(address.rpartition(":")[2])

    async def stop(self) -> str | None:
        self._stopping = True
        process = self._process
        if process is not None:
            self.send({"do": "stop"})
            try:
                await asyncio.to_thread(process.wait, 3)
            except subprocess.TimeoutExpired:
                logger.debug("agent %s did not stop, killed", process.pid)
        await asyncio.to_thread(self.kill)
        return None

    def kill(self) -> None:
        """End all that is left of it at once, e.g. processes that tasks have started, and remove its files."""
        self._stopping = True
        process = self._process
        if process is not None:
            if process.poll() is None:  # it hangs, and what it has adopted would be init's
                from skyward.node.descendants import kill_descendants

                kill_descendants(process.pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, 9)
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        for folder in (self._config.folder, *self._config.remove):
            shutil.rmtree(folder, ignore_errors=True)


def instance_id(pool_id: str, node: int) -> str:
    """Return the name of a node that this host plays."""
    return f"local-{pool_id}-{node}"


def _forget_after_fork(process: subprocess.Popen[bytes]) -> None:
    """Keep a forked child from holding the agent's standard input open, and the agent alive, after we are gone."""

    def close() -> None:
        if process.stdin is not None and not process.stdin.closed:
            # Without flushing, which would write what is the parent's to write.
            with contextlib.suppress(OSError):
                getattr(process.stdin, "raw", process.stdin).close()

    os.register_at_fork(after_in_child=close)
