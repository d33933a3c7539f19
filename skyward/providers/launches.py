"""Launches of pools that are under way in this process."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Launches:
    """The launches of one pool that share a firewall, a key or a role.

    These are made under `lock`, and after a failure they are removed under it by the last launch only.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    count: int = 0


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
            if not launches.count:
                del _launches[shared]
