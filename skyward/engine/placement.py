"""Which slots there are, and how many chunks each has: where the next one goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence

from skyward.wire import Slot


class Placement:
    """Counts chunks by worker, those that run and those that wait there."""

    def __init__(self) -> None:
        self._threads: dict[str, int] = {}
        self._load: Counter[str] = Counter()
        self._names: dict[str, str] = {}  # of all workers that ever were, for messages
        self._shunned: dict[str, float] = {}
        self.count = 0

    def update(self, slots: Sequence[Slot]) -> None:
        """Take note of the slots that there are now."""
        self._threads = {}
        for slot in slots:
            self._threads[slot.address] = self._threads.get(slot.address, 0) + slot.threads
            self._names[slot.address] = f"{slot.node}-{slot.number}"
        self.count = sum(self._threads.values())
        self._shunned = {address: until for address, until in self._shunned.items() if address in self._threads}

    def shun(self, address: str, until: float) -> None:
        """Send nothing more to a worker until then, by `time.monotonic`, or until it is gone."""
        self._shunned[address] = until

    def _is_shunned(self, address: str) -> bool:
        return bool(self._shunned) and self._shunned.get(address, 0.0) > time.monotonic()

    def add(self, address: str) -> None:
        self._load[address] += 1

    def remove(self, address: str) -> None:
        self._load[address] -= 1
        if not self._load[address]:
            del self._load[address]

    def pick(self, ahead: int) -> str | None:
        """Return the worker that has least to do; None when each has `ahead` chunks per thread."""
        best, least = None, float(ahead)
        for address, threads in self._threads.items():
            load = self._load[address] / threads
            if load < least and not self._is_shunned(address):
                best, least = address, load
        return best

    def has_idle(self) -> bool:
        return any(not self._load[a] and not self._is_shunned(a) for a in self._threads)

    def crowded(self, addresses: Iterable[str]) -> list[str]:
        """Return those of `addresses` with more chunks than threads, the fullest first."""
        found = [a for a in addresses if self._load[a] > self._threads.get(a, 1)]
        return sorted(found, key=lambda a: -self._load[a])

    def busy(self) -> set[str]:
        """Return the addresses of workers that have something to do."""
        return set(self._load)

    def name(self, address: str) -> str:
        return self._names.get(address, address)
