"""Calls that return large arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.case import Case, Pick, Row, each, timed
from benchmarks.peers import ALL


def block(i: int) -> np.ndarray:
    return np.full(1_250_000, i, float)


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    calls = pick(100, 8)

    def gather(peer: Any) -> float:
        seconds, values = timed(lambda: peer.map(block, range(calls)))
        assert [value[-1] for value in values] == list(range(calls))
        return seconds

    yield Row(f"{calls} results of 10 MB", each(peers, gather))


CASE = Case("results", rows, ALL)
