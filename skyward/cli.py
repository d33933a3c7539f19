"""The command ``skyward``: see what pools exist, and end what their owners could not."""

from __future__ import annotations

import difflib
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skyward.cluster import journal
from skyward.cluster.journal import Entry
from skyward.errors import SkywardError
from skyward.version import __version__

_WIDE = 10_000  # columns of what is no terminal: nothing is wrapped, one pool is one line
_STATUSES = """\b
Exit status:
  0  done
  1  machines of a pool may still run, or a pool was left as it was
  2  the command line can't be understood, or names a pool that is not there
"""


@click.group(epilog=_STATUSES)
@click.version_option(__version__, prog_name="skyward", message="%(prog)s %(version)s")
def main() -> None:
    """See and end the pools that were started on this computer by this user."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


# --- ps -----------------------------------------------------------------------------------------------------


@main.command(epilog=_STATUSES)
@click.option("--json", "as_json", is_flag=True, help="Print a list for programs to read.")
def ps(as_json: bool) -> None:
    """List pools whose end has not been confirmed.

    A pool whose owner is gone is "orphaned": its guardian tries to end it, and `skyward down` can.
    """
    found = journal.entries()
    if as_json:
        click.echo(json.dumps([_facts(entry) for entry in found], indent=2))
    elif not found:
        click.echo("no pools")
    else:
        _print(_table(found))


def _facts(entry: Entry) -> dict[str, Any]:
    return {
        "pool": entry.pool_id,
        "provider": entry.provider,
        "state": entry.state,
        "machines": [
            {"id": m.id, "host": m.login.host, "port": m.login.port, "user": m.login.user} for m in entry.machines
        ],
        "created": entry.created,
        "expires": entry.expires,
        "expired": entry.is_expired,
        "owner": {"pid": entry.pid, "host": entry.host, "alive": entry.owner_alive},
    }


def _table(found: Sequence[Entry]) -> Table:
    terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for heading in ("POOL", "PROVIDER", "MACHINES", "STATE", "AGE", "EXPIRES IN", "OWNER"):
        table.add_column(heading, overflow="fold")
    now = time.time()
    for entry in found:
        expires = "expired" if entry.is_expired else _duration(entry.expires - now)
        machines = ("\n" if terminal else ", ").join(machine.id for machine in entry.machines) or "none yet"
        cells = (entry.pool_id, entry.provider, machines, entry.state, _duration(now - entry.created), expires)
        table.add_row(*map(Text, cells), Text(_owner(entry)))
    return table


def _owner(entry: Entry) -> str:
    if entry.owner_alive is None:
        return f"pid {entry.pid} on {entry.host}"
    return f"pid {entry.pid}" if entry.owner_alive else f"pid {entry.pid} gone (orphaned)"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"


def _print(table: Table) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=_WIDE, color_system=None, force_terminal=False)
    with console.capture() as printed:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


# --- down ---------------------------------------------------------------------------------------------------


@main.command(epilog=_STATUSES)
@click.argument("pools", metavar="[POOL]...", nargs=-1)
@click.option("--all", "all_", is_flag=True, help="Every pool.")
@click.option("--expired", is_flag=True, help="The pools whose time is over.")
@click.option("--yes", "-y", is_flag=True, help="Don't ask before a pool that is in use is ended.")
def down(pools: tuple[str, ...], all_: bool, expired: bool, yes: bool) -> None:
    """End pools: their processes and files on every machine.

    Asks first where a pool is in use: its owner still runs, or may run on another host, and its time is not over.
    """
    if bool(pools) + all_ + expired != 1:
        raise click.UsageError("say which pools: either their ids (`skyward ps` has them), or --all, or --expired")
    chosen = _named(pools) if pools else [entry for entry in journal.entries() if all_ or entry.is_expired]
    if not chosen:
        click.echo("no pools" if all_ else "no expired pools")
        return
    if not yes and not sys.stdin.isatty() and any(map(_in_use, chosen)):
        in_use = ", ".join(entry.pool_id for entry in chosen if _in_use(entry))
        raise click.UsageError(f"in use: {in_use}. There is nobody to ask here: add --yes to end them all the same")
    ended = [_end(entry) if yes or _may_end(entry) else False for entry in chosen]
    sys.exit(0 if all(ended) else 1)


def _named(pools: Sequence[str]) -> list[Entry]:
    known = {entry.pool_id: entry for entry in journal.entries()}
    problems = []
    for name in dict.fromkeys(pools):
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5)
            hint = f"; the nearest are {', '.join(near)}" if near else "; `skyward ps` lists them"
            problems.append(f"there is no pool {name!r}{hint}")
    if problems:
        raise click.UsageError("\n".join(problems))
    return [known[name] for name in dict.fromkeys(pools)]


def _in_use(entry: Entry) -> bool:
    return entry.owner_alive is not False and not entry.is_expired


def _may_end(entry: Entry) -> bool:
    if not _in_use(entry) or click.confirm(f"pool {entry.pool_id} is in use by {_owner(entry)}. End it?"):
        return True
    click.echo(f"pool {entry.pool_id}: left as it is")
    return False


def _end(entry: Entry) -> bool:
    """End a pool, say how that went, and tell whether it is confirmed."""
    from skyward.cluster.release import release  # not for `ps`: it loads asyncssh

    try:
        left = release(entry)
    except SkywardError as exc:
        click.echo(f"pool {entry.pool_id}: may still run. {exc}", err=True)
        return False
    if left:
        click.echo("\n  ".join([f"pool {entry.pool_id}: may still run on", *left]), err=True)
        return False
    journal.close(entry.pool_id)
    count = len(entry.machines)
    click.echo(f"pool {entry.pool_id}: ended on {count} machine{'' if count == 1 else 's'}")
    return True


if __name__ == "__main__":
    main()
