"""Agents on machines of their own, reached over SSH: made ready, started, heard, and cleaned up after."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import shlex
import tarfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import asyncssh

from skyward import events
from skyward.accelerators import devices
from skyward.accelerators.devices import Reading
from skyward.accelerators.model import Accelerator
from skyward.cluster import boot_logs
from skyward.cluster.agents import Heard
from skyward.cluster.flush import flush
from skyward.cluster.heartbeat import Heartbeat, Heartbeats, touch
from skyward.cluster.listing import Listing
from skyward.cluster.slots import node_spec
from skyward.cluster.ssh import CONNECT_TIMEOUT_S, Link, NotListening, end_tasks
from skyward.cluster.tunnel import Tunnel
from skyward.cluster.wheel import Wheel
from skyward.errors import BootstrapError, VolumeError
from skyward.node.agent import CONFIG, LOG, SOCKET
from skyward.node.config import AgentConfig, NodeSpec
from skyward.node.descendants import SEPARATE
from skyward.node.tls import CLOCKS_S
from skyward.node.watch import BEAT
from skyward.providers.base import Machine
from skyward.scripts.bootstrap import (
    HOME,
    LAST_LINES,
    NEUTRAL,
    POOL,
    POWER_OFF,
    Progress,
    Recipe,
    read_progress,
    script,
)
from skyward.scripts.mig import partition_script
from skyward.scripts.volumes import Left, buckets, mount_script, size
from skyward.spec.volume import S3Volume

logger = logging.getLogger(__name__)

UNREACHABLE_S = 45.0
"""Seconds that a machine may be out of reach before the pool goes on without it.
Chosen, not measured: a router restarts in less."""
_AGAIN_S = 0.2
_ASK_S = 5.0
"""Seconds that a machine is out of reach before its cloud is asked whether it is still there, and between questions."""
_ANSWER_S = 5.0
"""Seconds that a machine may take to answer. Chosen, not measured: a busy one takes one."""
_STOP_S = 15.0
_FIRST_LOGIN_S = 3.0
_SHARED_BEATS = 4
"""Heartbeats in a row over a connection that carries all data, after which a warning says so. Fewer: a short break."""
_TOLD = {"told_by_event": True}
_TELL_FLUSH_S = 5.0
"""Seconds that sending what was written to volumes takes before it is told of, and between the tellings."""
_LOG_S = 10.0
"""Seconds that the logs of a machine that failed may take to arrive.
Chosen, not measured: nobody waits longer for bad news."""
_HEARD_LINES = 10_000
_READ_DEVICES = shlex.quote(
    "import sys; sys.path.insert(0, sys.argv[1]); from skyward.accelerators.devices import read; "
    "print(read(sys.argv[2]).to_json())"
)
_TOOLS = (
    "awk", "cat", "date", "df", "dirname", "env", "grep", "head", "ln", "ls", "mkdir", "mv", "readlink", "rm", "rmdir",
    "sed", "sh", "sleep", "tail", "touch", "tr", "uname",
)  # fmt: skip
"""Programs that the commands and scripts for machines use, all of POSIX."""
_DETACHED = "$(command -v setsid || echo nohup)"
_CLOCK_MARGIN_S = 600.0
"""Seconds within which a clock that is just about right may go further wrong. Chosen, not measured."""
_ADVICE = {
    "apt": "Check the names in Image(apt=...).",
    "packages": "Check the names and versions in Image(pip=...).",
    "include": "Check the files in Image(include=...), and the space on the machine's disk.",
}
"""What to do about a step that failed, where what it said may not tell."""
_LOOKS = 4  # times that a watch on a machine looks for a beat in vain before it ends the pool's processes
_TROUBLE = (OSError, asyncssh.Error, BootstrapError)


class _Gone(Exception):  # noqa: N818 - it says what is the case
    """The machine's cloud says that it does not exist any more."""


def pool_folder(pool_id: str) -> str:
    """Return the folder on a machine for what lives no longer than the pool. Short: a socket's path has a limit."""
    return f"/tmp/skyward-{pool_id}"


@dataclass(frozen=True, slots=True)
class Shipment:
    """What every machine of a pool gets: its environment's recipe, skyward itself, and the user's files.

    `accelerator` is what each has to have.
    """

    recipe: Recipe
    wheel: Wheel
    include: tuple[str, ...] = ()
    volumes: tuple[S3Volume, ...] = ()
    accelerator: Accelerator | None = None

    def files(self) -> bytes:
        """Return the user's files as a compressed archive.

        Raises
        ------
        FileNotFoundError
            One is not there.
        """
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            for path in self.include:
                target = Path(path).resolve()
                inside = not Path(path).is_absolute() and ".." not in Path(path).parts
                tar.add(target, arcname=path if inside else target.name)
        return archive.getvalue()


class RemoteAgent:
    """The agent on one machine, for one node.

    `listing` knows whether a machine that is out of reach still exists. None: nobody knows.
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
        self.nodes = {node.node}
        self.machine = str(machine.login)
        self.facts: Machine = machine
        self._config = replace(
            config, nodes=(node,), folder=pool_folder(config.pool_id), heartbeat_s=heartbeats.limit_s,
            power_off=not machine.outlives_pool, notice="aws" if machine.spot and machine.provider == "aws" else "",
            networks=machine.networks,
        )  # fmt: skip
        self._listing = listing
        self._shipment = shipment
        self._emit = emit
        self._link = Link(machine.login)
        self._tunnel = Tunnel(self._link, f"{self._config.folder}/{SOCKET}")
        self._heartbeats = heartbeats
        self._heartbeat: Heartbeat | None = None
        self._beating: asyncio.Task[None] | None = None
        self._writer: Any = None
        self._commands: list[dict[str, Any]] = []  # all that were given, for an agent that has not got them
        self._talking: asyncio.Task[None] | None = None
        self._hear: Heard = lambda _: None  # set when it is started
        self._seen = 0  # events that the agent keeps and that have been heard
        self._step = ""
        self._heard: deque[str] = deque(maxlen=_HEARD_LINES)
        self._started = False
        self._stopped = False
        self._buckets = buckets(shipment.volumes)
        self._flushed = False

    def __repr__(self) -> str:
        return f"<RemoteAgent of node {min(self.nodes)} on {self.machine}>"

    @property
    def has_unsent(self) -> bool:
        return self._started and bool(self._buckets) and not self._flushed

    @property
    def link(self) -> Link:
        return self._link

    async def answers(self) -> bool:
        if self._writer is None:
            return False
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._link.run("true")
        except (TimeoutError, *_TROUBLE):
            return False
        return await self._is_there()

    async def _is_there(self) -> bool:
        """Ask its cloud for the machine; where nobody is to be asked, it is taken to be there."""
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
        self._progress("ssh")
        if self.facts.outlives_pool:
            await self._link.connect()
        else:
            await self._log_in_when_booted()
        self._started = True  # from here on there is something to clean up
        loop = asyncio.get_running_loop()
        self._heartbeat = self._heartbeats.start(
            self.facts.login, self._config.folder, lambda: loop.call_soon_threadsafe(self._give_up_agent)
        )
        self._beating = asyncio.create_task(self._beat(self._heartbeat))
        try:
            await self._start()
        except (OSError, asyncssh.Error) as exc:
            raise self._failed(self._step, 255, (str(exc) or type(exc).__name__,)) from exc

    async def keep_log(self, step: str, error: str) -> Path | None:
        # What was heard of the machine, and its own logs where it still answers.
        heard = [f"{self.machine}, machine {self.facts.id} of pool {self._config.pool_id}: failed at {step}", "", error]
        heard += ["", "== heard", *self._heard]
        if self._link.noise:
            heard += ["", "== printed by the login", self._link.noise]
        if self._started:
            with contextlib.suppress(TimeoutError, *_TROUBLE):  # what was heard has to do
                async with asyncio.timeout(_LOG_S):
                    done = await self._link.run(_logs_command(self._config.folder, cloud=not self.facts.outlives_pool))
                    heard += ["", done.output]
        return await asyncio.to_thread(boot_logs.keep, self._config.pool_id, self.facts.id, "\n".join(heard) + "\n")

    async def _log_in_when_booted(self) -> None:
        """Log in to a machine that may still boot: until then it may refuse, or not be what we expect."""
        deadline = time.monotonic() + self.facts.boot_s
        patience = _FIRST_LOGIN_S
        while True:
            try:
                async with asyncio.timeout(patience):
                    await self._link.connect()
                return
            except (TimeoutError, *_TROUBLE) as exc:
                if time.monotonic() > deadline:
                    waited = f"no login within {self.facts.boot_s:g} s. If it takes longer to boot, raise boot_timeout="
                    said = (waited, str(exc), _admitted(self.facts.admitted))
                    raise self._failed("boot", 255, said) from exc
            patience = min(1.5 * patience, CONNECT_TIMEOUT_S)  # a busy machine may need more
            await asyncio.sleep(_AGAIN_S)

    async def _start(self) -> None:
        host = self.facts.private_ip or await self._own_address()
        await self._make_ready()
        if self._shipment.accelerator is not None:
            await self._equip(self._shipment.accelerator)
        self._progress("agent")
        await self._launch(replace(self._config, host=host))

    def _progress(self, step: str) -> None:
        self._step = step
        self._note(f"step {step}")
        self._emit(events.BootstrapProgress(instance_id=self.facts.id, step=step))

    def _note(self, line: str) -> None:
        self._heard.append(f"{time.strftime('%H:%M:%S')} {line}")

    async def _own_address(self) -> str:
        """Return the address under which the machine was logged in to, as it sees it itself: peers use it too."""
        done = await self._link.run('set -- $SSH_CONNECTION; echo "$3"')
        address = done.output.strip()
        if done.status or not address:
            raise self._failed("address", done.status, (done.error.strip(),))
        return address

    async def _make_ready(self) -> None:
        shipment, folder = self._shipment, self._config.folder
        wheel = f'"{HOME}/wheels/{shipment.wheel.name}"'
        # In the pool's own folder: it may hold an index's password, and other pools have scripts of their own.
        bootstrap = f"{folder}/bootstrap.sh"
        self._progress("upload")
        if not await self._begin(wheel):
            await self._link.write(wheel, shipment.wheel.data)
        await self._link.write(bootstrap, script(shipment.recipe, outlives_pool=self.facts.outlives_pool).encode())
        await self._run_steps(bootstrap)
        if shipment.volumes:
            mount = f"{folder}/mount.sh"
            await self._link.write(mount, mount_script(shipment.volumes, region=self.facts.region).encode())
            await self._run_steps(mount)

    async def _begin(self, wheel: str) -> bool:
        """Check what every later step needs, start the watch, and return whether the machine has our wheel."""
        watch = watch_command(self._config.pool_id, self._heartbeats.limit_s, power_off=self._config.power_off)
        claim = _claim_command(self._config.folder, f"node {min(self.nodes)} ({self.machine})")
        asked = time.time()
        done = await self._link.run(
            f"lacks=0; lack() {{ echo lacks $1; lacks=1; }}; "
            f"for tool in {' '.join(_TOOLS)}; do command -v $tool > /dev/null || lack $tool; done; "
            f"[ -r /proc/$$/environ ] || lack /proc; [ $lacks = 0 ] || exit 1; "
            f"date +clock=%s; {claim}; {watch} || exit; test ! -e {wheel} || echo wheel"
        )
        lines = done.output.splitlines()
        if lacks := [line.removeprefix("lacks ") for line in lines if line.startswith("lacks ")]:
            raise self._failed("upload", 1, (f"it lacks {', '.join(lacks)}, which skyward needs: install it there",))
        if off := _clock_error(lines, asked, time.time()):
            raise self._failed("upload", 1, (off,))
        if claimed := [line.removeprefix("claimed ") for line in lines if line.startswith("claimed ")]:
            self._started = False  # the folder is another node's: not ours to clean
            said = (
                f"{claimed[0]} uses {self._config.folder} there: this is the same host under another name, "
                "or one that shares its /tmp. Give sky.SSH each host once"
            )
            raise self._failed("upload", 1, (said,))
        if done.status:
            advice = f"{self._config.folder} can't be made: check permissions, `df -h /tmp` and `df -i /tmp`"
            raise self._failed("upload", done.status, (*done.error.splitlines(), advice))
        return "wheel" in lines

    async def _run_steps(self, path: str) -> None:
        """Run a script that says which step it is at, and raise if one fails."""
        output: list[str] = []

        def hear(line: str) -> None:
            output.append(line)
            self._note(line)
            progress = read_progress([line])
            if progress is not None and progress.status is None and progress.step != "done":
                self._progress(progress.step)

        status = await self._link.lines(f"{POOL}={self._config.pool_id} sh {path}", hear)
        if status:
            found = read_progress(output) or Progress(self._step, status, tuple(output[-LAST_LINES:]))
            raise self._failed(found.step, found.status or status, found.lines)

    async def _equip(self, wanted: Accelerator) -> None:
        """Find the machine's accelerators, partition them where that is wanted, and give each slot its share."""
        if wanted.mig:
            path = f"{self._config.folder}/mig.sh"
            await self._link.write(path, partition_script(wanted, keep=self.facts.outlives_pool).encode())
            await self._run_steps(path)
        self._progress("gpu")
        recipe = self._shipment.recipe
        done = await self._link.run(f"{recipe.interpreter} -I -c {_READ_DEVICES} {recipe.import_path} {wanted.vendor}")
        if done.status:
            raise self._failed("gpu", done.status, done.error.splitlines())
        try:
            reading = Reading.from_json(done.output.rstrip().rpartition("\n")[2])  # a sitecustomize may print before
        except ValueError:
            raise self._failed("gpu", 0, done.output.splitlines()) from None
        if missing := devices.missing(wanted, reading):
            raise self._failed("gpu", 1, (missing,))
        named = devices.names(wanted, reading.devices)
        nodes = [
            node_spec(node.node, len(node.environments), wanted, named, self._config.environment)
            for node in self._config.nodes
        ]
        self._config = replace(self._config, nodes=tuple(nodes))

    async def _launch(self, config: AgentConfig) -> None:
        folder = config.folder
        await self._link.write(f"{folder}/{CONFIG}", config.to_json().encode())
        if self._shipment.include:
            files = await asyncio.to_thread(self._shipment.files)
            done = await self._link.run(
                f"mkdir -p {folder}/work && tar xozf - -C {folder}/work", input=files
            )
            if done.status:
                raise self._failed("include", done.status, done.error.splitlines())
        # Detached from this login: the agent outlives a lost connection. The socket in its folder is the way to it.
        command = (
            f"{NEUTRAL}; mkdir -p {folder}/work {folder}/tmp && cd {folder}/work || exit 1; "
            f"SKYWARD_POOL={config.pool_id} TMPDIR={folder}/tmp PYTHONPATH={self._shipment.recipe.import_path} "
            f"{_DETACHED} {self._shipment.recipe.interpreter} -m skyward.node.agent --serve {folder} "
            f"> {folder}/{LOG} 2>&1 < /dev/null & set -- $! {_facts_of('$!')}; echo $1 ${{21}}"
        )
        done = await self._link.run(command)
        if done.status:
            raise self._failed("agent", done.status, tuple(done.error.splitlines()[-LAST_LINES:]))
        pid, started = [*done.output.split(), "0"][:2]  # one that has died already has no start time
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(NotListening):
                _, writer = await self._link.open_socket(f"{folder}/{SOCKET}")
                writer.close()
                return
            if time.monotonic() > deadline or not await self._is_alive(int(pid), int(started)):
                log = await self._link.run(f"tail -n {LAST_LINES} {folder}/{LOG}")
                raise self._failed("agent", 1, tuple(log.output.splitlines()))
            await asyncio.sleep(0.05)

    async def _is_alive(self, pid: int, started: int) -> bool:
        """Tell whether the process that started as the agent still runs: it has its number and its start time."""
        socket = f"{self._config.folder}/{SOCKET}"
        is_it = f'set -- {_facts_of(str(pid))}; [ "${{1:-Z}}" != Z ] && [ "${{20}}" = {started} ]'
        done = await self._link.run(f"{is_it} || test -S {socket}")
        return done.status == 0

    def _failed(self, step: str, status: int, lines: Sequence[str]) -> BootstrapError:
        lines = [line for line in lines if line.strip()]
        said = "\n  ".join(["its last lines:", *lines]) if lines else "it said nothing"
        advice = f"\n{_ADVICE[step]}" if step in _ADVICE else ""
        return BootstrapError(
            f"{self.machine} could not be made ready: step {step!r} failed with status {status}; {said}{advice}",
            machine=self.machine,
            step=step,
            status=status,
            last_lines=tuple(lines[-LAST_LINES:]),
        )

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
            tasks = [asyncio.create_task(self._ask_until_gone()), asyncio.create_task(self._connect_again())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                reader, writer = done.pop().result()
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
            except _TROUBLE as exc:
                why = f"out of reach for {UNREACHABLE_S:g} s: {str(exc) or 'no answer'}"
                heard(self._ended(why, self._heartbeats.silence_s))
                return
            finally:
                await end_tasks(tasks)
            await self._converse(heard, reader, writer)

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

    async def _ask_until_gone(self) -> NoReturn:
        while True:
            await asyncio.sleep(_ASK_S)
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
            except _TROUBLE:
                if is_last:
                    raise
            if time.monotonic() > deadline:
                if not await self._is_there():
                    raise _Gone
                is_last = True  # asking opens the firewall for a caller whose address has changed: worth another try
            patience = min(1.5 * patience, CONNECT_TIMEOUT_S)  # a busy machine may need more
            await asyncio.sleep(_AGAIN_S)

    async def _converse(self, heard: Heard, reader: Any, writer: Any) -> None:
        """Hear the agent over one connection until that is lost."""
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
        except (*_TROUBLE, ValueError) as exc:  # a ForceCommand may print at the end
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
        with contextlib.suppress(*_TROUBLE):  # whatever else is under way fails too, and says why
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
        if not (self._started and (self.facts.outlives_pool or self._buckets)):
            return None
        try:
            await asyncio.wait_for(self._clean(), _STOP_S)
        except (TimeoutError, *_TROUBLE) as exc:
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
                logger.info("%s: sending %s: %s left", self._name, left.path, left, extra=_TOLD)
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
        self._started = False

    def _tell_unsent(self, message: str) -> None:
        logger.error("%s", message, extra=_TOLD)
        self._emit(events.Error(message=message, instance_id=self.facts.id))

    @property
    def _name(self) -> str:
        return ", ".join(f"node {node}" for node in sorted(self.nodes)) + f" ({self.facts.id})"


def _claim_command(folder: str, mine: str) -> str:
    """Return the shell command that takes the pool's folder for one node, or names the node that has it and exits.

    The claim is a symbolic link: it gets its name and its text at once, and when two nodes try only one succeeds. Host
    keys and machine ids would not do: cloned hosts have the same.
    """
    claim = f"{folder}/node"
    return (
        f"mkdir -m 700 -p {folder} && {{ ln -s {shlex.quote(mine)} {claim} 2> /dev/null || "
        f'[ "$(readlink {claim})" = {shlex.quote(mine)} ] || {{ [ -x {folder} ] && [ ! -L {claim} ]; }} || '
        f'{{ echo "claimed $(readlink {claim} || ls -ld {folder})"; exit 1; }}; }}'
    )


def watch_command(pool_id: str, patience_s: float, *, power_off: bool) -> str:
    """Return the shell command that starts a watch on a machine: without beats for so long, it ends all of the pool.

    It does so until there is an agent, which has its own heartbeat.
    """
    folder = pool_folder(pool_id)
    end = clean_command(pool_id) + (f"; {POWER_OFF}" if power_off else "")
    watch = (
        f"missed=0; while [ $missed -lt {_LOOKS} ]; do sleep {patience_s / _LOOKS:g}; "
        f"[ -d {folder} ] && ! [ -S {folder}/{SOCKET} ] || exit 0; "
        f"if rm {folder}/{BEAT} 2> /dev/null; then missed=0; else missed=$((missed + 1)); fi; done; {end}"
    )
    return (
        f"mkdir -p {folder} && "
        f"{{ {POOL}={pool_id} {_DETACHED} sh -c {shlex.quote(watch)} > /dev/null 2>&1 < /dev/null & }}"
    )


def _admitted(ranges: Sequence[str]) -> str:
    """Return what a firewall has to do with a login that fails; empty where there is none."""
    if not ranges:
        return ""
    return (
        f"The firewall lets SSH in from {', '.join(ranges)} alone. If SSH leaves from another address, as behind a "
        "proxy or VPN, name it in caller_cidrs= or SKYWARD_CALLER_IP"
    )


def _facts_of(pid: str) -> str:
    """Return shell words for the state of a process, its parent and so on: field 20 is when it started (proc(5))."""
    return f"$(sed 's/.*) //' /proc/{pid}/stat)"


def _clock_error(lines: Sequence[str], asked: float, answered: float) -> str | None:
    """Return what is wrong with a machine's clock, if certificates do not allow for it."""
    clock = next((line.removeprefix("clock=") for line in lines if line.startswith("clock=")), "")
    if not clock.isdecimal():
        return f"`date +%s` prints {clock!r} there, which is no time" if clock else None
    off = int(clock) - (asked + answered) / 2
    if abs(off) <= CLOCKS_S - _CLOCK_MARGIN_S:
        return None
    return (
        f"its clock is {abs(off) / 3600:.1f} hours {'ahead of' if off > 0 else 'behind'} the clock of this computer. "
        "The pool's certificates would be refused: correct the clock that is wrong; `timedatectl` shows and sets it"
    )


def _words(failed: dict[str, Any]) -> str:
    return "\n".join([failed["error"], *failed.get("last_lines", ())])


def _logs_command(folder: str, *, cloud: bool) -> str:
    """Return the shell command that prints the ends of all logs that may tell why a machine failed."""
    logs = f'"{HOME}"/logs/*.log {folder}/{LOG}' + (" /var/log/cloud-init-output.log" if cloud else "")
    return f'for log in {logs}; do [ ! -r "$log" ] || {{ echo "== $log"; tail -c 500000 "$log"; echo; }}; done'


_PARENT_OF = r"s/^\([0-9]*\) (.*) [^Z] \([0-9]*\) .*/\1:\2/p"
"""Makes a line ``pid:parent`` of the state of a process that has not ended, for sed: see proc(5)."""


def clean_command(pool_id: str) -> str:
    """Return the shell command that ends all of a pool on a machine: its processes, however far away, and its files.

    The processes of a pool have its id in their environment, or descend from those that do: what has cleared its
    environment and lost its parent is a child of the agent, or of the process that workers are forked from. The
    processes that run this command may have the id too: they are spared, as are processes that something else ends.
    """
    separate = " ".join(f"-e {name}" for name in SEPARATE)
    mark = shlex.quote(f"{POOL}={pool_id}")
    # grep alone is not enough: behind a ForceCommand this whole command is in the environment of what sshd starts.
    clean = (
        f"own=' '; pid=$$; "
        f"while [ \"${{pid:-0}}\" -gt 1 ]; do own=\"$own$pid \"; set -- {_facts_of('$pid')}; pid=$2; done; "
        f"for try in 1 2 3 4 5 6 7 8 9 10; do found=; "
        f"for pid in $(grep -lsaF {mark} /proc/[0-9]*/environ | tr -dc '0-9\\n'); do "
        f'case $own in *" $pid "*) continue;; esac; '
        f"2> /dev/null tr '\\0' '\\n' < /proc/$pid/environ | grep -qxF {mark} && found=\"$found $pid\"; done; "
        f"tree=; for pid in $found; do grep -qsaF -e skyward.node.agent -e multiprocessing /proc/$pid/cmdline && "
        f'tree="$tree $pid"; done; more=$tree; while [ -n "$more" ]; do more=; '
        f"for pair in $(2> /dev/null sed -n {shlex.quote(_PARENT_OF)} /proc/[0-9]*/stat); do "
        f'pid=${{pair%:*}}; case "$own$found $tree " in *" $pid "*) continue;; esac; '
        f'case "$tree " in *" ${{pair#*:}} "*) grep -qsaF {separate} /proc/$pid/cmdline || '
        f'{{ tree="$tree $pid"; found=" $pid$found"; more=yes; }};; esac; done; done; '
        f'[ -z "$found" ] && break; '
        # multiprocessing's tracker ends by itself when all others have, and only then removes their semaphores.
        f"for pid in $found; do [ $try -gt 6 ] || ! grep -qsaF resource_tracker /proc/$pid/cmdline && "
        f"kill -9 $pid 2> /dev/null; done; sleep 0.05; done; "
        f'rm -rf {pool_folder(pool_id)}; [ -z "$found" ] || {{ echo "still running:$found" >&2; exit 1; }}'
    )
    return f"( unset {POOL}; exec sh -c {shlex.quote(clean)} )"
