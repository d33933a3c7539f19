"""The Dask client of a pool."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import warnings
from weakref import WeakKeyDictionary

from distributed import Client
from distributed.client import _current_client, ensure_default_client
from distributed.versions import VersionMismatchWarning

from skyward.cluster.base import SkyCluster
from skyward.cluster.joined import JoinedCluster

_MOST_CHUNKS = 16_384
"""Chunks that may be in flight at once, each with its own connection: two for each of many thousand slots."""
_around: WeakKeyDictionary[Client, Client | None] = WeakKeyDictionary()
"""The default client of the context in which a client has become it."""
_filtering = threading.Lock()  # `catch_warnings` is for one thread at a time


def connect(cluster: SkyCluster, *, direct: bool) -> Client:
    """Return a client of the cluster. `direct`: whether it may reach the workers without the scheduler."""
    with _filtering, warnings.catch_warnings():
        if not isinstance(cluster, JoinedCluster):
            # Packages that must be the same on both sides are pinned; Dask also warns of those that nobody asked for.
            warnings.simplefilter("ignore", VersionMismatchWarning)
        client = Client.__new__(Client)
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
