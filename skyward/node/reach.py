"""Whether the nodes of a pool reach each other: found out before workers start, and told with addresses and reasons."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Sequence
from typing import Any

PATIENCE_S = 10.0
"""Seconds that a node may take to answer another one. Chosen, not measured: three lost packets at the beginning fit."""
MEET = "skyward_meet"
_NO_CONNECTION = (OSError, ValueError)
"""Raised when there is no connection: a time-out is an OSError, and tornado 6.6 raises ValueError
(`IOStream.start_tls`) if the other side closes the connection before TLS begins."""
_ADVICE = (
    "Let all TCP ports through between the nodes. Where hosts have several addresses, say in which networks they reach "
    "each other: sky.SSH(addresses=...)"
)


class UnreachableError(OSError):
    """Two nodes don't reach each other. The message says which, at which addresses, and why."""


def reason(exc: BaseException) -> str:
    """Return what an exception says, and what its innermost cause says where that is another one."""
    text = _words(exc)
    inner: BaseException | None = exc
    found = text
    while inner is not None:
        if not isinstance(inner, asyncio.CancelledError):
            found = _words(inner)
        inner = inner.__cause__ or inner.__context__
    return text if found in text else f"{text}, because of {found}"


def _words(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__


def own_address(networks: Sequence[str], usual: str) -> str:
    """Return this host's first address in one of `networks`, of which earlier ones come first; `usual` for none.

    Raises
    ------
    UnreachableError
        It has no such address.
    """
    import psutil

    if not networks:
        return usual
    families = ("AF_INET", "AF_INET6")
    addresses = [a.address for found in psutil.net_if_addrs().values() for a in found if a.family.name in families]
    for network in map(ipaddress.ip_network, networks):
        for address in addresses:
            if ipaddress.ip_address(address) in network:
                return str(address)
    raise UnreachableError(
        f"none of the host's addresses ({', '.join(addresses)}) is in sky.SSH(addresses={list(networks)!r})"
    )


def dask_host(host: str) -> str:
    """Return an address as Dask takes it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


async def meet(scheduler: str, node: int, host: str, security: Any) -> asyncio.Server:
    """Find out whether this node and the others reach each other; return what they reach, to be kept open for them.

    Parameters
    ----------
    scheduler
        Its address, which has a `MeetingPlugin`.
    host
        This node's address, as the other nodes reach it.

    Raises
    ------
    UnreachableError
        One of them does not reach another.
    """
    from distributed.core import rpc

    try:
        door = await asyncio.start_server(lambda _, writer: writer.close(), host, 0)
    except OSError as exc:
        raise UnreachableError(f"node {node} can't listen at its address {host}: {_strerror(exc)}. {_ADVICE}") from exc
    try:
        port = door.sockets[0].getsockname()[1]
        arguments = security.get_connection_args("worker")
        try:
            async with rpc(scheduler, timeout=PATIENCE_S, connection_args=arguments) as there:
                answer = await getattr(there, MEET)(node=node, host=host, port=port)
        except _NO_CONNECTION as exc:
            raise UnreachableError(
                f"node {node} at {host} can't reach the scheduler's node, at {scheduler}: {reason(exc)}. {_ADVICE}"
            ) from exc
        if answer["why"]:
            raise UnreachableError(
                f"the scheduler's node, at {scheduler}, can't reach node {node} at {host}, port {port}: "
                f"{answer['why']}. {_ADVICE}"
            )
        found = await asyncio.gather(*(_why_not(*place) for _, *place in answer["others"]))
        for (other, *place), why in zip(answer["others"], found, strict=True):
            if why:
                raise UnreachableError(
                    f"node {node} at {host} can't reach node {other} at {place[0]}, port {place[1]}: {why}. {_ADVICE}"
                )
    except BaseException:
        door.close()
        raise
    return door


async def answers(scheduler: str, security: Any) -> bool:
    """Tell whether a scheduler answers at this address."""
    from distributed.core import rpc

    arguments = security.get_connection_args("worker")
    try:
        async with asyncio.timeout(PATIENCE_S), rpc(scheduler, connection_args=arguments) as there:
            await there.identity(n_workers=0)
    except _NO_CONNECTION:
        return False
    return True


async def _why_not(host: str, port: int) -> str:
    """Return why there is no TCP connection to be had, or nothing when there is."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return f"no answer within {PATIENCE_S:g} s"
    except OSError as exc:
        return _strerror(exc)
    writer.close()
    return ""


def _strerror(exc: OSError) -> str:
    return os.strerror(exc.errno) if exc.errno and exc.errno > 0 else str(exc)


def meeting_plugin() -> Any:
    """Return a plugin by which the scheduler answers `meet`."""
    from distributed import SchedulerPlugin

    class MeetingPlugin(SchedulerPlugin):  # type: ignore[misc]
        name = MEET

        def __init__(self) -> None:
            self._doors: dict[int, tuple[str, int]] = {}

        async def start(self, scheduler: Any) -> None:
            scheduler.handlers[MEET] = self.meet

        async def meet(self, node: int, host: str, port: int) -> dict[str, Any]:
            if why := await _why_not(host, port):
                return {"why": why}
            others = {n: door for n, door in self._doors.items() if n != node}
            self._doors[node] = (host, port)
            found = await asyncio.gather(*(_why_not(*door) for door in others.values()))
            # One that is not reached from here either is lost, or on its way out.
            return {"why": "", "others": [[n, *others[n]] for n, why in zip(others, found, strict=True) if not why]}

    return MeetingPlugin()
