"""Which engine joblib's work goes to: a pool's that was named, the active pool's, or that of a Dask client."""

from __future__ import annotations

import atexit
import sys
import threading
from typing import TYPE_CHECKING, Any

import skyward as sky
from skyward.current import current_pool
from skyward.pool import bring_up

if TYPE_CHECKING:
    from skyward.engine import Engine

_joined: dict[str, sky.ComputePool] = {}  # pools that join a Dask client's cluster, by the scheduler's address
_joined_lock = threading.Lock()


def engine_for(pool: Any = None, client: Any = None) -> Engine:
    """Return the engine of `pool`, else of the client's cluster, else of what is active here.

    Raises
    ------
    NoActivePoolError
        There is none.
    """
    if pool is None and client is None:
        pool = current_pool()
    if pool is not None:
        engine: Engine = pool.engine
        return engine
    if client is None:
        client = _current_client()
    if client is None:
        raise sky.NoActivePoolError(
            "joblib's backend 'skyward' has no pool to run on. Enter one around the work:\n"
            "    with sky.integrations.JoblibPool(nodes=2):\n"
            "        Parallel()(delayed(f)(x) for x in data)\n"
            "or name one that is active, or a Dask client:\n"
            "    with sky.integrations.joblib_backend(pool):\n"
            "        Parallel()(delayed(f)(x) for x in data)"
        )
    return _join(client).engine


def _current_client() -> Any:
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return distributed.client.default_client()
    except ValueError:  # there is none
        return None


def _join(client: Any) -> sky.ComputePool:
    """Return a pool that has joined the client's cluster; it is left when the process ends."""
    address = sky.Dask(client).address()
    with _joined_lock:
        pool = _joined.get(address)
        if pool is None or not pool.is_active:
            pool = _joined[address] = sky.ComputePool(sky.Dask(client), display="quiet", timeout=_LONGEST_S)
            bring_up(pool)
            atexit.register(pool.close)
        return pool


_LONGEST_S = 365 * 24 * 3600.0
"""A pool on a joined cluster holds nothing that costs, so it needs no time limit. A year was chosen, not measured."""
