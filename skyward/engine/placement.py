"""Which workers there are, and how many chunks each has: where the next one goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from skyward.transfer.wire import Slot


class Placement:
    """Counts chunks by worker, those that run and those that wait there. Workers have one thread each.

    Every operation takes the same time however many workers there are, but for `update`.
    """

    def __init__(self) -> None:
        self._load: dict[str, int] = {}  # of workers that have something, also of those that are gone
        self._levels: list[dict[str, None]] = [{}]  # present workers by their load
        self._places: dict[str, Slot] = {}  # of all workers that ever were
        self._avoided: dict[str, float] = {}
        self.count: int = 0

    def update(self, slots: Sequence[Slot]) -> None:
        """Take note of the slots that there are now."""
        self._levels = [{}]
        for slot in slots:
            self._places[slot.address] = slot
            self._level(self._load.get(slot.address, 0))[slot.address] = None
        self.count = sum(slot.threads for slot in slots)
        there = {slot.address for slot in slots}
        self._avoided = {address: until for address, until in self._avoided.items() if address in there}

    def _level(self, load: int) -> dict[str, None]:
        while len(self._levels) <= load:
            self._levels.append({})
        return self._levels[load]

    def add(self, address: str) -> None:
        self._change(address, +1)

    def remove(self, address: str) -> None:
        self._change(address, -1)

    def _change(self, address: str, by: int) -> None:
        before = self._load.get(address, 0)
        after = before + by
        if after:
            self._load[address] = after
        else:
            del self._load[address]
        if address in self._level(before):
            del self._levels[before][address]
            self._level(after)[address] = None

    def avoid(self, address: str, until: float) -> None:
        """Send nothing more to a worker until then, by `time.monotonic`, or until it is gone."""
        self._avoided[address] = until

    def pick(self, ahead: int) -> str | None:
        """Return the worker that has least to do; None when each has `ahead` chunks."""
        for level in self._levels[:ahead]:
            if address := self._first(level):
                return address
        return None

    def _first(self, addresses: Iterable[str]) -> str | None:
        if not self._avoided:
            return next(iter(addresses), None)
        now = time.monotonic()
        return next((a for a in addresses if self._avoided.get(a, 0.0) <= now), None)

    def has_idle(self) -> bool:
        return self._first(self._levels[0]) is not None

    def overloaded(self) -> list[str]:
        """Return workers where chunks wait behind others, the fullest first."""
        return [address for level in reversed(self._levels[2:]) for address in level]

    def busy(self) -> set[str]:
        """Return the addresses of workers that have something to do."""
        return set(self._load)

    def node(self, address: str) -> int:
        return self._places[address].node

    def nodes(self) -> set[int]:
        """Return the nodes that there are now."""
        return {self._places[address].node for level in self._levels for address in level}

    def successor(self, address: str) -> str | None:
        """Return the worker that is in the place of one that is gone; None: not yet."""
        _, node, number, *_ = self._places[address]
        present = (self._places[a] for level in self._levels for a in level if a != address)
        return next((s.address for s in present if (s.node, s.number) == (node, number)), None)

    def name(self, address: str) -> str:
        slot = self._places.get(address)
        return f"{slot.node}-{slot.number}" if slot is not None else address
