"""Large arrays that are not contiguous numbers, for all tasks of a `Parallel`; a new one each time, as in `array`."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from benchmarks.case import Case, Pick, Row, each, timed, within
from benchmarks.cases.array import TASKS
from benchmarks.peers import JOBLIB

_seeds = itertools.count()


def touch(array: np.ndarray, start: int) -> int:
    """Read every page, and return what does not depend on the order of additions."""
    return int(array.ravel(order="K")[start::512].astype(np.int64).sum())


def _view(values: np.ndarray, _: Path) -> np.ndarray:
    return np.repeat(values, 2)[::2]


def _dates(values: np.ndarray, _: Path) -> np.ndarray:
    return values.astype("M8[s]")


def _mapped(values: np.ndarray, folder: Path) -> np.ndarray:
    path = folder / str(next(_seeds))
    values.tofile(path)
    return np.memmap(path, values.dtype, "r")


KINDS: dict[str, Callable[[np.ndarray, Path], np.ndarray]] = {"view": _view, "datetime64": _dates, "memmap": _mapped}


def new(make: Callable[[np.ndarray, Path], np.ndarray], megabytes: int, folder: Path) -> np.ndarray:
    """Return an array of so many MB that no peer has seen."""
    return make(np.random.default_rng(next(_seeds)).integers(0, 1 << 30, megabytes * 125_000), folder)


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    megabytes = pick(200, 20)

    def measure(make: Callable[[np.ndarray, Path], np.ndarray]) -> Callable[[Any], float]:
        def work(peer: Any) -> float:
            with tempfile.TemporaryDirectory() as folder, peer.joblib():
                array = new(make, megabytes, Path(folder))
                seconds, found = timed(lambda: Parallel()(delayed(touch)(array, i) for i in range(TASKS)))
            assert found == [touch(array, i) for i in range(TASKS)]
            return seconds

        return work

    for kind, make in KINDS.items():
        title = f"Parallel: {megabytes} MB {kind} × {TASKS} tasks"
        yield Row(title, each(peers, measure(make), "skyward", "loky"), targets=(within("loky", 1.2),))


PEERS = {name: JOBLIB[name] for name in ("skyward", "loky")}
CASE = Case("layouts", rows, PEERS)
