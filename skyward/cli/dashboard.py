"""``skyward dashboard``: a way to the Dask dashboard of a pool that runs, through SSH."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.request
import webbrowser
from collections.abc import Awaitable, Callable

import click

from skyward.cleanup import journal
from skyward.cleanup.journal import Entry
from skyward.cli.output import as_json, statuses
from skyward.cli.pools import machine_of, pool_argument, with_keys

_LOOK_S = 1.0
_LOAD_S = 30.0
"""Seconds that the page has to be there: a pool that has just come up loads it afterwards. Chosen, not measured."""


@click.command(epilog=statuses())
@pool_argument
@click.option("--no-browser", is_flag=True, help="Only print the URL.")
@as_json
def dashboard(pool: str, no_browser: bool, as_json: bool) -> None:
    """Open the Dask dashboard of a running pool.

    Opens an SSH tunnel, prints the URL on this computer, and keeps the tunnel open until Ctrl-C or the end of the pool.
    If the scheduler moves to another node, it prints the next URL.
    For a local pool, which needs no tunnel, it prints the URL and returns at once.
    """
    entry = with_keys(pool)
    if entry.dashboard_port is None:
        raise click.ClickException(f"pool {pool} has no dashboard yet: its state is {entry.state!r}")

    async def show(port: int) -> None:
        url = f"http://127.0.0.1:{port}/status"
        await _is_there(url)
        click.echo(json.dumps({"pool": pool, "url": url}) if as_json else url)
        if not no_browser:
            webbrowser.open(url)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(show(entry.dashboard_port) if entry.provider == "local" else _keep_open(entry, show))


async def _is_there(url: str) -> None:
    """Return when the page is there, or has had its time."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _LOAD_S
    while time.monotonic() < deadline:
        try:
            with await asyncio.to_thread(opener.open, url, timeout=5):
                return
        except OSError:  # nobody listens yet, or there is no such page yet
            await asyncio.sleep(0.2)


async def _keep_open(entry: Entry, show: Callable[[int], Awaitable[None]]) -> None:
    """Keep a tunnel open until the pool ends: to the node that has the scheduler, and to the next one if it moves."""
    current: Entry | None = entry
    while current is not None:
        current = await _keep_open_until_moved(current, show)
    click.echo(f"pool {entry.pool_id} has ended", err=True)


async def _keep_open_until_moved(entry: Entry, show: Callable[[int], Awaitable[None]]) -> Entry | None:
    """Return the pool's entry once its scheduler has moved; None: the pool has ended."""
    from skyward.cluster.machine_commands import pool_folder
    from skyward.cluster.ssh import Link
    from skyward.cluster.tunnel import Tunnel
    from skyward.node.agent import SOCKET

    now: Entry | None = entry
    link = Link(machine_of(entry, str(entry.scheduler_node)).login)
    tunnel = Tunnel(link, f"{pool_folder(entry.pool_id)}/{SOCKET}")
    try:
        await link.connect()
        await show(await tunnel.listen(f"127.0.0.1:{entry.dashboard_port}"))
        while now is not None and _place(now) == _place(entry):
            await asyncio.sleep(_LOOK_S)
            now = await asyncio.to_thread(journal.read, entry.pool_id)
    finally:
        await tunnel.close()
        await link.close()
    return now


def _place(entry: Entry) -> tuple[int, int | None]:
    return entry.scheduler_node, entry.dashboard_port
