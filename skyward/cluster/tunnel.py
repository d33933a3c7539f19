"""Ports of ours that lead through an agent to ports that it reaches. They outlive the SSH connection."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket

import asyncssh

from skyward.cluster.ssh import Link, NotListening
from skyward.cluster.tasks import end_tasks
from skyward.errors import BootstrapError
from skyward.node.relay import Relay, StreamEnded, meet_as_caller

logger = logging.getLogger(__name__)

_AGAIN_S = 0.2


class Tunnel:
    """The way through the agent that listens at the socket `path` on the machine of `link`. Does not close the link."""

    def __init__(self, link: Link, path: str) -> None:
        self._link = link
        self._path = path
        self._servers: list[asyncio.Server] = []
        self._is_closed = False
        self._carrying: set[asyncio.Task[None]] = set()

    async def listen(self, target: str) -> int:
        """Return a port on our loopback whose connections go to `target`, ``host:port`` as the agent sees it.

        Raises
        ------
        OSError
            The tunnel is closed.
        """
        if self._is_closed:
            raise OSError(f"the connection to {self._link.login} is closed")

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # Not a coroutine: asyncio complains about those that are cancelled at the end.
            task = asyncio.create_task(self._carry(Relay(reader, writer), target))
            self._carrying.add(task)
            task.add_done_callback(self._carrying.discard)

        ours = socket.create_server(("127.0.0.1", 0))
        # Noted before the first wait, so that one who is cancelled there leaves nothing open.
        self._servers.append(server := await asyncio.start_server(accept, sock=ours, start_serving=False))
        await server.start_serving()
        port: int = ours.getsockname()[1]
        return port

    async def _carry(self, relay: Relay, target: str) -> None:
        """Bring a connection to `target`, over one SSH connection after another, until either end closes it."""
        stream = secrets.token_hex(8)
        try:
            while not relay.closed.is_set():
                try:
                    reader, writer = await self._link.open_socket(self._path)
                    confirmed = await meet_as_caller(relay, reader, writer, stream=stream, target=target)
                    await relay.carry(reader, writer, confirmed)
                    writer.close()
                except NotListening:
                    return  # the agent is gone, and what it ran
                except (OSError, asyncssh.Error, BootstrapError) as exc:
                    logger.debug("no way to %s at present: %s", self._link.login, exc)
                    await asyncio.sleep(_AGAIN_S)
        except StreamEnded as exc:
            logger.debug("the way to %s on %s has ended: %s", target, self._link.login, exc)
        finally:
            relay.close()

    async def close(self) -> None:
        """Close all ports and connections. May be called twice."""
        self._is_closed = True
        for server in self._servers:
            server.close()
        await end_tasks(self._carrying)
