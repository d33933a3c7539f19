"""Tasks that are a method of one object of plain Python data: each sends the object along, as it may have changed.

Time and memory are measured apart: to look at the memory of all processes takes time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from joblib import Parallel, delayed

from benchmarks.case import Case, Peak, Pick, Row, each, timed, within
from benchmarks.peers import Start, loky, skyward

TASKS = 150
_PEERS = {"skyward": skyward, "loky": loky}


class Table:
    def __init__(self, megabytes: int) -> None:
        self.lines = [f"{i:0999d}" for i in range(1_000 * megabytes)]

    def look_up(self, i: int) -> str:
        return self.lines[i]


def rows(_: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    megabytes = pick(10, 2)

    def use(table: Table) -> None:
        values = Parallel()(delayed(table.look_up)(i) for i in range(TASKS))
        assert values == table.lines[:TASKS]

    def seconds(start: Start) -> float:
        with start(os.cpu_count() or 1) as peer, peer.joblib():
            use(Table(1))
            return timed(lambda: use(table))[0]

    def extra(start: Start) -> float:
        with start(os.cpu_count() or 1) as peer, peer.joblib():
            use(Table(1))
            with Peak() as peak:
                use(table)
        return peak.extra_mb

    table = Table(megabytes)
    title = f"Parallel: {megabytes} MB bound method × {TASKS}"
    yield Row(title, each(_PEERS, seconds), targets=(within("loky", 1.2),))
    yield Row(f"{title}, extra memory", each(_PEERS, extra), "MB", (within("loky", 1.2),))


CASE = Case("method", rows, warm_up=False)
