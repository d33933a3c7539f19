"""Calls of known length, beside the ideal: their total, shared out evenly among the workers.

A call is busy until its time on the wall clock has passed, so it takes no longer for what else the cores have to do.
What it costs to hand calls out shows in full.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from joblib import Parallel, delayed

from benchmarks.case import Case, Pick, Row, each, timed, within
from benchmarks.peers import ALL


def busy(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    even = pick(2_000, 100) * [0.001]
    skewed = pick(270, 27) * [0.001] + pick(30, 3) * [0.1]
    random.Random(1).shuffle(skewed)
    targets = (within("ideal", 1.1), within("loky", 1))
    for title, durations in ((f"{len(even):,} × 1 ms", even), (f"{len(skewed)}: 90 % 1 ms, 10 % 100 ms", skewed)):
        yield Row(title, {**each(peers, _gather(durations)), **_ideal(durations)}, targets=targets)
        parallel = each(peers, _parallel(durations), "skyward", "Dask", "loky")
        yield Row(f"Parallel: {title}", {**parallel, **_ideal(durations)}, targets=targets)


def _ideal(durations: Sequence[float]) -> dict[str, Any]:
    return {"ideal": lambda: sum(durations) / (os.cpu_count() or 1)}


def _gather(durations: Sequence[float]) -> Any:
    return lambda peer: timed(lambda: peer.map(busy, durations))[0]


def _parallel(durations: Sequence[float]) -> Any:
    def parallel(peer: Any) -> float:
        with peer.joblib():
            return timed(lambda: Parallel()(delayed(busy)(seconds) for seconds in durations))[0]

    return parallel


CASE = Case("durations", rows, ALL)
