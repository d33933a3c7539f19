"""Calls that need the values of other calls: a chain, a tree, and a large array that many calls read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.case import Case, Pick, Row, each, faster, timed, within
from benchmarks.peers import ALL

_FAN_IN = 8
_NAMES = ("skyward", "Dask", "Ray")


def add(*numbers: int) -> int:
    return sum(numbers)


def make(megabytes: int) -> np.ndarray:
    return np.ones(megabytes * 125_000)


def read(array: np.ndarray, at: int) -> float:
    return float(array[at])


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    length, leaves, megabytes = pick(100, 10), pick(1000, 50), pick(1000, 20)

    def chain(peer: Any) -> float:
        call = peer.delayed(add)

        def run() -> Any:
            last = call(0)
            for _ in range(length):
                last = call(last, 1)
            return peer.compute([last])

        seconds, (value,) = timed(run)
        assert value == length
        return seconds

    def tree(peer: Any) -> float:
        call = peer.delayed(add)

        def run() -> Any:
            level = [call(1) for _ in range(leaves)]
            while len(level) > 1:
                level = [call(*level[at : at + _FAN_IN]) for at in range(0, len(level), _FAN_IN)]
            return peer.compute(level)

        seconds, (value,) = timed(run)
        assert value == leaves
        return seconds

    def large(peer: Any) -> float:
        array, call = peer.delayed(make)(megabytes), peer.delayed(read)
        seconds, values = timed(lambda: peer.compute([call(array, at) for at in range(20)]))
        assert set(values) == {1.0}
        return seconds

    targets = (within("Dask", 1.1),)
    yield Row(f"chain of {length} calls", each(peers, chain, *_NAMES), targets=targets)
    yield Row(f"tree of {leaves} calls, sums of {_FAN_IN}", each(peers, tree, *_NAMES), targets=targets)
    title = f"{megabytes} MB made once, read by 20 calls"
    yield Row(title, each(peers, large, *_NAMES), targets=(*targets, faster("Ray", 1)))


CASE = Case("graph", rows, ALL)
