"""Launches of pools that are under way in this process."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Launches:
    """The launches of one pool that share a firewall, a key or a role.

    These are made under `lock`. After a failure they are removed under it, by the last launch of a pool without
    machines.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    count: int = 0
    has_machines: bool = False
    """Whether one of them has succeeded. Its machines may not be listed yet: what they share is left to the pool's end.
    """


_launches: dict[Hashable, Launches] = {}
_counting = threading.Lock()


@contextmanager
def under_way(*shared: Hashable) -> Iterator[Launches]:
    """Count a launch for the time of a block, and return all launches with the same `shared`, such as the pool's id."""
    with _counting:
        launches = _launches.setdefault(shared, Launches())
        launches.count += 1
    try:
        yield launches
    finally:
        with _counting:
            launches.count -= 1
            if not launches.count and not launches.has_machines:
                del _launches[shared]
