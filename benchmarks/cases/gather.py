"""Many calls that do nothing, gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.case import Case, Pick, Row, each, faster, timed
from benchmarks.peers import ALL


def nothing(x: int) -> int:
    return x


def _gather(calls: int) -> Callable[[Any], float]:
    def gather(peer: Any) -> float:
        seconds, values = timed(lambda: peer.map(nothing, range(calls)))
        assert list(values) == list(range(calls))
        return seconds

    return gather


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    some, many = pick(10_000, 500), pick(100_000, 2_000)
    targets = (faster("Dask", 30), faster("Ray", 10))
    yield Row(f"{some:,} no-ops", each(peers, _gather(some)), targets=targets)
    # Dask and Ray would take minutes.
    yield Row(f"{many:,} no-ops", each(peers, _gather(many), "skyward", "loky", "processes"))


CASE = Case("gather", rows, ALL)
