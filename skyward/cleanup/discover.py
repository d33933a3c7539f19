"""Pools that clouds know of by the tags of their machines, no matter who started them or from which computer."""

from __future__ import annotations

import time
from collections.abc import Sequence

from skyward.cleanup.journal import Entry, Place
from skyward.errors import ProviderError
from skyward.providers import ask_all
from skyward.providers.base import Cloud, Machine

_UNKNOWN_S = 30 * 86400.0
"""Seconds that a pool is taken to have left whose tags do not say when it expires: to end it, it has to be named."""


def find_pools(clouds: Sequence[Cloud]) -> tuple[list[Entry], dict[str, ProviderError]]:
    """Return what clouds know, oldest first, and why some could not be asked, by their names."""
    answers = ask_all(clouds, lambda cloud: cloud.machines())
    pools: dict[str, list[tuple[Cloud, Machine]]] = {}
    for cloud, answer in zip(clouds, answers, strict=True):
        for machine in answer if not isinstance(answer, ProviderError) else ():
            if machine.pool_id is not None:
                pools.setdefault(machine.pool_id, []).append((cloud, machine))
    failed = {c.name: a for c, a in zip(clouds, answers, strict=True) if isinstance(a, ProviderError)}
    return sorted((_entry(*pool) for pool in pools.items()), key=lambda entry: entry.created), failed


def _entry(pool_id: str, found: Sequence[tuple[Cloud, Machine]]) -> Entry:
    machines = [machine for _, machine in found]
    places = {
        (cloud.name, m.region): Place(provider=cloud.name, region=m.region or "", settings=cloud.settings())
        for cloud, m in found
    }
    owner = next((m.owner for m in machines if m.owner), "")
    return Entry(
        pool_id=pool_id,
        provider=" or ".join(dict.fromkeys(m.provider for m in machines)),
        created=min((m.launched for m in machines if m.launched), default=0.0),
        expires=max((m.expires for m in machines if m.expires), default=time.time() + _UNKNOWN_S),
        pid=0,
        pid_started=0.0,
        host=owner.rpartition("@")[2],
        owner=owner,
        state="running",
        machines=tuple(machines),
        places=tuple(places.values()),
    )
