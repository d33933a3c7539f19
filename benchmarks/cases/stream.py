"""A generator of very many calls, streamed: whether the time per call and the memory of the client stay the same.

Measured in a process of its own, whose memory holds nothing that others have left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import psutil

import skyward as sky
from benchmarks.case import Case, Pick, Row, limit


@sky.compute
def nothing(x: int) -> int:
    return x


def measure(calls: int, slots: int) -> dict[str, float]:
    memory = psutil.Process().memory_info
    with sky.ComputePool("local", concurrency=slots, display="quiet") as pool:
        assert sum(sky.gather((nothing(i) for i in range(1000)), stream=True) >> pool) == 499_500
        before, started = memory().rss, time.perf_counter()
        peak, total, marks = before, 0, {}
        for done, value in enumerate(sky.gather((nothing(i) for i in range(calls)), stream=True) >> pool, 1):
            total += value
            if done % (calls // 100) == 0:
                peak = max(peak, memory().rss)
                marks[100 * done // calls] = (time.perf_counter() - started, (peak - before) / 1e6)
        assert total == calls * (calls - 1) // 2
    half, end = marks[50][0], marks[100][0]
    return {"seconds": end, "second half": (end - half) / half, "MB at 10 %": marks[10][1], "MB": marks[100][1]}


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:  # noqa: ARG001 - it brings its own
    calls = pick(1_000_000, 20_000)
    found: dict[str, float] = {}

    def run() -> float:
        """Return the seconds; what else is found is for the other rows, which come after."""
        code = f"import json; from {__name__} import measure; print(json.dumps(measure({calls}, {os.cpu_count()})))"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        found.update(json.loads(done.stdout))
        return found["seconds"]

    title = f"{calls:,} calls streamed"
    yield Row(title, {"skyward": run})
    for key, what, unit, targets in (
        ("second half", "time of the second half ÷ of the first", "", (limit(1.1, "at most 1.1: linear"),)),
        ("MB at 10 %", "client's memory grown by, at 10 %", "MB", ()),
        ("MB", "client's memory grown by, at the end", "MB", (limit(200, "at most 200 MB"),)),
    ):
        yield Row(f"{title}: {what}", {"skyward": partial(found.__getitem__, key)}, unit, targets)


CASE = Case("stream", rows, warm_up=False)
