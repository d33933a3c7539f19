"""The command ``skyward``: see what pools exist, end what their owners could not, and look at what clouds offer."""

from __future__ import annotations

import difflib
import json
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skyward.cluster import journal
from skyward.cluster.journal import Entry
from skyward.errors import CredentialsError, ProviderError, SkywardError, SpecError
from skyward.version import __version__

if TYPE_CHECKING:
    from skyward.providers.base import Offer

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
    """See which machines there are and could be, and end those that nobody needs."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


# --- ps -----------------------------------------------------------------------------------------------------


_here = click.option("--here", is_flag=True, help="Ask no clouds: only what was started on this computer.")


@main.command(epilog=_STATUSES)
@click.option("--json", "as_json", is_flag=True, help="Print a list for programs to read.")
@_here
def ps(as_json: bool, here: bool) -> None:
    """List pools whose end has not been confirmed.

    Those that were started on this computer, and those whose machines are found in the clouds that there are
    credentials for, whoever has started them. A pool whose owner is gone is "orphaned": its guardian tries to end it,
    and `skyward down` can.
    """
    found = _pools(here)
    if as_json:
        click.echo(json.dumps([_facts(entry) for entry in found], indent=2))
    elif not found:
        click.echo("no pools")
    else:
        _print(_table(found))


def _pools(here: bool) -> list[Entry]:
    """Return the pools of the journal, and unless `here` those that only clouds know of."""
    found = journal.entries()
    if here:
        return found
    from skyward import providers
    from skyward.cluster.sightings import sightings

    seen, failed = sightings(providers.clouds())
    _tell_failed(failed.items(), "could not be asked for pools")
    known = {entry.pool_id for entry in found}
    return found + [entry for entry in seen if entry.pool_id not in known]


def _tell_failed(failed: Iterable[tuple[str, ProviderError]], what: str) -> None:
    """Say which clouds failed, but for those that there are no credentials for: nobody uses them here."""
    for name, error in failed:
        if not isinstance(error, CredentialsError) or not error.missing:
            click.echo(f"{name} {what}: {error}", err=True)


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
        "owner": {"name": entry.owner, "pid": entry.pid or None, "host": entry.host, "alive": entry.owner_alive},
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
    if not entry.pid:
        return entry.owner or "unknown"
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
@_here
def down(pools: tuple[str, ...], all_: bool, expired: bool, yes: bool, here: bool) -> None:
    """End pools: destroy their machines, or on hosts that stay their processes and files.

    Asks first where a pool is in use: its owner still runs, or may run on another host, and its time is not over.
    Pools that only clouds know of are ended too, for --all those that you have started on this computer.
    """
    if bool(pools) + all_ + expired != 1:
        raise click.UsageError("say which pools: either their ids (`skyward ps` has them), or --all, or --expired")
    if pools:
        chosen = _named(pools, here)
    else:
        mine = journal.this_owner()
        chosen = [e for e in _pools(here) if (all_ and (e.pid or e.owner == mine)) or (expired and e.is_expired)]
    if not chosen:
        click.echo("no pools" if all_ else "no expired pools")
        return
    if not yes and not sys.stdin.isatty() and any(map(_in_use, chosen)):
        in_use = ", ".join(entry.pool_id for entry in chosen if _in_use(entry))
        raise click.UsageError(f"in use: {in_use}. There is nobody to ask here: add --yes to end them all the same")
    ended = [_end(entry) if yes or _may_end(entry) else False for entry in chosen]
    sys.exit(0 if all(ended) else 1)


def _named(pools: Sequence[str], here: bool) -> list[Entry]:
    known = {entry.pool_id: entry for entry in journal.entries()}
    if not here and not set(pools) <= set(known):
        known = {entry.pool_id: entry for entry in _pools(here)}
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


# --- offers -------------------------------------------------------------------------------------------------


@main.command(
    epilog="""\b
Exit status:
  0  done
  1  nothing on offer is what is needed, or no cloud could be asked
  2  the command line can't be understood"""
)
@click.option("--accelerator", metavar="NAME", help='Such as A100, A100:4 or A100-40GB.')
@click.option("--cpu", type=int, help="vCPUs, at least.")
@click.option("--memory", help='At least so much, such as 32GB.')
@click.option("--machine", metavar="TYPE", help="Exactly this type.")
@click.option("--architecture", type=click.Choice(["x86_64", "arm64"]))
@click.option("--provider", "names", multiple=True, help="aws, digitalocean or verda; all if none is given.")
@click.option("--max-price", type=float, help="USD per hour of a machine, spot or not.")
@click.option("--limit", default=20, show_default=True, help="Lines of the table.")
@click.option("--json", "as_json", is_flag=True, help="Print a list for programs to read.")
def offers(names: tuple[str, ...], limit: int, as_json: bool, **options: Any) -> None:
    """Show which machines clouds offer, the cheapest first, spot machines included."""
    from skyward import providers
    from skyward.plan import make_plan, offers_table
    from skyward.spec import PoolSpec

    try:
        spec = PoolSpec(selection="cheapest", allocation="cheapest", **options)  # type: ignore[arg-type]  # settled there
        resolved = providers.resolve(list(names)) if names else tuple(providers.clouds())
        if not isinstance(resolved, tuple):
            clouds = ", ".join(cloud.name for cloud in providers.clouds())
            raise click.UsageError(f"--provider {names[0]}: accepted are {clouds}")
        plan = make_plan(resolved, spec)
    except SpecError as exc:
        raise click.UsageError(str(exc)) from exc
    except SkywardError as exc:
        click.echo(f"{exc}", err=True)
        sys.exit(1)
    _tell_failed(plan.failed, "could not be asked")
    found = list({(o.provider, o.region, o.instance.name): o for step in plan.steps for o in [step.offer]}.values())
    if as_json:
        click.echo(json.dumps([_offer_facts(offer) for offer in found], indent=2))
    else:
        _print(offers_table([(offer, "") for offer in found], most=limit))


def _offer_facts(offer: Offer) -> dict[str, Any]:
    i = offer.instance
    return {
        "provider": offer.provider,
        "type": i.name,
        "region": offer.region,
        "architecture": offer.architecture,
        "accelerator": i.accelerator,
        "accelerator_count": i.accelerator_count,
        "accelerator_memory_gb": i.accelerator_memory_gb,
        "vcpu": i.vcpu,
        "memory_gb": i.memory_gb,
        "price_on_demand": i.price_on_demand,
        "price_spot": i.price_spot,
        "available": offer.available,
        "available_spot": offer.available_spot,
        "prices": offer.prices,
    }


if __name__ == "__main__":
    main()
