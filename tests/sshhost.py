"""A host that is reached over SSH: a server in a thread of this process, which runs commands here for whoever has its
key.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncssh

from skyward.providers.base import Login, Machine


class Host:
    """Has an address from the start, and answers between `start` and `stop`."""

    def __init__(self, folder: Path) -> None:
        self.key = asyncssh.generate_private_key("ssh-ed25519")
        self.key_file = folder / "id_ed25519"
        self.known_hosts = folder / "known_hosts"
        self._host_key = asyncssh.generate_private_key("ssh-ed25519")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port: int = taken.getsockname()[1]
        self.key.write_private_key(self.key_file)
        self.key_file.chmod(0o600)  # or ssh would refuse to use it
        public = self._host_key.export_public_key().decode()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public}")
        self._stop: Callable[[], Any] = lambda: None

    def machine(self, *, key: str | None = None) -> Machine:
        """Return it as a provider would; `key` instead of the path of its key."""
        login = Login(
            host="127.0.0.1", port=self.port, user=getpass.getuser(), key=key or str(self.key_file),
            known_hosts=str(self.known_hosts),
        )  # fmt: skip
        return Machine(id=f"127.0.0.1:{self.port}", provider="ssh", login=login, outlives_pool=True)

    def start(self) -> None:
        ready = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._listen(ready)))
        thread.start()
        assert ready.wait(10)
        stop = self._stop

        def stop_and_join() -> None:
            stop()
            thread.join(10)

        self._stop = stop_and_join

    def stop(self) -> None:
        """Cut all connections and answer no more. May be called twice."""
        self._stop()
        self._stop = lambda: None

    async def _listen(self, ready: threading.Event) -> None:
        over = asyncio.Event()
        loop = asyncio.get_running_loop()
        connections: list[Any] = []
        server = await asyncssh.listen(
            "127.0.0.1",
            self.port,
            server_host_keys=[self._host_key],
            authorized_client_keys=asyncssh.import_authorized_keys(self.key.export_public_key().decode()),
            acceptor=connections.append,
            process_factory=_serve,
            encoding=None,
        )
        self._stop = lambda: loop.call_soon_threadsafe(over.set)
        ready.set()
        await over.wait()
        server.close()
        for connection in connections:
            connection.abort()
            await connection.wait_closed()


async def _serve(process: Any) -> None:
    pipe = asyncio.subprocess.PIPE
    command = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", process.command, stdin=pipe, stdout=pipe, stderr=pipe
    )
    assert command.stdin
    assert command.stdout
    assert command.stderr
    feeding = asyncio.create_task(_feed(process.stdin, command.stdin))  # a client need not end what it sends
    output, error = await asyncio.gather(command.stdout.read(), command.stderr.read())
    status = await command.wait()
    feeding.cancel()
    process.stdout.write(output)
    process.stderr.write(error)
    process.exit(status)


async def _feed(source: Any, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
        target.close()
