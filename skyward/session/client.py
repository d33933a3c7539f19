"""The Dask client of a pool."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from distributed import Client
from distributed.client import _current_client, ensure_default_client
from distributed.versions import VersionMismatchWarning

from skyward.cluster.base import SkyCluster
from skyward.cluster.joined import JoinedCluster
from skyward.engine.direct import connect_to
from skyward.errors import PoolError

logger = logging.getLogger(__name__)

_AGAIN_S = 0.05
_TRIES = 4
"""Times that a new client looks for a scheduler that is not known to be lost. Dask's limit for each is 30 s, and a
machine that does not answer is missed within 45."""
_MOST_CHUNKS = 16_384
"""Chunks that may be in flight at once, each with its own connection: two for each of many thousand slots."""
_around: WeakKeyDictionary[Client, Client | None] = WeakKeyDictionary()
"""The default client of the context in which a client has become it."""
_filtering = threading.Lock()  # `catch_warnings` is for one thread at a time
_LOST = "the Dask scheduler was lost, and with it what its workers held: submit this again."


_ours: WeakSet[Any] = WeakSet()
"""Connections of pools' clients to their schedulers."""


def _is_not_ours(record: logging.LogRecord) -> bool:
    """Refuse what Dask logs, with a traceback, of such a connection that is lost with its scheduler."""
    return not (isinstance(record.args, tuple) and any(argument in _ours for argument in record.args[:1]))


logging.getLogger("distributed.batched").addFilter(_is_not_ours)


class _NextScheduler:
    """Stands for the scheduler while there is none: requests wait for the next one."""

    def __init__(self, client: PoolClient, address: str) -> None:
        self._client = client
        self.addr = address  # of the last one

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def request(**arguments: Any) -> Any:
            while self._client.scheduler is self:
                if self._client.cluster.failure is not None or self._client.status not in ("running", "connecting"):
                    raise OSError("the pool has ended")
                await asyncio.sleep(_AGAIN_S)
            return await getattr(self._client.scheduler, name)(**arguments)

        return request

    async def close_rpc(self) -> None:
        """Do nothing: there is no connection."""


class PoolClient(Client):  # type: ignore[misc]
    """A client that goes on with the next scheduler of its cluster when one is lost.

    Futures are cancelled then, except those whose keys `is_kept` names: the engine sends their tasks again.
    """

    is_kept: Callable[[str], bool] = staticmethod(lambda _: False)
    scheduler: Any
    _connecting: asyncio.Future[None] | None = None  # the last try to reach a scheduler again

    def lose_scheduler(self) -> None:
        """Let go of a scheduler that is lost, and of the connections to it: it may hang. In the event loop."""
        for key, state in list(self.futures.items()):
            if self.is_kept(key):
                state.lose()
            else:
                del self.futures[key]
                state.cancel(reason="scheduler-lost", msg=_LOST)
        if self.scheduler is not None:
            address = self.scheduler.addr
            for comm in [*self.rpc.available.get(address, ()), *self.rpc.occupied.get(address, ())]:
                comm.abort()
            self.rpc.remove(address)
            self.scheduler = _NextScheduler(self, address)
        if self._connecting is not None:
            self._connecting.cancel()
        if self.scheduler_comm is not None:
            self.scheduler_comm.abort()

    async def _reconnect(self) -> None:  # Dask's looks for the same scheduler again, and gives up after 30 s
        self.scheduler_comm: Any = None
        while self.status == "connecting":
            await self.cluster.is_connected.wait()
            # The engine sends these tasks again, in an order in which each finds what it needs.
            self._pending_msg_buffer[:] = [m for m in self._pending_msg_buffer if not self._is_kept_graph(m)]
            self.scheduler = self.rpc(self.cluster.scheduler_address)
            self._connecting = asyncio.ensure_future(self._ensure_connected(timeout=self._timeout))
            await asyncio.wait([self._connecting])  # it fails when the scheduler is lost, too
            if not self._connecting.cancelled() and self._connecting.exception() is not None:
                logger.debug("no connection to %s", self.scheduler.addr, exc_info=self._connecting.exception())
            if self.status == "connecting":
                await asyncio.sleep(_AGAIN_S)
        for topic in self._event_handlers:
            self._send_to_scheduler({"op": "subscribe-topic", "topic": topic, "client": self.id})

    async def _ensure_connected(self, timeout: Any = None) -> None:
        await super()._ensure_connected(timeout)
        if self.scheduler_comm is not None:
            _ours.add(self.scheduler_comm.comm)

    def _is_kept_graph(self, message: dict[str, Any]) -> bool:
        return message["op"] == "update-graph" and any(map(self.is_kept, message["keys"]))

    async def until_running(self) -> None:
        """Wait until it has a scheduler again.

        Raises
        ------
        OSError
            It is closed.
        """
        while self.status != "running" or self.scheduler.addr != self.cluster.scheduler_address:
            if self.status not in ("running", "connecting"):
                raise OSError("the client is closed")
            await asyncio.sleep(_AGAIN_S)

    async def connect_scheduler(self) -> Any:
        """Return a connection to the scheduler that no other request uses; one that is lost is waited for.

        Raises
        ------
        OSError
            It is closed, or there is no connection.
        """
        await self.until_running()
        return await connect_to(self.rpc, self.scheduler.addr)


def connect(cluster: SkyCluster, *, direct: bool) -> Client:
    """Return a client of the cluster. `direct`: whether it may reach the workers without the scheduler.

    If the scheduler is lost meanwhile, this waits for the next one.

    Raises
    ------
    SkywardError
        The cluster has failed, or its scheduler does not answer.
    OSError
        The scheduler of a joined cluster does not answer.
    """
    failed = 0
    while True:
        address = cluster.scheduler_address
        try:
            return _connect(cluster, direct=direct)
        except (OSError, ValueError) as exc:  # see `connect_to`
            if isinstance(cluster, JoinedCluster):
                raise
            # One that is lost has another address, or none; it may take a while until its loss is known.
            failed = failed + 1 if cluster.scheduler_address == address else 0
            if failed == _TRIES:
                raise PoolError(f"the Dask scheduler at {address} does not answer: {exc!r}") from exc
        while not cluster.is_connected.is_set():
            if cluster.failure is not None:
                raise cluster.failure
            time.sleep(_AGAIN_S)


def _connect(cluster: SkyCluster, *, direct: bool) -> Client:
    with _filtering, warnings.catch_warnings():
        if not isinstance(cluster, JoinedCluster):
            # Packages that must be the same on both sides are pinned; Dask also warns of others.
            warnings.simplefilter("ignore", VersionMismatchWarning)
        client = Client.__new__(Client if isinstance(cluster, JoinedCluster) else PoolClient)
        try:
            # Not the default client: pools that are not the current one have clients too.
            client.__init__(
                cluster, set_as_default=False, direct_to_workers=direct, connection_limit=_MOST_CHUNKS
            )
        except BaseException:
            # Usually Ctrl-C. Left to the garbage collector, it would wait for an event loop that has ended by then.
            with contextlib.suppress(Exception):
                client.close(timeout=2)
            client.status = "closed"
            raise
        return client


def make_default(client: Client) -> None:
    """Make a client Dask's default, as entering it would do: in this context, and in threads that have none."""
    ensure_default_client(client)  # until it is closed
    _around[client] = _current_client.get()
    _current_client.set(client)


def restore_default(client: Client) -> None:
    """End `make_default` in this context: the innermost open client around this one is the default again."""
    if _current_client.get() is client:
        around = _around[client]
        while around is not None and around.status == "closed":
            around = _around.get(around)
        _current_client.set(around)


def disconnect(client: Client) -> None:
    """Close the client. What Dask logs of a scheduler that has ended already is left out."""
    log = logging.getLogger("distributed.client")
    log.addFilter(_is_no_search)
    try:
        client.close()
    finally:
        log.removeFilter(_is_no_search)


def _is_no_search(record: logging.LogRecord) -> bool:
    """Refuse the errors that a client logs when it is closed while it looks for a scheduler that has ended."""
    is_cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not is_cancelled and not str(record.msg).startswith("Failed to reconnect")
