"""joblib's `Parallel` over calls that do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from joblib import Parallel, delayed

from benchmarks.case import Case, Pick, Row, each, faster, timed
from benchmarks.peers import JOBLIB


def nothing(x: int) -> int:
    return x


def _parallel(calls: int) -> Callable[[Any], float]:
    def parallel(peer: Any) -> float:
        with peer.joblib():
            seconds, values = timed(lambda: Parallel()(delayed(nothing)(i) for i in range(calls)))
        assert values == list(range(calls))
        return seconds

    return parallel


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    targets = (faster("Dask", 10), faster("loky", 1))
    for calls in (pick(5_000, 200), pick(20_000, 500)):
        yield Row(f"Parallel: {calls:,} no-ops", each(peers, _parallel(calls)), targets=targets)


CASE = Case("noops", rows, JOBLIB)
