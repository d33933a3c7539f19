"""One call on an idle pool, from making it to having its result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.case import Case, Pick, Row, each, within
from benchmarks.peers import ALL


def increment(x: int) -> int:
    return x + 1


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    calls = pick(200, 20)

    def one_by_one(peer: Any) -> float:
        seconds = []
        for i in range(calls):
            started = time.perf_counter()
            value = peer.call(increment, i)
            seconds.append(time.perf_counter() - started)
            assert value == i + 1
        return statistics.median(seconds)

    targets = (within("Dask", 0.3), within("Ray", 1))
    yield Row(f"one call, median of {calls}", each(peers, one_by_one), targets=targets)


CASE = Case("latency", rows, ALL)
