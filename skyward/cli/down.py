"""``skyward down``: the end of pools that their owners could not end, or should not go on with."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

from skyward.cleanup import journal
from skyward.cleanup.journal import Entry
from skyward.cli.output import as_json, statuses
from skyward.cli.pools import all_pools, complete_pool, here, named
from skyward.cli.ps import owner
from skyward.console.model import counted
from skyward.errors import SkywardError


@click.command(epilog=statuses("machines of a pool may still run, or you kept a pool"))
@click.argument("pools", metavar="[POOL]...", nargs=-1, shell_complete=complete_pool)
@click.option("--all", "all_", is_flag=True, help="Shut down all pools.")
@click.option("--expired", is_flag=True, help="Shut down expired pools.")
@click.option("--yes", "-y", is_flag=True, help="Don't ask before shutting down a pool that is in use.")
@as_json
@here
def down(pools: tuple[str, ...], all_: bool, expired: bool, yes: bool, as_json: bool, here: bool) -> None:
    """Shut pools down.

    Destroys cloud machines. On this computer and on hosts over SSH, it kills the pool's processes and removes its
    files.

    Asks before it shuts down a pool that is in use: its owner still runs, or may run on another host, and the pool has
    not expired. It also shuts down pools that only clouds know of; with --all, only those that you have started on this
    computer.
    """
    if bool(pools) + all_ + expired != 1:
        raise click.UsageError("name pools by their ids (`skyward ps` lists them), or use --all or --expired")
    if pools:
        chosen = named(pools, here)
    else:
        mine = journal.this_owner()
        chosen = [e for e in all_pools(here) if (all_ and (e.pid or e.owner == mine)) or (expired and e.is_expired)]
    if not chosen:
        click.echo("[]" if as_json else "no pools" if all_ else "no expired pools")
        return
    may_ask = sys.stdin.isatty() and not as_json
    if not yes and not may_ask and any(map(_in_use, chosen)):
        in_use = ", ".join(entry.pool_id for entry in chosen if _in_use(entry))
        raise click.UsageError(f"in use: {in_use}. add --yes to shut them down without a question")
    outcomes = []
    for entry in chosen:
        outcome = _end(entry) if yes or _may_end(entry) else _left_as_it_was(entry)
        outcomes.append(outcome)
        if not as_json:
            _tell(outcome)
    if as_json:
        click.echo(json.dumps(outcomes, indent=2))
    sys.exit(0 if all(outcome["ended"] for outcome in outcomes) else 1)


def _in_use(entry: Entry) -> bool:
    return entry.owner_alive is not False and not entry.is_expired


def _may_end(entry: Entry) -> bool:
    return not _in_use(entry) or click.confirm(f"pool {entry.pool_id} is in use by {owner(entry)}. Shut it down?")


def _left_as_it_was(entry: Entry) -> dict[str, Any]:
    return {"pool": entry.pool_id, "ended": False, "machines": len(entry.machines), "error": None, "left": None}


def _end(entry: Entry) -> dict[str, Any]:
    """End a pool, and return how that went."""
    from skyward.cleanup.end import end_pool  # not for `ps`: it loads asyncssh

    error, left = None, []
    try:
        left = end_pool(entry)
    except SkywardError as exc:
        error = str(exc)
    latest = journal.read(entry.pool_id)
    if not left and latest is not None and latest.launching_until > time.time() and not latest.owner_alive:
        left = ["clouds that were creating machines when its owner ended: its guardian looks again, or run this later"]
    if ended := not left and error is None:
        journal.close(entry.pool_id)
    return {**_left_as_it_was(entry), "ended": ended, "error": error, "left": left}


def _tell(outcome: dict[str, Any]) -> None:
    pool, left, count = (outcome[key] for key in ("pool", "left", "machines"))
    if outcome["ended"]:
        click.echo(f"pool {pool}: shut down on {counted(count, 'machine')}")
    elif outcome["error"]:
        click.echo(f"pool {pool}: may still run. {outcome['error']}", err=True)
    elif left:
        click.echo("\n  ".join([f"pool {pool}: may still run on", *left]), err=True)
    else:
        click.echo(f"pool {pool}: kept")
