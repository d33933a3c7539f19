"""``skyward logs``: what agents and bootstraps have written, on a pool's machines or, of those that failed, here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skyward import paths
from skyward.cleanup import journal
from skyward.cleanup.journal import Entry
from skyward.cli.output import statuses
from skyward.cli.pools import complete_node, machine_of, pool_argument, with_keys
from skyward.errors import SkywardError
from skyward.providers.base import Machine
from skyward.scripts.steps import HOME, POOL

if TYPE_CHECKING:
    from skyward.cluster.ssh import Link

_LOOK_S = 1.0
_LOCAL_LOOK_S = 0.2

Tell = Callable[[str, str], None]
"""Takes where a line is from, and the line."""


@click.command(epilog=statuses("some machines could not be asked"))
@pool_argument
@click.option("--node", shell_complete=complete_node, help="Only this node: a number, or a machine's id.")
@click.option("--follow", "-f", is_flag=True, help="Print new lines until Ctrl-C or the end of the pool.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line.")
def logs(pool: str, node: str | None, follow: bool, as_json: bool) -> None:
    """Print the logs of a pool's machines.

    Prints the logs of each machine's bootstrap, volumes and agent. They don't contain the output of calls, which goes
    to the program that runs the pool: see pool.logs(). A local pool has only the agent's log.

    The logs of machines that could not be prepared are kept on this computer. They are printed even after their pool
    has ended.
    """
    kept = _kept(pool)
    has_ended = bool(kept) and journal.read(pool) is None
    entry = None if has_ended else with_keys(pool)
    printer = _Printer(as_json)
    for path in kept:
        if node in (None, path.stem):
            for line in path.read_text(errors="replace").splitlines():
                printer.teller(path.stem)("kept", line)
    if entry is None or node in {path.stem for path in kept}:
        return
    with contextlib.suppress(KeyboardInterrupt):
        if entry.provider == "local":
            _print_local(entry, node, follow, printer)
        elif not _print_remote(entry, node, follow, printer):
            sys.exit(1)


class _Printer:
    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def teller(self, machine: str, node: int | None = None) -> Tell:
        """Return what prints the lines of one machine."""

        def tell(log: str, line: str) -> None:
            if self._as_json:
                click.echo(json.dumps({"node": node, "machine": machine, "log": log, "line": line}))
            else:
                click.echo(f"{machine if node is None else f'node {node}'} {log}: {line}")

        return tell


def _kept(pool: str) -> list[Path]:
    """Return the logs of a pool's failed machines that were kept here, each named after its machine."""
    folder = paths.data_folder() / "logs"
    return sorted(folder.glob(f"{pool}/*.log")) if pool.isalnum() else []


def _in_order(entry: Entry) -> list[Machine]:
    """Return the machines that are nodes, in order; all of them if none has a number."""
    numbered = [machine for machine in entry.machines if machine.id in entry.nodes]
    return sorted(numbered, key=lambda machine: entry.nodes[machine.id]) or list(entry.machines)


def _print_local(entry: Entry, node: str | None, follow: bool, printer: _Printer) -> None:
    if node is not None:
        raise click.UsageError(f"pool {entry.pool_id} runs on this computer: its nodes share one log, so omit --node")
    tell = printer.teller(entry.host)
    for line in _local_lines(entry, follow):
        tell("agent", line)


def _print_remote(entry: Entry, node: str | None, follow: bool, printer: _Printer) -> bool:
    """Print the logs of machines, and tell whether all could be asked."""
    machines = [machine_of(entry, node)] if node is not None else _in_order(entry)
    tellers = [(machine, printer.teller(machine.id, entry.nodes.get(machine.id))) for machine in machines]
    return asyncio.run(_follow(entry, tellers) if follow else _read(entry, tellers))


def _local_lines(entry: Entry, follow: bool) -> Iterator[str]:
    path = Path(entry.folder) / "agent.log"
    with contextlib.suppress(FileNotFoundError), path.open(errors="replace") as file:
        rest = ""
        while True:
            text = file.read()
            *lines, rest = (rest + text).split("\n")
            yield from lines
            if text:
                continue
            if not follow or journal.read(entry.pool_id) is None:
                break
            time.sleep(_LOCAL_LOOK_S)
        if rest:
            yield rest


# --- on machines --------------------------------------------------------------------------------------------


def _paths(entry: Entry) -> dict[str, str]:
    """Return where logs are on a machine, as a shell sees it, in the order in which they begin."""
    from skyward.cluster.machine_commands import pool_folder
    from skyward.node.agent import LOG

    return {
        "bootstrap": f'"{HOME}/logs/bootstrap.log"',
        "volumes": f'"{HOME}/logs/volumes.log"',
        "agent": f"{pool_folder(entry.pool_id)}/{LOG}",
    }


async def _read(entry: Entry, tellers: list[tuple[Machine, Tell]]) -> bool:
    """Tell all that there is, machine after machine."""
    from skyward.cluster.ssh import Link

    async def lines_of(machine: Machine) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        link = Link(machine.login)
        try:
            for log, path in _paths(entry).items():
                await link.lines(f"cat {path} 2> /dev/null", lambda line, log=log: found.append((log, line)))  # type: ignore[misc]
        finally:
            await link.close()
        return found

    answers = await asyncio.gather(*(lines_of(machine) for machine, _ in tellers), return_exceptions=True)
    for (machine, tell), answer in zip(tellers, answers, strict=True):
        if isinstance(answer, BaseException):
            _complain(machine, answer)
        else:
            for log, line in answer:
                tell(log, line)
    return not any(isinstance(answer, BaseException) for answer in answers)


async def _follow(entry: Entry, tellers: list[tuple[Machine, Tell]]) -> bool:
    """Tell what there is and what comes, until the pool has ended."""
    tasks = {asyncio.create_task(_follow_machine(entry, machine, tell)): machine for machine, tell in tellers}
    all_asked = True
    pending = set(tasks)
    try:
        while pending and await asyncio.to_thread(journal.read, entry.pool_id) is not None:
            done, pending = await asyncio.wait(pending, timeout=_LOOK_S)
            for task in done:
                if (exc := task.exception()) is not None:
                    all_asked = False
                    _complain(tasks[task], exc)
        return all_asked
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _follow_machine(entry: Entry, machine: Machine, tell: Tell) -> None:
    from skyward.cluster.ssh import Link

    link = Link(machine.login)
    try:
        await link.connect()
        async with asyncio.TaskGroup() as group:
            for log, path in _paths(entry).items():
                group.create_task(_follow_log(link, path, entry.pool_id, partial(tell, log)))
    finally:
        await link.close()


async def _follow_log(link: Link, path: str, pool_id: str, tell: Callable[[str], None]) -> None:
    """Tell the lines of a log, over one connection after another: one that breaks may be the pool's end, or a cable."""
    import asyncssh

    from skyward.cluster.remote import UNREACHABLE_S

    seen, lost_at = 0, None

    def hear(line: str) -> None:
        nonlocal seen
        seen += 1
        tell(line)

    while True:
        try:
            await link.connect()
            lost_at = None
            await link.lines(f"exec env {POOL}={pool_id} tail -n +{seen + 1} -F {path} 2> /dev/null", hear)
            return  # it was ended on the machine
        except (SkywardError, OSError, asyncssh.Error):
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > UNREACHABLE_S:
                raise
            await asyncio.sleep(_LOOK_S)


def _complain(machine: Machine, exc: BaseException) -> None:
    import asyncssh

    if isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    if not isinstance(exc, (SkywardError, OSError, asyncssh.Error)):
        raise exc
    click.echo(f"{machine.id}: {exc or type(exc).__name__}", err=True)
