"""Which pools there are, and which one a command line means."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem

from skyward.cleanup import journal
from skyward.cleanup.journal import Entry
from skyward.cli.output import tell_failed
from skyward.providers.base import Machine

here = click.option("--here", is_flag=True, help="Don't ask clouds: only pools that were started on this computer.")


def on_record() -> list[Entry]:
    """Return the pools of the journal. A local pool ends with its owner, and with its time: then it is struck out."""
    found = []
    for entry in journal.entries():
        alive = entry.owner_alive
        if entry.provider == "local" and (alive is False or (alive is None and entry.is_expired)):
            journal.close(entry.pool_id)
        else:
            found.append(entry)
    return found


def all_pools(here: bool, *, of_any_cloud: bool = False) -> list[Entry]:
    """Return the pools of the journal, and unless `here` those that only clouds know of.

    `of_any_cloud`: a pool is looked for that may be anywhere, so of a cloud that can't be asked it is always told.
    """
    found = on_record()
    if here:
        return found
    from skyward import providers
    from skyward.cleanup.discover import find_pools

    clouds = providers.clouds()
    seen, failed = find_pools(clouds)
    recorded = {place.provider for entry in found for place in entry.places}
    meant = {cloud.name for cloud in clouds} if of_any_cloud else recorded
    tell_failed(failed.items(), "could not be asked for pools", meant=meant)
    known = {entry.pool_id for entry in found}
    return found + [entry for entry in seen if entry.pool_id not in known]


def named(pools: Sequence[str], here: bool) -> list[Entry]:
    """Return the pools with these ids."""
    known = {entry.pool_id: entry for entry in on_record()}
    if not here and not set(pools) <= set(known):
        known = {entry.pool_id: entry for entry in all_pools(here, of_any_cloud=True)}
    problems = []
    for name in dict.fromkeys(pools):
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5)
            hint = f"; the nearest are {', '.join(near)}" if near else "; `skyward ps` lists them"
            problems.append(f"there is no pool {name!r}{hint}")
    if problems:
        raise click.UsageError("\n".join(problems))
    return [known[name] for name in dict.fromkeys(pools)]


def with_keys(pool: str) -> Entry:
    """Return a pool whose machines can be logged in to from here."""
    (entry,) = named([pool], here=False)
    if not entry.pid:
        raise click.ClickException(
            f"pool {pool} was started by {entry.owner or 'somebody'} on another computer, which has the only key of "
            "its machines: run this there"
        )
    return entry


def machine_of(entry: Entry, node: str) -> Machine:
    """Return a pool's machine by its node's number, or its own id."""
    by_id = {machine.id: machine for machine in entry.machines}
    found = by_id.get(node) or (entry.machine(int(node)) if node.isdecimal() else None)
    if found is None:
        if not entry.machines:
            raise click.ClickException(f"pool {entry.pool_id} has no machines yet: its state is {entry.state!r}")
        numbers = [str(n) for n in range(len(entry.machines) + max(entry.nodes.values(), default=0) + 1)]
        there = ", ".join(f"{n} ({machine.id})" for n in numbers if (machine := entry.machine(int(n))))
        raise click.UsageError(f"pool {entry.pool_id} has no node {node!r}; there are {there or 'none'}")
    return found


def complete_pool(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Complete the id of a pool that is on record; clouds would take too long to answer."""
    return [
        CompletionItem(entry.pool_id, help=f"{entry.provider}, {entry.state}")
        for entry in on_record()
        if entry.pool_id.startswith(incomplete)
    ]


def complete_node(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Complete the number of a node of the pool that stands before it."""
    entries = [entry for entry in on_record() if entry.pool_id == ctx.params.get("pool")]
    nodes = [(str(node), machine_id) for entry in entries for machine_id, node in entry.nodes.items()]
    return [CompletionItem(node, help=machine_id) for node, machine_id in sorted(nodes) if node.startswith(incomplete)]


pool_argument = click.argument("pool", shell_complete=complete_pool)
