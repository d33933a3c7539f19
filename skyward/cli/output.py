"""What commands print alike: tables, failures of clouds, and in their help what their exit statuses mean."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable

import click
from rich.console import Console
from rich.table import Table

from skyward.errors import CredentialsError, ProviderError

_WIDE = 10_000  # columns of what is no terminal: nothing is wrapped, one pool is one line


def statuses(one: str = "failure", two: str = "or names an unknown pool") -> str:
    """Return the end of a command's help: what the statuses 1 and 2 mean."""
    return f"""\b
Exit status:
  0  success
  1  {one}
  2  the command line is invalid{f', {two}' if two else ''}
"""


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_table(table: Table) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=_WIDE, color_system=None, force_terminal=False)
    with console.capture() as printed:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def tell_failed(failed: Iterable[tuple[str, ProviderError]], what: str, *, meant: Collection[str]) -> None:
    """Say which clouds failed, except those without credentials or without an installed SDK, which are not used here.

    A missing SDK is reported for the clouds in `meant`.
    """
    for name, error in failed:
        unused = isinstance(error, CredentialsError) and error.missing
        if not unused and (name in meant or not isinstance(error.__cause__, ImportError)):
            click.echo(f"{name} {what}: {error}", err=True)
