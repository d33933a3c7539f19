"""What goes wrong in the emulated AWS, when a test says so."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Market = Literal["spot", "on-demand"]
Key = tuple[str, ...]

_PLENTY = 1_000_000
_STANDARD = tuple("acdhimrtz")
_GRAPHICS = ("g", "gr", "vt")


@dataclass(frozen=True, slots=True)
class Place:
    """A machine that is there or could be: what capacity and quotas are counted by."""

    instance_type: str
    zone: str
    market: Market
    vcpus: int

    @property
    def region(self) -> str:
        return self.zone[:-1]


@dataclass(slots=True)
class Faults:
    """Faults to inject; all may be changed while the emulator runs.

    Attributes
    ----------
    no_capacity
        ``(type, place)`` or ``(type, place, market)``: place is a zone or a region, market ``"spot"`` or
        ``"on-demand"``; ``"*"`` stands for any.
    capacity
        The same keys, and how many machines there may be at once.
    refused
        The same keys, and the code and message with which every launch there is refused.
    quotas
        ``(family, region)`` or ``(family, region, market)``, and how many vCPUs there may be at once. Families:
        ``"standard"``, ``"g"``, ``"p"``, ``"inf"``, ``"trn"``; ``"*"`` stands for any.
    throttled, unavailable, cut, lost
        Action (``"*"``: any) and for how many calls (``math.inf``: until it is removed). Throttled and unavailable
        ones are refused with 503; of cut ones the connection is closed; lost ones are done, and then the connection is
        closed instead of an answer.
    profile_delay_s
        How long a new instance profile is not known to EC2.
    """

    no_capacity: set[Key] = field(default_factory=set)
    capacity: dict[Key, int] = field(default_factory=dict)
    refused: dict[Key, tuple[str, str]] = field(default_factory=dict)
    quotas: dict[Key, int] = field(default_factory=dict)
    throttled: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, float] = field(default_factory=dict)
    cut: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    profile_delay_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take(self, kind: str, action: str) -> bool:
        """Tell whether this call is to fail so; it is one less of them then."""
        counts: dict[str, float] = getattr(self, kind)
        with self._lock:
            for name in (action, "*"):
                if counts.get(name, 0) > 0:
                    counts[name] -= 1
                    return True
        return False

    def refusal(self, new: Place) -> tuple[str, str] | None:
        """Return code and message with which a launch is refused; None when it is not."""
        return next((said for key, said in self.refused.items() if _matches(key, new)), None)

    def room(self, new: Place, there: Iterable[Place]) -> int:
        """Return how many machines more there is capacity for."""
        limits = {**self.capacity, **dict.fromkeys(self.no_capacity, 0)}
        there = list(there) if limits else []
        left = [limit - sum(_matches(key, p) for p in there) for key, limit in limits.items() if _matches(key, new)]
        return max(0, min(left, default=_PLENTY))

    def quota_room(self, new: Place, there: Iterable[Place]) -> int:
        """Return how many machines more the quotas allow."""
        there = list(there) if self.quotas else []
        left = [
            (limit - sum(p.vcpus for p in there if _counts(key, p))) // new.vcpus
            for key, limit in self.quotas.items()
            if _counts(key, new)
        ]
        return max(0, min(left, default=_PLENTY))


def _matches(key: Key, place: Place) -> bool:
    kind, where, market = (*key, "*")[:3]
    is_there = where in ("*", place.zone, place.region)
    return is_there and kind in ("*", place.instance_type) and market in ("*", place.market)


def _counts(key: Key, place: Place) -> bool:
    family, where, market = (*key, "*")[:3]
    return family.lower() in ("*", family_of(place.instance_type)) and _matches(("*", where, market), place)


def family_of(instance_type: str) -> str:
    """Return what quota a type counts against. Amazon EC2 User Guide, "Amazon EC2 instance type quotas"."""
    found = re.match("[a-z]+", instance_type)
    letters = found[0] if found else ""
    return "standard" if letters in _STANDARD else "g" if letters in _GRAPHICS else letters
