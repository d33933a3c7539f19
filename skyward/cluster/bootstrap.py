"""The bootstrap of a machine over SSH: environment, volumes, accelerators and the user's files, then the agent."""

from __future__ import annotations

import asyncio
import contextlib
import io
import shlex
import tarfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import asyncssh

from skyward import events
from skyward.accelerators import devices
from skyward.accelerators.devices import Reading
from skyward.accelerators.model import Accelerator
from skyward.cluster.machine_commands import DETACHED, claim_command, facts_of, watch_command
from skyward.cluster.slots import node_spec
from skyward.cluster.ssh import CONNECT_TIMEOUT_S, SSH_ERRORS, Link, NotListening
from skyward.environment.wheels import Wheel
from skyward.errors import BootstrapError
from skyward.node.agent import CONFIG, LOG, SOCKET
from skyward.node.config import AgentConfig
from skyward.node.tls import CLOCKS_S
from skyward.providers.base import Machine
from skyward.scripts.bootstrap import Recipe, script
from skyward.scripts.mig import partition_script
from skyward.scripts.steps import HOME, LAST_LINES, NEUTRAL, POOL, Progress, read_progress
from skyward.scripts.volumes import mount_script
from skyward.spec.volume import S3Volume

_AGAIN_S = 0.2
_FIRST_LOGIN_S = 3.0
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
_CLOCK_MARGIN_S = 600.0
"""Seconds within which a clock that is just about right may go further wrong. Chosen, not measured."""
_ADVICE = {
    "apt": "Check the names in Image(apt=...).",
    "packages": "Check the names and versions in Image(pip=...).",
    "include": "Check the files in Image(include=...), and the space on the machine's disk.",
}
"""What to do about a step that failed, where what it said may not tell."""


@dataclass(frozen=True, slots=True)
class Shipment:
    """What every machine of a pool gets: its environment's recipe, skyward itself, and the user's files.

    `local` are the user's own packages, in the recipe's order. `accelerator` is what each has to have.
    """

    recipe: Recipe
    wheel: Wheel
    include: tuple[str, ...] = ()
    volumes: tuple[S3Volume, ...] = ()
    accelerator: Accelerator | None = None
    local: tuple[Wheel, ...] = ()

    @property
    def wheels(self) -> dict[str, Wheel]:
        """All wheels, by their path on a machine as a shell sees it."""
        paths = (self.wheel.name, *self.recipe.local)
        return {f'"{HOME}/wheels/{path}"': wheel for path, wheel in zip(paths, (self.wheel, *self.local), strict=True)}

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


class Bootstrap:
    """Makes one machine ready for a node, and starts its agent there. For one use.

    Attributes
    ----------
    heard
        What the machine has said meanwhile, in lines with their time.
    has_begun
        Whether the pool may have files and processes on the machine, to be cleaned up.
    """

    def __init__(
        self, machine: Machine, link: Link, config: AgentConfig, shipment: Shipment, emit: Callable[[Any], None]
    ) -> None:
        self.heard: deque[str] = deque(maxlen=_HEARD_LINES)
        self.has_begun: bool = False
        self._machine = machine
        self._link = link
        self._config = config
        self._shipment = shipment
        self._emit = emit
        self._step = ""

    async def log_in(self) -> None:
        self._progress("ssh")
        if self._machine.outlives_pool:
            await self._link.connect()
        else:
            await self._log_in_when_booted()
        self.has_begun = True

    async def _log_in_when_booted(self) -> None:
        """Log in to a machine that may still boot: until then it may refuse, or not be what we expect."""
        deadline = time.monotonic() + self._machine.boot_s
        patience = _FIRST_LOGIN_S
        while True:
            try:
                async with asyncio.timeout(patience):
                    await self._link.connect()
                return
            except (TimeoutError, *SSH_ERRORS) as exc:
                if time.monotonic() > deadline:
                    limit_s = self._machine.boot_s
                    waited = f"no login within {limit_s:g} s. If it takes longer to boot, raise boot_timeout="
                    said = (waited, str(exc), _firewall_hint(self._machine.ssh_cidrs))
                    raise self._failed("boot", 255, said) from exc
            patience = min(1.5 * patience, CONNECT_TIMEOUT_S)  # a busy machine may need more
            await asyncio.sleep(_AGAIN_S)

    async def run(self) -> None:
        """Take all steps after the login; return when the agent listens at its socket."""
        try:
            host = self._machine.private_ip or await self._own_address()
            await self._make_ready()
            if self._shipment.accelerator is not None:
                await self._equip(self._shipment.accelerator)
            self._progress("agent")
            await self._launch(replace(self._config, host=host))
        except (OSError, asyncssh.Error) as exc:
            raise self._failed(self._step, 255, (str(exc) or type(exc).__name__,)) from exc

    def _progress(self, step: str) -> None:
        self._step = step
        self._note(f"step {step}")
        self._emit(events.BootstrapProgress(instance_id=self._machine.id, step=step))

    def _note(self, line: str) -> None:
        self.heard.append(f"{time.strftime('%H:%M:%S')} {line}")

    async def _own_address(self) -> str:
        """Return the address under which the machine was logged in to, as it sees it itself: peers use it too."""
        done = await self._link.run('set -- $SSH_CONNECTION; echo "$3"')
        address = done.output.strip()
        if done.status or not address:
            raise self._failed("address", done.status, (done.error.strip(),))
        return address

    async def _make_ready(self) -> None:
        shipment, folder = self._shipment, self._config.folder
        wheels = list(shipment.wheels.items())
        # In the pool's own folder: it may hold an index's password, and other pools have scripts of their own.
        bootstrap = f"{folder}/bootstrap.sh"
        self._progress("upload")
        for number in await self._begin([path for path, _ in wheels]):
            path, wheel = wheels[number]
            await self._link.write(path, wheel.data)
        await self._link.write(bootstrap, script(shipment.recipe, outlives_pool=self._machine.outlives_pool).encode())
        await self._run_steps(bootstrap)
        if shipment.volumes:
            mount = f"{folder}/mount.sh"
            await self._link.write(mount, mount_script(shipment.volumes, region=self._machine.region).encode())
            await self._run_steps(mount)

    async def _begin(self, wheels: Sequence[str]) -> list[int]:
        """Check what every later step needs, start the watch, and return which wheels the machine lacks."""
        watch = watch_command(self._config.pool_id, self._config.heartbeat_s, power_off=self._config.power_off)
        claim = claim_command(self._config.folder, f"node {self._config.nodes[0].node} ({self._machine.login})")
        tests = "; ".join(f"test -e {path} || echo no wheel {number}" for number, path in enumerate(wheels))
        asked = time.time()
        done = await self._link.run(
            f"missing=0; missing() {{ echo missing $1; missing=1; }}; "
            f"for tool in {' '.join(_TOOLS)}; do command -v $tool > /dev/null || missing $tool; done; "
            f"[ -r /proc/$$/environ ] || missing /proc; [ $missing = 0 ] || exit 1; "
            f"date +clock=%s; {claim}; {watch} || exit; {tests}"
        )
        lines = done.output.splitlines()
        if missing := [line.removeprefix("missing ") for line in lines if line.startswith("missing ")]:
            raise self._failed("upload", 1, (f"it lacks {', '.join(missing)}, which skyward needs: install it there",))
        if off := _clock_error(lines, asked, time.time()):
            raise self._failed("upload", 1, (off,))
        if claimed := [line.removeprefix("claimed ") for line in lines if line.startswith("claimed ")]:
            self.has_begun = False  # the folder is another node's: not ours to clean
            said = (
                f"{claimed[0]} uses {self._config.folder} there: this is the same host under another name, "
                "or one that shares its /tmp. Give sky.SSH each host once"
            )
            raise self._failed("upload", 1, (said,))
        if done.status:
            advice = f"{self._config.folder} can't be made: check permissions, `df -h /tmp` and `df -i /tmp`"
            raise self._failed("upload", done.status, (*done.error.splitlines(), advice))
        return [int(line.removeprefix("no wheel ")) for line in lines if line.startswith("no wheel ")]

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
            await self._link.write(path, partition_script(wanted, keep=self._machine.outlives_pool).encode())
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
            f"{DETACHED} {self._shipment.recipe.interpreter} -m skyward.node.agent --serve {folder} "
            f"> {folder}/{LOG} 2>&1 < /dev/null & set -- $! {facts_of('$!')}; echo $1 ${{21}}"
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
        is_it = f'set -- {facts_of(str(pid))}; [ "${{1:-Z}}" != Z ] && [ "${{20}}" = {started} ]'
        done = await self._link.run(f"{is_it} || test -S {socket}")
        return done.status == 0

    def _failed(self, step: str, status: int, lines: Sequence[str]) -> BootstrapError:
        lines = [line for line in lines if line.strip()]
        said = "\n  ".join(["its last lines:", *lines]) if lines else "it printed nothing"
        advice = f"\n{_ADVICE[step]}" if step in _ADVICE else ""
        return BootstrapError(
            f"{self._machine.login} could not be made ready: step {step!r} failed with status {status}; {said}{advice}",
            machine=str(self._machine.login),
            step=step,
            status=status,
            last_lines=tuple(lines[-LAST_LINES:]),
        )


def _firewall_hint(ranges: Sequence[str]) -> str:
    """Return what a firewall has to do with a login that fails; empty where there is none."""
    if not ranges:
        return ""
    return (
        f"The firewall lets SSH in from {', '.join(ranges)} alone. If SSH leaves from another address, as behind a "
        "proxy or VPN, name it in caller_cidrs= or SKYWARD_CALLER_IP"
    )


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
