"""End all of a pool that the journal has on record, whatever has become of its owner. Safe to run again, and beside
others that do the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import asyncssh
import psutil

from skyward import providers
from skyward.cleanup.journal import Entry, Place
from skyward.cluster.flush import flush
from skyward.cluster.machine_commands import clean_command
from skyward.cluster.ssh import Link
from skyward.errors import ProviderError, SkywardError, VolumeError
from skyward.node.descendants import processes_of
from skyward.providers.base import Cloud, Machine

logger = logging.getLogger(__name__)

MACHINE_S = 20.0
"""Seconds that one machine may take. Chosen, not measured: a log-in takes one or two, cleaning less."""

_ROUNDS = 5  # of looking for processes of a local pool: those that are found may just have started others
_ROUND_S = 2.0


def end_pool(entry: Entry) -> list[str]:
    """End a pool on all its machines at once, and return a line for each that could not be confirmed.

    Machines that may have data for volumes send it before they are destroyed; what can't be sent is logged.

    Blocks: up to `MACHINE_S` for hosts that stay, as long as a cloud takes to confirm for others, and as long as data
    is being sent. Not to be called in the thread of an event loop.

    Raises
    ------
    SkywardError
        The entry is of a provider that this version does not know.
    """
    if entry.provider == "local":
        return _end_local(entry)
    hosts = [machine for machine in entry.machines if machine.outlives_pool]
    cleaned = asyncio.run(_clean_hosts(entry.pool_id, hosts)) if hosts else []
    if entry.volumes:
        asyncio.run(_flush_machines(entry))
    return cleaned + end_places(entry.pool_id, entry.places)


def _end_local(entry: Entry) -> list[str]:
    """End a pool on this computer: its processes, each of which has its id in the environment, and its files."""
    if entry.owner_alive is None:
        return [f"{entry.host}: a local pool can be ended there only; run `skyward down {entry.pool_id}` on it"]
    for _ in range(_ROUNDS):
        found = list(processes_of(entry.pool_id))
        for process in found:
            with contextlib.suppress(psutil.Error):  # gone meanwhile
                process.kill()
        if not found:
            break
        psutil.wait_procs(found, _ROUND_S)
    if entry.folder:
        shutil.rmtree(entry.folder, ignore_errors=True)
    return [f"process {process.pid} of this computer" for process in processes_of(entry.pool_id)]


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


async def _flush_machines(entry: Entry) -> None:
    machines = [machine for machine in entry.machines if machine.id in entry.nodes and not machine.outlives_pool]
    await asyncio.gather(*(_flush_machine(entry, machine) for machine in machines))


async def _flush_machine(entry: Entry, machine: Machine) -> None:
    """End what still writes on a machine, and send its data."""
    link = Link(machine.login)
    try:
        # What is in the way of this is in the way of `flush` too, which tells of it.
        with contextlib.suppress(TimeoutError, OSError, ValueError, asyncssh.Error, SkywardError):
            async with asyncio.timeout(MACHINE_S):
                await link.run(clean_command(entry.pool_id))
        await flush(link, f"node {entry.nodes[machine.id]} ({machine.id})", entry.volumes)
    except VolumeError as exc:
        logger.error("%s\nThe machine is destroyed, and these files with it", exc)
    finally:
        with contextlib.suppress(OSError):
            await link.close()


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
