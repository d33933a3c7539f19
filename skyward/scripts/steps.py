"""Steps of the scripts for machines: how each script begins, runs them, and says where it is.

What a step prints goes into a log file; on standard output there is one line per step, which `read_progress` reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from skyward.scripts import lock

HOME = "${SKYWARD_HOME:-$HOME/.cache/skyward}"
"""Where environments lie on a machine, with uv, its cache and skyward itself; as a shell sees it."""
POOL = "SKYWARD_POOL"
"""Environment variable that marks the processes of a pool, so that they can be found and ended."""
_KEPT = (
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CERT", "PIP_CLIENT_CERT",
    "PIP_TRUSTED_HOST", "PIP_PROXY", "PIP_CONFIG_FILE", "PIP_KEYRING_PROVIDER", "UV_DEFAULT_INDEX", "UV_INDEX*",
    "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX", "UV_INSECURE_HOST", "UV_CONFIG_FILE", "UV_KEYRING_PROVIDER",
    "UV_PYTHON_DOWNLOADS*", "UV_PYTHON_INSTALL_MIRROR", "UV_INSTALLER_GITHUB_BASE_URL", "UV_HTTP_TIMEOUT",
)  # fmt: skip
"""What a user's variables may say about the ways to packages; `NEUTRAL` keeps them."""
NEUTRAL = (
    "for name in $(env | sed -n 's/^\\([A-Z][A-Z_0-9]*\\)=.*/\\1/p'); do case $name in "
    f"{'|'.join(_KEPT)}) ;; PYTHON*|PIP_*|UV_*|VIRTUAL_ENV*|CONDA_*) unset $name ;; esac; done"
)
"""Shell command that unsets variables of a user that steer interpreters and installers."""
_SAY = "::skyward"
LAST_LINES = 20


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of the script's output: a step begins, or has failed with `status` and `lines` of its log."""

    step: str
    status: int | None = None
    lines: tuple[str, ...] = ()


def read_progress(output: Sequence[str]) -> Progress | None:
    """Return what the script said last: the step it is at, or how that failed; None before the first."""
    found = None
    lines: list[str] = []
    for line in output:
        marker, _, rest = line.partition(" ")
        what, _, text = rest.partition(" ")
        if marker != _SAY:
            continue
        if what == "step":
            found = Progress(text)
        elif what == "failed":
            step, _, status = text.rpartition(" ")
            found = Progress(step, int(status))
        elif what == "line":
            lines.append(text)
    if found is not None and found.status is not None:
        return Progress(found.step, found.status, tuple(lines))
    return found


def digest(*parts: str) -> str:
    """Return 12 hex digits that stand for the contents of a step."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def opening(log: str) -> str:
    """Return how every script begins: what says and fails as `read_progress` understands it, and the machine's lock.

    Steps write into `log`, a file name in the logs of the skyward folder.
    """
    return f"""#!/bin/sh
set -u
umask 077
{NEUTRAL}
home="{HOME}"
PATH="$PATH:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:$HOME/.local/bin"
mkdir -p "$home/envs" "$home/stamps" "$home/logs" "$home/skyward" || exit 1
log="$home/logs/{log}"

say() {{ printf '{_SAY} %s\\n' "$*"; }}
fail() {{
    say failed "$1" "$2"
    tail -n {LAST_LINES - 1} "$log" | sed 's/^/{_SAY} line /'
    free=$(df -Pk "$home" | awk 'NR == 2 {{ print $4 }}')
    [ "${{free:-1024}}" -ge 1024 ] || say line "the disk that holds $home is full"
    exit 1
}}
# step NAME FUNCTION
step() {{
    say step "$1"
    ( "$2" ) >> "$log" 2>&1 < /dev/null || fail "$1" "$?"
}}
as_root() {{
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo > /dev/null && sudo -n true 2> /dev/null; then sudo -n "$@"
    else echo "this needs root: user $(id -un) is not root and has no sudo without a password"; return 77
    fi
}}
# Of two pools that start on one machine at once, or on hosts that share the folder, the second finds what the first has
# made.
{lock.shell()}
: > "$log"
[ -z "$no_flock" ] || echo "$no_flock" >> "$log"
"""
