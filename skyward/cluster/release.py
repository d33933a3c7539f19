"""End all of a pool that the journal has on record, whatever has become of its owner. Safe to run again, and beside
others that do the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import asyncssh

from skyward.cluster.journal import Entry
from skyward.cluster.remote import clean_command
from skyward.cluster.ssh import Link
from skyward.errors import SkywardError
from skyward.providers.base import Machine

MACHINE_S = 20.0
"""Seconds that one machine may take. By feel: a log-in takes one or two, cleaning less."""


def release(entry: Entry) -> list[str]:
    """End a pool on all its machines at once, and return a line for each that could not be confirmed.

    Blocks for up to `MACHINE_S`; not to be called in the thread of an event loop.

    Raises
    ------
    SkywardError
        The entry is of a provider that this version does not know.
    """
    end = _BY_PROVIDER.get(entry.provider)
    if end is None:
        known = ", ".join(_BY_PROVIDER)
        raise SkywardError(
            f"pool {entry.pool_id} is on {entry.provider!r}, which this skyward can't end: it knows {known}. "
            "Use the version that started it"
        )
    return asyncio.run(end(entry))


async def _clean_hosts(entry: Entry) -> list[str]:
    results = await asyncio.gather(*(_clean_host(entry.pool_id, machine) for machine in entry.machines))
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


# A provider whose machines are destroyed finds them by tag, in addition to those on record, and terminates them.
_BY_PROVIDER: dict[str, Callable[[Entry], Coroutine[Any, Any, list[str]]]] = {"ssh": _clean_hosts}
