"""How much memory all processes take for a large array that all tasks of a `Parallel` read, beyond the array itself.

Each time the peer is started anew: one that holds on to what it had before would seem to need nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from benchmarks.case import Case, Peak, Pick, Row, each, limit
from benchmarks.cases.array import TASKS, touch
from benchmarks.peers import JOBLIB, Start


def rows(_: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    megabytes = pick(200, 20)

    def extra(start: Start) -> float:
        with start(os.cpu_count() or 1) as peer, peer.joblib():
            _use(np.zeros(1 << 16))  # imports numpy over there
            array = np.random.default_rng().random(megabytes * 125_000)
            with Peak() as peak:
                _use(array)
        return peak.extra_mb

    most = 1.2 * megabytes
    targets = (limit(most, f"at most {most:g} MB, 1.2 × the array"),)
    title = f"Parallel: {megabytes} MB array × {TASKS} tasks, extra memory"
    yield Row(title, each(JOBLIB, extra), "MB", targets)


def _use(array: np.ndarray) -> None:
    Parallel()(delayed(touch)(array, i) for i in range(TASKS))


CASE = Case("memory", rows, warm_up=False)
