"""What a case of `bench.py` or `wan.py` consists of, and its clock and its scale. Imports nothing of skyward."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """skyward's figure is to be at most `factor` times that of `peer`; without a peer, at most `factor` itself."""

    peer: str | None
    factor: float
    text: str


def faster(peer: str, times: float) -> Target:
    return Target(peer, 1 / times, f"at least {times:g} × as fast as {peer}")


def within(peer: str, factor: float) -> Target:
    return Target(peer, factor, f"at most {factor:g} × {peer}")


def limit(most: float, text: str) -> Target:
    return Target(None, most, text)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: what each contestant does, returning its figure. Less is better.

    `unit` is ``"s"``, ``"MB"``, ``"kB"``, or nothing for a plain number.
    """

    title: str
    contestants: Mapping[str, Callable[[], float]]
    unit: str = "s"
    targets: tuple[Target, ...] = ()


Pick = Callable[[int, int], int]
"""Chooses between a full size and a quick one."""


@dataclass(frozen=True, slots=True)
class Case:
    """Rows that share their peers.

    `peers` start them, by name, with so many `workers`; None: one per core. `rows` is given those that could be
    started, and a choice of sizes. With `warm_up`, all rows run once at quick sizes before anything counts.
    """

    name: str
    rows: Callable[[Mapping[str, Any], Pick], Iterable[Row]]
    peers: Mapping[str, Callable[[int], AbstractContextManager[Any]]] = field(default_factory=dict)
    _: KW_ONLY
    workers: int | None = None
    warm_up: bool = True


def each(peers: Mapping[str, T], measure: Callable[[T], float], *names: str) -> dict[str, Callable[[], float]]:
    """Return `measure` for every peer, or for those with these names, as contestants of a row."""
    return {name: partial(measure, peer) for name, peer in peers.items() if not names or name in names}


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds that `work` takes, and what it returns."""
    gc.collect()  # what others have left is not collected on this one's time
    started = time.perf_counter()
    value = work()
    return time.perf_counter() - started, value


class Peak:
    """Inside the block, watches what this process and all its descendants hold; `extra_mb` is its highest growth.

    Counts private memory, files that are mapped in proportion to who maps them, and shared memory once, whether or
    not it is mapped; the latter is that of the whole machine. Needs Linux.
    """

    _EVERY_S = 0.01
    extra_mb = 0.0

    def __enter__(self) -> Self:
        gc.collect()
        self._before = self._highest = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._highest = max(self._highest, self._now())
        self.extra_mb = (self._highest - self._before) / 1e6

    def _watch(self) -> None:
        while not self._over.wait(self._EVERY_S):
            self._highest = max(self._highest, self._now())

    @staticmethod
    def _now() -> int:
        me = psutil.Process()
        total = _bytes(Path("/proc/meminfo"), "Shmem:")
        for process in (me, *me.children(recursive=True)):
            try:
                total += _bytes(Path(f"/proc/{process.pid}/smaps_rollup"), "Pss_Anon:", "Pss_File:")
            except OSError:  # it has ended meanwhile
                continue
        return total


def _bytes(file: Path, *wanted: str) -> int:
    lines = (line.split() for line in file.read_text().splitlines())
    return sum(1024 * int(words[1]) for words in lines if words[0] in wanted)
