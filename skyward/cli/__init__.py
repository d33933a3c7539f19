"""The command ``skyward``: one module for each subcommand, what they share in `pools` and `output`."""

from __future__ import annotations

import errno
import logging
from typing import Any

import click

from skyward.cli.completion import completion
from skyward.cli.dashboard import dashboard
from skyward.cli.doctor import doctor
from skyward.cli.down import down
from skyward.cli.logs import logs
from skyward.cli.offers import offers
from skyward.cli.output import statuses
from skyward.cli.ps import ps
from skyward.cli.ssh import ssh
from skyward.errors import SkywardError
from skyward.version import __version__


class _Main(click.Group):
    """Tells of what may well go wrong in a line rather than a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SkywardError as exc:
            raise click.ClickException(str(exc)) from exc
        except OSError as exc:
            if exc.errno == errno.EPIPE:  # the reader has read enough, which click handles
                raise
            raise click.ClickException(str(exc)) from exc


@click.group(cls=_Main, epilog=statuses())
@click.version_option(__version__, prog_name="skyward", message="%(prog)s %(version)s")
def main() -> None:
    """List pools and machine offers, log in to machines, read their logs, and shut pools down."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


for _command in (ps, down, offers, ssh, dashboard, logs, doctor, completion):
    main.add_command(_command)
