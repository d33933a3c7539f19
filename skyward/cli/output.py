"""What commands print alike: tables, failures of clouds, and in their help what their exit statuses mean."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click
from rich.console import Console
from rich.table import Table

from skyward.errors import CredentialsError, ProviderError

_WIDE = 10_000  # columns of what is no terminal: nothing is wrapped, one pool is one line


def statuses(one: str = "it could not be done", two: str = "or names a pool that is not there") -> str:
    """Return the end of a command's help: what the statuses 1 and 2 mean."""
    return f"""\b
Exit status:
  0  done
  1  {one}
  2  the command line can't be understood{f', {two}' if two else ''}
"""


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs to read.")


def print_table(table: Table) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=_WIDE, color_system=None, force_terminal=False)
    with console.capture() as printed:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def tell_failed(failed: Iterable[tuple[str, ProviderError]], what: str) -> None:
    """Say which clouds failed, but for those that there are no credentials for: nobody uses them here."""
    for name, error in failed:
        if not isinstance(error, CredentialsError) or not error.missing:
            click.echo(f"{name} {what}: {error}", err=True)
