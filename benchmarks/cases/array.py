"""A large array that all tasks of a `Parallel` read; a new one each time, so nobody profits from having seen it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from benchmarks.case import Case, Pick, Row, each, faster, timed
from benchmarks.peers import JOBLIB

TASKS = 20
_seeds = itertools.count()


def touch(array: np.ndarray, start: int) -> int:
    """Read every page, and return what does not depend on the order of additions."""
    return int((array[start::512] > 0.5).sum())


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    megabytes = pick(200, 20)

    def work(peer: Any) -> float:
        array = np.random.default_rng(next(_seeds)).random(megabytes * 125_000)
        with peer.joblib():
            seconds, values = timed(lambda: Parallel()(delayed(touch)(array, i) for i in range(TASKS)))
        assert values == [touch(array, i) for i in range(TASKS)]
        return seconds

    title = f"Parallel: {megabytes} MB array × {TASKS} tasks"
    yield Row(title, each(peers, work), targets=(faster("loky", 1),))


CASE = Case("array", rows, JOBLIB)
