"""``skyward doctor``: whether what is configured here works, and what to do where it does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import click
from rich import box
from rich.table import Table
from rich.text import Text

from skyward.cli.checks import Check, all_checks
from skyward.cli.output import as_json, print_table, statuses
from skyward.console.model import counted

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red", "unused": "dim"}


@click.command(epilog=statuses("something in the configuration does not work", ""))
@as_json
def doctor(as_json: bool) -> None:
    """Check what is configured and installed.

    Checks the credentials and quotas of clouds, SSH, versions and settings, and says how to fix problems. Sends
    read-only requests to each cloud for which you have credentials. A cloud without credentials is a problem only if it
    is the configured provider.
    """
    checks = all_checks()
    broken = [check for check in checks if check.status == "problem"]
    if as_json:
        click.echo(json.dumps({"ok": not broken, "checks": [check.facts() for check in checks]}, indent=2))
    else:
        print_table(_table(checks))
        click.echo(f"\n{counted(len(broken), 'problem')}" if broken else "\nno problems")
    sys.exit(1 if broken else 0)


def _table(checks: list[Check]) -> Table:
    table = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False)
    for heading in ("", "WHAT", "", "FOUND"):
        table.add_column(heading, overflow="fold")
    topic = ""
    for check in checks:
        lines = list(_lines(check))
        for number, line in enumerate(lines):
            first = number == 0
            shown = check.topic if first and check.topic != topic else ""
            status = Text(check.status if first else "", style=_COLOURS[check.status])
            table.add_row(status, Text(shown), Text(check.name if first else ""), Text(line))
        topic = check.topic
    return table


def _lines(check: Check) -> Iterator[str]:
    yield from check.says.splitlines()
    if check.advice:
        yield from f"→ {check.advice}".splitlines()
