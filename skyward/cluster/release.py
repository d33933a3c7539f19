"""End all of a pool that the journal has on record, whatever has become of its owner. Safe to run again, and beside
others that do the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import asyncssh

from skyward import providers
from skyward.cluster.journal import Entry, Place
from skyward.cluster.remote import clean_command
from skyward.cluster.ssh import Link
from skyward.errors import ProviderError, SkywardError
from skyward.providers.base import Cloud, Machine

MACHINE_S = 20.0
"""Seconds that one machine may take. By feel: a log-in takes one or two, cleaning less."""


def release(entry: Entry) -> list[str]:
    """End a pool on all its machines at once, and return a line for each that could not be confirmed.

    Blocks: up to `MACHINE_S` for hosts that stay, as long as a cloud takes to confirm for others. Not to be called in
    the thread of an event loop.

    Raises
    ------
    SkywardError
        The entry is of a provider that this version does not know.
    """
    hosts = [machine for machine in entry.machines if machine.lives_on]
    cleaned = asyncio.run(_clean_hosts(entry.pool_id, hosts)) if hosts else []
    return cleaned + end_places(entry.pool_id, entry.places)


def end_places(pool_id: str, places: Sequence[Place]) -> list[str]:
    """Destroy all of a pool in clouds, side by side, and return a line for each place where that is not confirmed.

    Raises
    ------
    SkywardError
        A place is of a provider that this version does not know.
    """
    clouds: list[tuple[Cloud, list[str]]] = []
    for place in places:
        cloud = providers.make(place.provider, place.settings)
        known = next((regions for other, regions in clouds if other == cloud), None)
        if known is None:
            clouds.append((cloud, [place.region]))
        elif place.region not in known:
            known.append(place.region)
    if not clouds:
        return []
    with ThreadPoolExecutor(len(clouds), thread_name_prefix="skyward-end") as threads:
        return [line for line in threads.map(lambda pair: _end(pool_id, *pair), clouds) if line is not None]


def _end(pool_id: str, cloud: Cloud, regions: Sequence[str]) -> str | None:
    try:
        cloud.end(pool_id, regions)
    except ProviderError as exc:
        return f"{cloud.name} {', '.join(regions)}: {exc}"
    return None


async def _clean_hosts(pool_id: str, hosts: Sequence[Machine]) -> list[str]:
    results = await asyncio.gather(*(_clean_host(pool_id, machine) for machine in hosts))
    return [line for line in results if line is not None]


async def _clean_host(pool_id: str, machine: Machine) -> str | None:
    """Clean a machine that stays, and return what was in the way of it."""
    link = Link(machine.login)
    try:
        async with asyncio.timeout(MACHINE_S):
            done = await link.run(clean_command(pool_id))
        if done.status == 0:
            return None
        why = done.error.strip() or f"cleaning ended with status {done.status}"
    except TimeoutError:
        why = f"no answer within {MACHINE_S:g} s"
    except (OSError, ValueError, asyncssh.Error, SkywardError) as exc:
        why = str(exc) or type(exc).__name__
    finally:
        with contextlib.suppress(OSError):
            await link.close()
    return f"{machine.id}: {why}"
