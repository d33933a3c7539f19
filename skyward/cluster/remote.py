"""The caller's end of an agent on another machine, reached over SSH: started, heard, given commands, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import asyncssh

from skyward import events
from skyward.cluster import boot_logs
from skyward.cluster.agents import Heard
from skyward.cluster.base import TOLD_BY_EVENT
from skyward.cluster.bootstrap import Bootstrap, Shipment
from skyward.cluster.flush import flush
from skyward.cluster.heartbeat import Heartbeat, Heartbeats, touch
from skyward.cluster.listing import Listing
from skyward.cluster.machine_commands import clean_command, logs_command, pool_folder
from skyward.cluster.ssh import CONNECT_TIMEOUT_S, SSH_ERRORS, Link, NotListening
from skyward.cluster.tasks import end_tasks
from skyward.cluster.tunnel import Tunnel
from skyward.errors import BootstrapError, VolumeError
from skyward.node.agent import SOCKET
from skyward.node.config import AgentConfig, NodeSpec
from skyward.providers.base import Machine
from skyward.scripts.volumes import Left, buckets, size

logger = logging.getLogger(__name__)

UNREACHABLE_S = 45.0
"""Seconds that a machine may be out of reach before the pool goes on without it.
Chosen, not measured: a router restarts in less."""
_AGAIN_S = 0.2
_ASK_S = 5.0
"""Seconds that a machine is out of reach before its cloud is asked whether it is still there, and between questions."""
_LOOK_S = 1.0
_ANSWER_S = 5.0
"""Seconds that a machine may take to answer. Chosen, not measured: a busy one takes one."""
_STOP_S = 15.0
_SHARED_BEATS = 4
"""Heartbeats in a row over a connection that carries all data, after which a warning says so. Fewer: a short break."""
_TELL_FLUSH_S = 5.0
"""Seconds that sending what was written to volumes takes before it is told of, and between the tellings."""
_LOG_S = 10.0
"""Seconds that the logs of a machine that failed may take to arrive.
Chosen, not measured: nobody waits longer for bad news."""


class _Gone(Exception):  # noqa: N818 - it says what is the case
    """The machine's cloud says that it does not exist any more."""


class RemoteAgent:
    """The agent on one machine, for one node.

    `listing` tells whether a machine that is out of reach still exists; None: this can't be found out.
    """

    def __init__(
        self,
        machine: Machine,
        node: NodeSpec,
        config: AgentConfig,
        shipment: Shipment,
        emit: Callable[[Any], None],
        heartbeats: Heartbeats,
        listing: Listing | None = None,
    ) -> None:
        self.nodes: set[int] = {node.node}
        self.machine: str = str(machine.login)
        self.facts: Machine = machine
        self._config = replace(
            config, nodes=(node,), folder=pool_folder(config.pool_id), heartbeat_s=heartbeats.limit_s,
            power_off=not machine.outlives_pool, notice="aws" if machine.spot and machine.provider == "aws" else "",
            networks=machine.networks,
        )  # fmt: skip
        self._listing = listing
        self._emit = emit
        self._link = Link(machine.login)
        self._bootstrap = Bootstrap(machine, self._link, self._config, shipment, emit)
        self._tunnel = Tunnel(self._link, f"{self._config.folder}/{SOCKET}")
        self._heartbeats = heartbeats
        self._heartbeat: Heartbeat | None = None
        self._beating: asyncio.Task[None] | None = None
        self._writer: Any = None
        self._commands: list[dict[str, Any]] = []  # all that were given, for an agent that has not got them
        self._talking: asyncio.Task[None] | None = None
        self._hear: Heard = lambda _: None  # set when it is started
        self._seen = 0  # events that the agent keeps and that have been heard
        self._stopped = False
        self._buckets = buckets(shipment.volumes)
        self._flushed = False

    def __repr__(self) -> str:
        return f"<RemoteAgent of node {min(self.nodes)} on {self.machine}>"

    @property
    def has_unsent(self) -> bool:
        return self._bootstrap.has_begun and bool(self._buckets) and not self._flushed

    @property
    def link(self) -> Link:
        return self._link

    async def answers(self) -> bool:
        if self._writer is None:
            return False
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._link.run("true")
        except (TimeoutError, *SSH_ERRORS):
            return False
        return await self._is_there()

    async def _is_there(self) -> bool:
        """Ask the cloud whether the machine exists; without a cloud to ask, assume that it does."""
        return self._listing is None or await self._listing.has(self.facts)

    def instance_id(self, node: int) -> str:  # noqa: ARG002 - it has only one
        return self.facts.id

    # --- start ----------------------------------------------------------------------------------------------

    async def start(self, heard: Heard) -> None:
        self._hear = heard
        self._emit(events.BootstrapStarting(instance_id=self.facts.id))
        try:
            await self._prepare()
        except BootstrapError as exc:
            exc.instance_id = self.facts.id
            path = await self.keep_log(exc.step, str(exc))
            if path is not None:
                exc.log = str(path)
                exc.args = (f"{exc}\nIts log is {path}",)
            raise
        assert self._heartbeat is not None
        self._talking = asyncio.create_task(self._talk(heard, self._heartbeat))
        self._emit(events.BootstrapCompleted(instance_id=self.facts.id))

    async def _prepare(self) -> None:
        await self._bootstrap.log_in()
        loop = asyncio.get_running_loop()
        self._heartbeat = self._heartbeats.start(
            self.facts.login, self._config.folder, lambda: loop.call_soon_threadsafe(self._give_up_agent)
        )
        self._beating = asyncio.create_task(self._beat(self._heartbeat))
        await self._bootstrap.run()

    async def keep_log(self, step: str, error: str) -> Path | None:
        # What was heard of the machine, and its own logs where it still answers.
        heard = [f"{self.machine}, machine {self.facts.id} of pool {self._config.pool_id}: failed at {step}", "", error]
        heard += ["", "== heard", *self._bootstrap.heard]
        if self._link.noise:
            heard += ["", "== printed by the login", self._link.noise]
        if self._bootstrap.has_begun:
            with contextlib.suppress(TimeoutError, *SSH_ERRORS):  # what was heard has to do
                async with asyncio.timeout(_LOG_S):
                    done = await self._link.run(logs_command(self._config.folder, cloud=not self.facts.outlives_pool))
                    heard += ["", done.output]
        return await asyncio.to_thread(boot_logs.keep, self._config.pool_id, self.facts.id, "\n".join(heard) + "\n")


    # --- talk -----------------------------------------------------------------------------------------------

    def send(self, command: dict[str, Any]) -> None:
        self._commands.append(command)
        self._write(command)

    def _write(self, command: dict[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            with contextlib.suppress(OSError, asyncssh.Error):  # given again over the next connection
                self._writer.write(json.dumps(command).encode() + b"\n")

    async def _talk(self, heard: Heard, heartbeat: Heartbeat) -> None:
        """Talk with the agent, over one connection after another, until it has ended or is out of reach for long."""
        while not self._stopped:
            # Side by side: a cloud that answers late must not keep us from a machine that is there.
            asking = asyncio.create_task(self._ask_until_gone(heartbeat))
            tasks = [asking, asyncio.create_task(self._converse(heard))]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                done.pop().result()
            except _Gone:
                self._vanished()
                heard(self._ended("its provider has taken it away", self._heartbeats.silence_s, gone=True))
                return
            except NotListening:
                silence_s = heartbeat.silence_s
                gone = not await self._is_there()  # one that is shut down ends agents first
                why = "the agent is not running any more"
                if not gone and not self._stopped and (path := await self.keep_log("agent", why)):
                    why += f"; its log is {path}"
                heard(self._ended(why, silence_s, gone=gone))
                return
            except SSH_ERRORS as exc:
                why = f"out of reach for {UNREACHABLE_S:g} s: {str(exc) or 'no answer'}"
                heard(self._ended(why, self._heartbeats.silence_s))
                return
            finally:
                await end_tasks(tasks)

    def _ended(self, why: str, silence_s: float, *, gone: bool = False) -> dict[str, Any]:
        """Return the event of the agent's end. The reason is ours when it has heard nothing for too long."""
        limit_s = self._heartbeats.limit_s
        is_silence = silence_s >= limit_s
        if is_silence:
            why = (
                f"this process was suspended or could not send heartbeats for {silence_s:.0f} s "
                f"(limit heartbeat_timeout={limit_s:g} s), so its machines shut themselves down"
            )
        return {"event": "ended", "why": why, "gone": gone, "silence": is_silence}

    def _give_up_agent(self) -> None:
        """Count an agent as lost that answers no heartbeats, although its machine does."""
        if self._talking is not None and not self._stopped and self._talking.cancel():
            self._hear(self._ended(f"the agent has answered no heartbeat for {UNREACHABLE_S:g} s", 0.0))

    async def _ask_until_gone(self, heartbeat: Heartbeat) -> NoReturn:
        while True:
            await asyncio.sleep(_ASK_S)
            while self._writer is not None and heartbeat.error is None:  # long before its connection is known as lost
                await asyncio.sleep(_LOOK_S)
            if not await self._is_there():
                raise _Gone

    async def _connect_again(self) -> tuple[Any, Any]:
        """Return a new connection to the agent, or raise why there is none after `UNREACHABLE_S`."""
        deadline = time.monotonic() + UNREACHABLE_S
        patience, is_last = _ASK_S, False
        while True:
            try:
                async with asyncio.timeout(patience):
                    return await self._link.open_socket(f"{self._config.folder}/{SOCKET}")
            except NotListening:
                raise
            except SSH_ERRORS:
                if is_last:
                    raise
            if time.monotonic() > deadline:
                if not await self._is_there():
                    raise _Gone
                is_last = True  # asking opens the firewall for a caller whose address has changed: worth another try
            patience = min(1.5 * patience, CONNECT_TIMEOUT_S)  # a busy machine may need more
            await asyncio.sleep(_AGAIN_S)

    async def _converse(self, heard: Heard) -> None:
        """Hear the agent over a new connection until that is lost, or raise why there is none."""
        reader, writer = await self._connect_again()
        try:
            writer.write(json.dumps({"seen": self._seen}).encode() + b"\n")
            have = json.loads(await reader.readline() or '{"commands": 0}')["commands"]
            self._writer = writer
            for command in self._commands[have:]:
                self._write(command)
            while line := await reader.readline():
                event = json.loads(line)
                self._seen += event["event"] != "metrics"  # which the agent does not keep
                if event["event"] == "failed" and (path := await self.keep_log("workers", _words(event))):
                    event |= {"log": str(path)}
                heard(event)
        except (*SSH_ERRORS, ValueError) as exc:  # a ForceCommand may print at the end
            logger.debug("lost the agent on %s: %s", self.machine, exc)
        finally:
            self._writer = None

    async def _beat(self, heartbeat: Heartbeat) -> None:
        """Send heartbeats over this connection while they have none: a machine may refuse a second login."""
        sent = 0
        while True:
            await asyncio.sleep(heartbeat.period_s)
            why = heartbeat.error
            if why is None or not await self._send_beat():
                sent = 0
                continue
            heartbeat.note_beat()
            sent += 1
            if sent == _SHARED_BEATS:
                text = "%s: heartbeats share one SSH connection with all data, which may delay them: %s"
                logger.warning(text, self.machine, why)

    async def _send_beat(self) -> bool:
        """Send a heartbeat over this connection, if there is one now."""
        if self._talking is not None:
            self._write({"do": "beat"})
            return self._writer is not None
        with contextlib.suppress(*SSH_ERRORS):  # whatever else is under way fails too, and says why
            return not (await self._link.run(touch(self._config.folder))).status
        return False

    async def reach(self, port: int) -> tuple[str, int]:
        return "127.0.0.1", await self._tunnel.listen(f"127.0.0.1:{port}")

    async def reach_scheduler(self, address: str) -> tuple[str, int]:
        return "127.0.0.1", await self._tunnel.listen(address.rpartition("://")[2])

    # --- stop -----------------------------------------------------------------------------------------------

    async def stop(self) -> str | None:
        if self._stopped:
            return None
        self._stopped = True
        if self._talking is not None:
            self.send({"do": "stop"})
            self._talking.cancel()
        if self._heartbeat is not None and self._beating is not None:
            await end_tasks([self._beating])
            await self._heartbeats.stop(self._heartbeat)
        try:
            left = await self._clean_up()
            if left is not None and not await self._is_there():
                self._vanished()
            await self._flush()
        finally:
            await self._tunnel.close()
            await self._link.close()
        return left

    async def _clean_up(self) -> str | None:
        """End all of the pool on a machine that stays, or that still has data to send; return what may be left."""
        if not (self._bootstrap.has_begun and (self.facts.outlives_pool or self._buckets)):
            return None
        try:
            await asyncio.wait_for(self._clean(), _STOP_S)
        except (TimeoutError, *SSH_ERRORS) as exc:
            why = str(exc) or type(exc).__name__
            if self.facts.outlives_pool:
                why += f"; it cleans itself after {self._heartbeats.limit_s:g} s"
            logger.warning("%s could not be cleaned: %s", self.machine, why)
            return f"{self.machine}: {why}"
        return None

    async def _clean(self) -> None:
        done = await self._link.run(clean_command(self._config.pool_id))
        if done.status:
            raise OSError(done.error.strip() or f"status {done.status}")

    # --- data -----------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Send what was written to volumes, and tell of it when that takes long."""
        if not self.has_unsent:
            return
        tell_at = time.monotonic() + _TELL_FLUSH_S

        def on_left(left: Left) -> None:
            nonlocal tell_at
            if time.monotonic() >= tell_at:
                tell_at = time.monotonic() + _TELL_FLUSH_S
                logger.info("%s: sending %s: %s left", self._name, left.path, left, extra=TOLD_BY_EVENT)
                step = f"sending {left.path}: {size(left.bytes)} left"
                self._emit(events.BootstrapProgress(instance_id=self.facts.id, step=step))

        try:
            await flush(self._link, self._name, self._buckets, on_left)
        except VolumeError as exc:
            self._tell_unsent(f"{exc}\nThe machine is destroyed, and these files with it")
            self._flushed = True
            raise
        self._flushed = True

    def _vanished(self) -> None:
        """Note that the machine is not there any more: there is nothing to clean up, and nothing can be sent."""
        if self.has_unsent:
            where = ", ".join(f"{path} ({bucket})" for path, bucket in self._buckets.items())
            self._tell_unsent(f"{self._name} is gone: what it wrote last to {where} may be lost")
        self._bootstrap.has_begun = False

    def _tell_unsent(self, message: str) -> None:
        logger.error("%s", message, extra=TOLD_BY_EVENT)
        self._emit(events.Error(message=message, instance_id=self.facts.id))

    @property
    def _name(self) -> str:
        return ", ".join(f"node {node}" for node in sorted(self.nodes)) + f" ({self.facts.id})"


def _words(failed: dict[str, Any]) -> str:
    return "\n".join([failed["error"], *failed.get("last_lines", ())])
