"""``skyward completion``: what a shell needs to complete commands, options and the ids of pools."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from skyward.cli.output import statuses

_SHELLS = ("bash", "zsh", "fish")


@click.command(epilog=statuses(two=""))
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    It completes commands, options, and the ids of pools that were started on this computer.

    \b
    bash:  eval "$(skyward completion bash)"   in ~/.bashrc
    zsh:   eval "$(skyward completion zsh)"    in ~/.zshrc, after compinit
    fish:  skyward completion fish > ~/.config/fish/completions/skyward.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "skyward", "_SKYWARD_COMPLETE").source())
