"""How much memory all processes take for a large array that all tasks of a `Parallel` read, beyond the array itself.

The same for arrays that are not contiguous numbers: those of `layouts`.

Each time the peer is started anew: one that holds on to what it had before would seem to need nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from benchmarks.case import Case, Peak, Pick, Row, each, limit, within
from benchmarks.cases import layouts
from benchmarks.cases.array import TASKS, touch
from benchmarks.peers import JOBLIB, Start


def rows(_: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    megabytes = pick(200, 20)

    def extra(touch: Callable[..., int], make: Callable[[Path], np.ndarray], start: Start) -> float:
        with tempfile.TemporaryDirectory() as folder, start(os.cpu_count() or 1) as peer, peer.joblib():
            _use(touch, np.zeros(1 << 16, int))  # imports numpy over there
            array = make(Path(folder))
            with Peak() as peak:
                _use(touch, array)
        return peak.extra_mb

    def numbers(_: Path) -> np.ndarray:
        return np.random.default_rng().random(megabytes * 125_000)

    def title(kind: str) -> str:
        return f"Parallel: {megabytes} MB {kind} × {TASKS} tasks, extra memory"

    most = 1.2 * megabytes
    targets = (limit(most, f"at most {most:g} MB, 1.2 × the array"),)
    yield Row(title("array"), each(JOBLIB, partial(extra, touch, numbers)), "MB", targets)
    for kind, make in layouts.KINDS.items():
        # loky maps the file of a memmap and needs nothing.
        target = limit(megabytes / 10, f"at most {megabytes / 10:g} MB") if kind == "memmap" else within("loky", 1.2)
        contestants = each(layouts.PEERS, partial(extra, layouts.touch, partial(layouts.new, make, megabytes)))
        yield Row(title(kind), contestants, "MB", (target,))


def _use(touch: Callable[..., int], array: np.ndarray) -> None:
    Parallel()(delayed(touch)(array, i) for i in range(TASKS))


CASE = Case("memory", rows, warm_up=False)
