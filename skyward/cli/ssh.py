"""``skyward ssh``: the user's own ssh, told which keys are the right ones."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

import click

from skyward.cleanup import journal
from skyward.cleanup.journal import Entry
from skyward.cli.output import statuses
from skyward.cli.pools import complete_node, machine_of, pool_argument, with_keys
from skyward.providers.base import Login

_COMMAND = "skyward.cli.ssh.command"


class _WithCommand(click.Command):
    """Takes what follows ``--`` for the machine, as it stands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        cut = args.index("--") if "--" in args else len(args)
        ctx.meta[_COMMAND] = args[cut + 1 :]
        return super().parse_args(ctx, args[:cut])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


@click.command(cls=_WithCommand, epilog=statuses("the machine can't be reached; otherwise the status is that of ssh"))
@pool_argument
@click.argument("node", default="0", shell_complete=complete_node)
@click.pass_context
def ssh(ctx: click.Context, pool: str, node: str) -> None:
    """Log in to a machine of a pool.

    NODE is a number, by default 0, or a machine's id. Runs your own ssh with the pool's key, and accepts only the known
    host key of the machine. As with ssh, the command after -- runs there instead of a shell.
    """
    entry = with_keys(pool)
    if entry.provider == "local":
        raise click.ClickException(f"pool {pool} runs on this computer: it has no machine to log in to")
    arguments = ssh_arguments(entry, machine_of(entry, node).login, ctx.meta[_COMMAND])
    try:
        os.execvp(arguments[0], arguments)
    except FileNotFoundError:
        raise click.ClickException("ssh is not installed: install OpenSSH's client (openssh-client)") from None


def ssh_arguments(entry: Entry, login: Login, command: Sequence[str]) -> list[str]:
    """Return the command line that logs in to a machine of a pool as the pool does. Keys are paths in it."""
    arguments = ["ssh"]

    def option(name: str, value: str) -> None:
        arguments.extend(["-o", f"{name}={value}"])

    if login.host_key is not None:
        # The machine is the pool's own: nothing that is configured for others holds for it.
        name = f"skyward-{entry.pool_id}"
        arguments += ["-F", "none"]
        option("HostKeyAlias", name)
        option("UserKnownHostsFile", _quoted(str(journal.known_hosts(entry.pool_id, name, login.host_key))))
        option("GlobalKnownHostsFile", "/dev/null")
        option("StrictHostKeyChecking", "yes")
        option("UpdateHostKeys", "no")
        option("IdentityAgent", "none")
        option("LogLevel", "ERROR")
    elif login.known_hosts is not None:
        option("UserKnownHostsFile", _quoted(login.known_hosts))
        option("StrictHostKeyChecking", "yes")
    if login.key is not None:
        arguments += ["-i", login.key]
        option("IdentitiesOnly", "yes")
    if login.proxy_command:
        option("ProxyCommand", shlex.join(login.proxy_command).replace("%", "%%"))
    if login.port is not None:
        arguments += ["-p", str(login.port)]
    if login.user is not None:
        arguments += ["-l", login.user]
    return [*arguments, login.host, *(["--", *command] if command else [])]


def _quoted(path: str) -> str:
    """Return a path as ssh's options have it, where spaces separate several and % begins a token."""
    return '"' + path.replace("%", "%%") + '"'
