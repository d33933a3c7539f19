"""Shell commands that every login shell passes on alike, and answers that can be told from what a login prints."""

from __future__ import annotations

import re
import secrets

_SSH_COMMAND = "SSH_ORIGINAL_COMMAND"
"""Where sshd puts the command it was sent when it runs another one instead (sshd_config(5), ForceCommand)."""


def sh_command(script: str) -> str:
    """Return a command that runs `script`, one line, in ``/bin/sh``, and that sh, bash, zsh, tcsh and fish read alike.

    Between single quotes tcsh still reads ``!``, and fish a backslash. Both stand outside, each after a backslash,
    and so does a single quote itself.
    """
    assert "\n" not in script, "tcsh ends a quoted word at the end of a line"
    return "/bin/sh -c '" + re.sub(r"['!\\]", r"'\\\g<0>'", script) + "'"


class Framed:
    """A command for ``/bin/sh`` whose output stands between two marks.

    Start files, ``~/.ssh/rc`` and a ForceCommand may print before and after, and end with a status other than the
    command's. The mark is random, and the command line does not contain it: a shell that echoes commands does not
    print it.

    Parameters
    ----------
    script
        A POSIX shell script on one line. It runs in a subshell with umask 077.
    merged
        Whether its standard error goes where its standard output goes.
    """

    def __init__(self, script: str, *, merged: bool = False) -> None:
        halves = secrets.token_hex(6), secrets.token_hex(6)
        self.mark: str = "".join(halves)
        mark = f"printf '%s%s' {' '.join(halves)}"
        self.command: str = sh_command(
            f"umask 077; unset {_SSH_COMMAND}; {'' if merged else f'{mark} >&2; '}{mark}; echo; "
            f"( {script} ){' 2>&1' if merged else ''}; status=$?; {mark}; echo \" $status\""
        )

    def read(self, output: str) -> tuple[str, int | None] | None:
        """Return the command's output and its status, which is None if it was cut off; None if it did not run."""
        _, began, rest = output.partition(f"{self.mark}\n")
        if not began:
            return None
        answer, ended, rest = rest.partition(f"{self.mark} ")
        status = rest.partition("\n")[0]
        return answer, int(status) if ended and status.isdecimal() else None

    def noise(self, output: str) -> str:
        """Return what stands before the first mark: what the login printed."""
        return output.partition(self.mark)[0]
