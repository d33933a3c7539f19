"""An SSH connection to a machine that is made again when it is lost; commands, sockets and ports through it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import asyncssh

from skyward.errors import BootstrapError
from skyward.providers.base import Login

logger = logging.getLogger(__name__)
# asyncssh tells of every connection at INFO; its own name is used to find out more.
logging.getLogger("asyncssh").setLevel(logging.WARNING)

CONNECT_TIMEOUT_S = 20.0
_KEEPALIVE_S = 5
_KEEPALIVES = 3
_PUMP_BYTES = 1 << 18


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
        self._connection: Any = None
        self._connecting = asyncio.Lock()
        self._servers: list[asyncio.Server] = []
        self._pumps: set[asyncio.Task[None]] = set()
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
        if login.host_key is not None:
            where = login.host if login.port in (None, 22) else f"[{login.host}]:{login.port}"
            options["known_hosts"] = asyncssh.import_known_hosts(f"{where} {login.host_key}\n")
            options["config"] = None
            options["agent_path"] = None
        elif login.known_hosts is not None:
            options["known_hosts"] = login.known_hosts
        try:
            if login.key is not None:
                options["client_keys"] = [_load_key(login.key)]
            return await asyncssh.connect(login.host, **options)
        except asyncssh.HostKeyNotVerifiable as exc:
            known = login.known_hosts or "~/.ssh/known_hosts"
            raise self._error(
                f"the host key of {login} is not the one that is expected: "
                + (
                    "somebody else may be answering in its place"
                    if login.host_key
                    else f"{known} has none or another one for it. When the key is right, log in once with "
                    f"`ssh {login.host}` and accept it; when it changed, find out why first"
                )
            ) from exc
        except asyncssh.PermissionDenied as exc:
            tried = "the key that sky.SSH was given" if login.key else "the SSH agent's and the usual keys"
            raise self._error(
                f"{login} refused to let us in with {tried}. Try `ssh {login}`; give user= and key= to sky.SSH"
            ) from exc
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as exc:
            raise self._error(
                f"the private key for {login} can't be read: {exc}. A key with a passphrase has to be in the SSH agent"
            ) from exc
        except (OSError, TimeoutError, asyncssh.Error) as exc:
            raise self._error(
                f"{login} does not answer over SSH: {exc or type(exc).__name__}. "
                "Check name, port and firewall, and that `ssh` gets there"
            ) from exc

    def _error(self, text: str) -> BootstrapError:
        return BootstrapError(text, machine=str(self.login), step="ssh", last_lines=())

    def drop(self) -> None:
        """Cut the connection, as a lost network would: the next use makes another one."""
        if self._connection is not None:
            self._connection.abort()

    async def close(self) -> None:
        """Close everything. May be called twice."""
        self._closed = True
        for server in self._servers:
            server.close()
        for pump in list(self._pumps):
            pump.cancel()
        if self._connection is not None:
            self._connection.close()
            with contextlib.suppress(Exception):  # a connection that is broken can't be closed better than that
                await asyncio.wait_for(self._connection.wait_closed(), 2)

    # --- through it -----------------------------------------------------------------------------------------

    async def run(self, command: str, *, input: bytes = b"") -> Completed:  # noqa: A002 - as subprocess has it
        """Run a shell command, with `input` on its standard input, and return how it ended."""
        connection = await self.connect()
        done = await connection.run(command, input=input, encoding=None)
        status = done.exit_status if done.exit_status is not None else 255
        output, error = (bytes(stream).decode(errors="replace") for stream in (done.stdout, done.stderr))
        return Completed(status, output, error)

    async def lines(self, command: str, heard: Callable[[str], None]) -> int:
        """Run a shell command, hand on each line of its output, and return its status."""
        connection = await self.connect()
        async with connection.create_process(command, stdin=asyncssh.DEVNULL, stderr=asyncssh.STDOUT) as process:
            async for line in process.stdout:
                heard(line.rstrip("\n"))
            await process.wait()
            return process.exit_status if process.exit_status is not None else 255

    async def write(self, path: str, data: bytes) -> None:
        """Write a file, readable by its owner only. `path` is as the shell sees it."""
        done = await self.run(f'umask 077; mkdir -p "$(dirname {path})" && cat > {path}', input=data)
        if done.status:
            raise OSError(f"{path} can't be written on {self.login}: {done.error.strip()}")

    async def open_socket(self, path: str) -> tuple[Any, Any]:
        """Return reader and writer of a Unix socket on the machine.

        Raises
        ------
        NotListening
            The machine answers, and nobody listens there.
        """
        connection = await self.connect()
        try:
            reader, writer = await connection.open_unix_connection(path, encoding=None)
        except asyncssh.ChannelOpenError as exc:
            if connection.is_closed():
                raise ConnectionError(f"the connection to {self.login} was lost") from exc
            raise NotListening(f"nobody listens at {path} on {self.login}") from exc
        return reader, writer

    async def listen(self, accept: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> int:
        """Return a port on our loopback whose connections go to `accept`, until this is closed."""
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def forward(self, host: str, port: int) -> int:
        """Return a port on our loopback from which every connection goes to `host`:`port`, as the machine sees it.

        Outlives the SSH connection: when that is made again, new connections go through the new one.
        """

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                connection = await self.connect()
                there_reader, there_writer = await connection.open_connection(host, port, encoding=None)
            except (OSError, asyncssh.Error, BootstrapError):
                logger.debug("no way through %s to %s:%s", self.login, host, port, exc_info=True)
                writer.close()
                return
            for source, target in ((reader, there_writer), (there_reader, writer)):
                task = asyncio.create_task(_pump(source, target))
                self._pumps.add(task)
                task.add_done_callback(self._pumps.discard)

        return await self.listen(accept)


async def _pump(source: Any, target: Any) -> None:
    with contextlib.suppress(OSError, asyncssh.Error, asyncio.IncompleteReadError):
        while data := await source.read(_PUMP_BYTES):
            target.write(data)
            await target.drain()
    with contextlib.suppress(OSError, asyncssh.Error, RuntimeError):
        target.close()


def _load_key(key: str) -> Any:
    return asyncssh.import_private_key(key) if "PRIVATE KEY" in key else asyncssh.read_private_key(os.fspath(key))
