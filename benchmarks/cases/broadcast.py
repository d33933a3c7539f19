"""A large argument to each of four nodes, beside what one TLS connection over loopback needs for the same bytes.

Nodes of the local provider share memory, and so do Ray's workers: nothing has to go through a socket there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import psutil

from benchmarks.case import Case, Pick, Row, each, faster, timed
from benchmarks.peers import dask, ray, skyward_nodes, tls_socket

_seeds = itertools.count()
NODES = 4
_COPIES = 12
"""So many of the argument have room, or a smaller one is taken: each worker of Dask has one and may receive another."""


def touch(array: np.ndarray) -> int:
    """Read every page, and return what does not depend on the order of additions."""
    return int((array[::512] > 0.5).sum())


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    megabytes = pick(1_000, 64)
    if psutil.virtual_memory().available < _COPIES * megabytes * 1e6:
        megabytes = 256

    def array() -> np.ndarray:
        return np.random.default_rng(next(_seeds)).random(megabytes * 125_000)

    def broadcast(peer: Any) -> float:
        value = array()
        seconds, found = timed(lambda: peer.broadcast(touch, value))
        assert list(found) == NODES * [touch(value)]
        return seconds

    def send(peer: Any) -> float:
        value = memoryview(array()).cast("B")
        return timed(lambda: peer.send(value))[0]

    contestants = each(peers, broadcast, "skyward", "Dask", "Ray") | each(peers, send, "TLS socket")
    title = f"{megabytes:,} MB to {NODES} nodes"
    yield Row(title, contestants, targets=(faster("TLS socket", 0.8),))


PEERS = {"skyward": skyward_nodes, "Dask": dask, "Ray": ray, "TLS socket": tls_socket}
CASE = Case("broadcast", rows, PEERS, workers=NODES)
