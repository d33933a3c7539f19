"""``skyward ps``: the pools that there are."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import click
from rich import box
from rich.table import Table
from rich.text import Text

from skyward.cleanup.journal import Entry
from skyward.cli.output import as_json, print_table, statuses
from skyward.cli.pools import all_pools, here
from skyward.console.wording import duration


@click.command(epilog=statuses(two=""))
@as_json
@here
def ps(as_json: bool, here: bool) -> None:
    """List pools whose shutdown is not confirmed.

    The list has the pools that were started on this computer, and all pools, yours and those of others, with machines
    in clouds for which you have credentials. A pool whose owner is gone is "orphaned": its guardian tries to shut it
    down, and `skyward down` can do so too.
    """
    found = all_pools(here)
    if as_json:
        click.echo(json.dumps([_facts(entry) for entry in found], indent=2))
    elif not found:
        click.echo("no pools")
    else:
        print_table(_table(found))


def _facts(entry: Entry) -> dict[str, Any]:
    return {
        "pool": entry.pool_id,
        "provider": entry.provider,
        "state": entry.state,
        "machines": [
            {
                "id": m.id,
                "node": entry.nodes.get(m.id),
                "host": m.login.host,
                "port": m.login.port,
                "user": m.login.user,
                "type": m.instance_type,
                "region": m.region,
                "spot": m.spot,
            }
            for m in entry.machines
        ],
        "created": entry.created,
        "expires": entry.expires,
        "expired": entry.is_expired,
        "owner": {"name": entry.owner, "pid": entry.pid or None, "host": entry.host, "alive": entry.owner_alive},
    }


def _table(found: Sequence[Entry]) -> Table:
    terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for heading in ("POOL", "PROVIDER", "MACHINES", "STATE", "AGE", "EXPIRES IN", "OWNER"):
        table.add_column(heading, overflow="fold")
    now = time.time()
    for entry in found:
        expires = "expired" if entry.is_expired else duration(entry.expires - now)
        none = entry.host if entry.provider == "local" else "none yet"
        machines = ("\n" if terminal else ", ").join(machine.id for machine in entry.machines) or none
        cells = (entry.pool_id, entry.provider, machines, entry.state, duration(now - entry.created), expires)
        table.add_row(*map(Text, cells), Text(owner(entry)))
    return table


def owner(entry: Entry) -> str:
    """Return who has started a pool, in words."""
    if not entry.pid:
        return entry.owner or "unknown"
    if entry.owner_alive is None:
        return f"pid {entry.pid} on {entry.host}"
    return f"pid {entry.pid}" if entry.owner_alive else f"pid {entry.pid} gone (orphaned)"
