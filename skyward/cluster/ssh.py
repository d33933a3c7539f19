"""An SSH connection to a machine that is made again when it is lost; commands and sockets through it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import posixpath
import secrets
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import asyncssh
from asyncssh.constants import OPEN_REQUEST_SESSION_FAILED

from skyward.cluster.shell import Framed, sh_command
from skyward.cluster.tasks import end_tasks
from skyward.errors import BootstrapError
from skyward.node.relay import INTERPRETER
from skyward.providers.base import Login
from skyward.scripts.steps import LAST_LINES

logger = logging.getLogger(__name__)
# asyncssh tells of every connection at INFO; its own name is used to find out more.
logging.getLogger("asyncssh").setLevel(logging.WARNING)

SSH_ERRORS = (OSError, asyncssh.Error, BootstrapError)
"""What logging in, a command or a file transfer may raise."""
CONNECT_TIMEOUT_S = 20.0
_KEEPALIVE_S = 5
_KEEPALIVES = 3
_SSH_FAILED = 255
"""The status of ssh itself when it is SSH that failed."""
_NOISE = 2_000
"""Characters kept of what a login prints. Chosen, not measured."""
_COPY = """
import os, socket, sys, threading
there = socket.socket(socket.AF_UNIX)
there.connect(sys.argv[1])
os.write(1, sys.argv[2][::-1].encode() + b"\\n")
def send():
    while data := os.read(0, 1 << 18):
        there.sendall(data)
    there.shutdown(socket.SHUT_WR)
threading.Thread(target=send, daemon=True).start()
while data := there.recv(1 << 18):
    while data:
        data = data[os.write(1, data):]
"""
"""Program that connects its standard input and output with a Unix socket, and says so first."""


@dataclass(frozen=True, slots=True)
class Completed:
    """How a command on a machine ended."""

    status: int
    output: str
    error: str


class NotListening(OSError):  # noqa: N818 - it says what is the case
    """A machine answers, but what was looked for on it does not."""


class Link:
    """The way to one machine. All of it is used in one event loop."""

    def __init__(self, login: Login) -> None:
        self.login = login
        self.noise: str = ""  # what the last login printed, beside the command's own output
        self._connection: Any = None
        self._proxies: list[Any] = []  # the processes of proxy commands, each a subprocess.Popen
        self._connecting = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()  # each closes a connection when its only session ends
        self._forwards: bool | None = None  # whether sshd forwards to sockets; None: not known
        self._closed = False

    # --- the connection -------------------------------------------------------------------------------------

    async def connect(self) -> Any:
        """Return the connection, made anew where there is none.

        Raises
        ------
        BootstrapError
            The machine can't be logged in to; the message says why and what to do.
        """
        async with self._connecting:
            if self._closed:
                raise ConnectionError(f"the way to {self.login} is closed")
            if self._connection is None or self._connection.is_closed():
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> Any:
        login = self.login
        key = None if login.key is None else await asyncio.to_thread(self._load_key, login.key)
        try:
            connection = await asyncssh.connect(login.host, **await self._options(key))
        except asyncssh.HostKeyNotVerifiable as exc:
            raise self._ssh_error(
                f"{exc}: the host key is not the expected one. {self._about_host_key()}"
            ) from exc
        except asyncssh.PermissionDenied as exc:
            tried = "the key that sky.SSH was given" if login.key else "the SSH agent's and the usual keys"
            raise self._ssh_error(
                f"{login} refused a login with {tried}. Try `ssh {login}`; give user= and key= to sky.SSH"
            ) from exc
        except (asyncssh.KeyImportError, asyncssh.ConfigParseError) as exc:
            raise self._ssh_error(f"a key or ~/.ssh/config can't be used to log in to {login}: {exc}") from exc
        except (OSError, asyncssh.Error) as exc:
            raise self._ssh_error(
                f"{login} does not answer over SSH: {_reason(exc)}. "
                f"Check name, port and firewall, and that `ssh {login}` gets there"
            ) from exc
        if (proxy := connection.get_extra_info("subprocess")) is not None:
            self._proxies = [*(p for p in self._proxies if p.returncode is None), proxy]
        return connection

    async def _options(self, key: Any) -> dict[str, Any]:
        login = self.login
        options: dict[str, Any] = {
            "keepalive_interval": _KEEPALIVE_S,
            "keepalive_count_max": _KEEPALIVES,
            "connect_timeout": CONNECT_TIMEOUT_S,
            "login_timeout": CONNECT_TIMEOUT_S,
        }
        if login.port is not None:
            options["port"] = login.port
        if login.user is not None:
            options["username"] = login.user
        if key is not None:
            options["client_keys"] = [key]
        if login.proxy_command:
            options["proxy_command"] = list(login.proxy_command)
        if login.host_key is not None:
            where = login.host if login.port in (None, 22) else f"[{login.host}]:{login.port}"
            options["known_hosts"] = asyncssh.import_known_hosts(f"{where} {login.host_key}\n")
            options["config"] = None
            options["agent_path"] = None
        elif login.known_hosts is not None:
            options["known_hosts"] = login.known_hosts
        else:
            chosen = await asyncssh.SSHClientConnectionOptions.construct(
                **options | {"host": login.host, "client_keys": None, "config": ()}
            )
            if chosen.known_hosts is None:  # then asyncssh would take any host for the right one
                raise self._ssh_error(
                    f"UserKnownHostsFile for {login} in ~/.ssh/config is 'none', so its host key is unknown: "
                    "give known_hosts= to sky.SSH"
                )
        return options

    def _about_host_key(self) -> str:
        if self.login.host_key:
            return "Somebody else may be answering in its place"
        known = self.login.known_hosts or "~/.ssh/known_hosts"
        return (
            f"{known} has none or another one for it. When the key is right, accept it: "
            f"`ssh -o UserKnownHostsFile={known} {self.login.host}`. When it changed, find out why first"
        )

    def _load_key(self, key: str) -> Any:
        name = "the private key" if "PRIVATE KEY" in key else f"the private key {key}"
        try:
            return asyncssh.import_private_key(key) if "PRIVATE KEY" in key else asyncssh.read_private_key(key)
        except (OSError, ValueError) as exc:
            raise self._ssh_error(
                f"{name} for {self.login} can't be read: {_reason(exc)}. Add a key with a passphrase to the SSH "
                "agent (`ssh-add`), and give sky.SSH no key"
            ) from exc

    def _ssh_error(self, text: str) -> BootstrapError:
        return BootstrapError(text, machine=str(self.login), step="ssh", status=_SSH_FAILED, last_lines=())

    def drop(self) -> None:
        """Cut the connection, as a lost network would: the next use makes another one."""
        if self._connection is not None:
            self._connection.abort()

    async def close(self) -> None:
        """Close everything. May be called twice."""
        self._closed = True
        await end_tasks(self._closing)
        if self._connection is not None:
            await _close(self._connection)
        # asyncssh has killed them, and does not wait: they would be left over when the event loop ends now.
        deadline = time.monotonic() + 2
        while any(proxy.returncode is None for proxy in self._proxies) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    # --- through it -----------------------------------------------------------------------------------------

    async def run(self, command: str, *, input: bytes = b"") -> Completed:  # noqa: A002 - as subprocess has it
        """Run a command of POSIX sh, on one line, with `input` on its standard input; return how it ended.

        What the login prints is not part of the output.

        Raises
        ------
        BootstrapError
            The machine lets us in, and runs something else than the command.
        """
        framed = Framed(command)
        given = {"input": input} if input else {"stdin": asyncssh.DEVNULL}  # asyncssh never ends an empty input
        process = await self._session(framed.command, encoding=None, **given)
        done = await process.wait()
        output, error = (bytes(stream).decode(errors="replace") for stream in (done.stdout, done.stderr))
        ended = self._status(done)
        answer = framed.read(output)
        self._note_noise(framed.noise(output) + framed.noise(error))
        if answer is None:
            raise self._runs_nothing(ended, output + error)
        text, status = answer
        return Completed(ended if status is None else status, text, error.rpartition(framed.mark)[2])

    async def lines(self, command: str, heard: Callable[[str], None]) -> int:
        """Run a command as `run` does, hand on each line of its output, and return its status."""
        framed = Framed(command, merged=True)
        process = await self._session(framed.command, stdin=asyncssh.DEVNULL, errors="replace")
        noise, began, status = "", False, None
        try:
            async for raw in process.stdout:
                line, marked, rest = raw.rstrip("\n").partition(framed.mark)
                if not began:
                    began = bool(marked)
                    noise += line if began else raw
                elif status is None:
                    if line or not marked:
                        heard(line)
                    if marked:
                        status = int(rest)
            done = await process.wait()
            ended = self._status(process)
            noise += done.stderr
            self._note_noise(noise)
            if not began:
                raise self._runs_nothing(ended, noise)
            return ended if status is None else status
        finally:
            process.close()  # without waiting for it: a cancelled caller would wait for the command's own end

    def _note_noise(self, noise: str) -> None:
        if noise.strip():
            self.noise = noise[-_NOISE:]
            logger.debug("a login to %s prints %r", self.login, self.noise)

    def _runs_nothing(self, status: int | None, output: str) -> BootstrapError:
        lines = [line for line in output.splitlines() if line.strip()][-LAST_LINES:]
        printed = "\n  ".join(["It printed:", *lines]) if lines else "It printed nothing"
        ended = "was refused" if status is None else f"ended with status {status}"
        return BootstrapError(
            f"{self.login} accepts the login but runs no commands: instead of /bin/sh the user's login shell, or a "
            f"ForceCommand of sshd_config or authorized_keys, was started, and {ended}. {printed}",
            machine=str(self.login),
            step="ssh",
            status=_SSH_FAILED if status is None else status,
            last_lines=tuple(lines),
        )

    async def _session(self, command: str, **options: Any) -> Any:
        """Start a command; where sshd allows the connection no further session, over a connection for it alone."""
        connection = await self.connect()
        try:
            return await connection.create_process(command, **options)
        except asyncssh.ChannelOpenError as exc:
            if connection.is_closed():
                raise ConnectionError(f"the connection to {self.login} was lost") from exc
            if exc.code == OPEN_REQUEST_SESSION_FAILED:  # not the session was refused, but the command
                raise self._runs_nothing(None, "") from exc
        further = await self._connect()
        try:
            process = await further.create_process(command, **options)
        except asyncssh.ChannelOpenError as exc:
            further.abort()
            raise self._ssh_error(
                f"{self.login} can be logged in to, but its sshd refuses to run commands. Set MaxSessions in its "
                "sshd_config (also in Match blocks) to 10, which is sshd's default, and reload sshd"
            ) from exc
        except BaseException:
            further.abort()
            raise
        closing = asyncio.create_task(_close_after(process, further))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return process

    def _status(self, ended: Any) -> int:
        """Return the status as a shell has it, where a signal counts as 128 and its number."""
        if ended.returncode is None:
            raise ConnectionError(f"the connection to {self.login} was lost")
        return int(ended.returncode) if ended.returncode >= 0 else 128 - int(ended.returncode)

    async def write(self, path: str, data: bytes) -> None:
        """Write a file, readable by its owner only, whole or not at all. `path` is as the shell sees it."""
        part = f'{path}".{secrets.token_hex(8)}"'  # other hosts may write the same file in a home that they share
        command = f'mkdir -p "$(dirname {path})" && cat > {part} && mv {part} {path}'
        done = await self.run(f"{command} || {{ rm -f {part}; exit 1; }}", input=data)
        if done.status:
            raise OSError(f"{path} can't be written on {self.login}: {done.error.strip()}")

    async def open_socket(self, path: str) -> tuple[Any, Any]:
        """Return reader and writer of a Unix socket on the machine, beside which there is an `INTERPRETER`.

        sshd connects to the socket, or where its configuration forbids that, a program that is run in a session.

        Raises
        ------
        NotListening
            The machine answers, but no process listens there.
        """
        if self._forwards is not False:
            try:
                return await self._open_forwarded(path)
            except NotListening:  # or not allowed: sshd says "open failed" in both cases
                if self._forwards:
                    raise
        reader, writer = await self._open_copied(path)
        if self._forwards is None:
            try:
                forwarded = await self._open_forwarded(path)
            except NotListening:  # although the program has just been let in
                logger.debug("sshd on %s does not forward: sessions are used", self.login)
                self._forwards = False
            else:  # the socket has come up between the two
                writer.close()
                return forwarded
        return reader, writer

    async def _open_forwarded(self, path: str) -> tuple[Any, Any]:
        connection = await self.connect()
        try:
            opened: tuple[Any, Any] = await connection.open_unix_connection(path, encoding=None)
        except asyncssh.ChannelOpenError as exc:
            if connection.is_closed():
                raise ConnectionError(f"the connection to {self.login} was lost") from exc
            raise NotListening(f"no process listens at {path} on {self.login}") from exc
        self._forwards = True
        return opened

    async def _open_copied(self, path: str) -> tuple[Any, Any]:
        interpreter = posixpath.join(posixpath.dirname(path), INTERPRETER)
        # Isolated and without site packages: it starts in 10 ms, and nothing of the user's gets in.
        mark = secrets.token_hex(12)
        program = shlex.join([interpreter, "-I", "-S", "-c", f"exec({_COPY!r})", path, mark[::-1]])
        process = await self._session(sh_command(f"exec {program}"), encoding=None, stderr=asyncssh.DEVNULL)
        try:
            while not (line := await process.stdout.readline()).endswith(f"{mark}\n".encode()):  # a login may print
                if not line:
                    await process.wait()
                    self._status(process)
                    raise NotListening(f"no process listens at {path} on {self.login}")
        except BaseException:
            process.close()
            raise
        return process.stdout, process.stdin


async def _close_after(process: Any, connection: Any) -> None:
    try:
        await process.wait_closed()
    finally:
        await _close(connection)


async def _close(connection: Any) -> None:
    connection.close()
    with contextlib.suppress(Exception):  # a connection that is broken can't be closed better than that
        await asyncio.wait_for(connection.wait_closed(), 2)


def _reason(exc: BaseException) -> str:
    if isinstance(exc, TimeoutError):
        return f"no answer within {CONNECT_TIMEOUT_S:g} s"
    return str(exc) or type(exc).__name__
