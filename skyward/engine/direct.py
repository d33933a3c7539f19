"""Requests to workers that the caller reaches: by connections to each of them, which are used again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from distributed.core import send_recv

from skyward.engine.delivery import succeeded

CLOSE_S = 1.0
"""Seconds that connections have to be made at the end. Chosen, not measured: it takes milliseconds."""


class Direct:
    """Asks workers. For one event loop."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._connecting: set[asyncio.Future[Any]] = set()

    async def ask(self, worker: str, op: str, when_sent: Callable[[], None] | None = None, **arguments: Any) -> Any:
        """Return what the handler `op` of the worker at an address answers. Cancelling this does not stop the handler.

        Raises
        ------
        CommClosedError
            The connection to the worker has been closed.
        OSError
            There is none.
        """
        pool = self._client.rpc
        comm = await self._connect(worker)
        if when_sent is not None:
            when_sent()
        try:
            return await send_recv(comm, op=op, **arguments)
        finally:
            pool.reuse(worker, comm)

    async def _connect(self, address: str) -> Any:
        """Return a connection to a worker, for `reuse`. One that is being made when this is cancelled is kept."""
        pool = self._client.rpc
        connecting = asyncio.ensure_future(connect_to(pool, address))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(lambda done: succeeded(done) and pool.reuse(address, done.result()))
            raise

    async def finish_connecting(self) -> None:
        """Wait for connections that are being made: cut short, they would stay half open."""
        if self._connecting:
            await asyncio.wait(self._connecting, timeout=CLOSE_S)


async def connect_to(pool: Any, address: str) -> Any:
    """Return a connection of Dask's `pool`.

    Raises
    ------
    OSError
        There is none.
    """
    try:
        return await pool.connect(address)
    except ValueError as exc:  # the other side has closed it before TLS began (tornado 6.6, `IOStream.start_tls`)
        raise OSError(f"no connection to {address}: {exc}") from exc
