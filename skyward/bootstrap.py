"""The script that makes a machine ready for a pool: plain POSIX sh, as text. What runs it is the cluster's business.

Every step leaves a stamp and is skipped where its stamp is: a second start of the same image does nothing. What a step
prints goes into a log file; on standard output there is one line per step, which `read_progress` understands.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skyward.spec import Image

HOME = "${SKYWARD_HOME:-$HOME/.cache/skyward}"
"""Where environments and stamps lie on a machine, as a shell sees it."""

_SAY = "::skyward"
LAST_LINES = 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the environment on a machine is made of.

    Attributes
    ----------
    requirements, constraints
        As pip takes them; constraints only limit what the requirements pull in.
    wheel
        Name of skyward's own wheel among the ``wheels`` of the skyward folder on the machine. It is unpacked beside
        the environment and put on its import path, so that an environment serves every version of skyward.
    """

    python: str
    requirements: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    wheel: str | None = None
    extra_index_url: str | None = None
    apt: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Names the environment: 12 hex digits of what it is made of."""
        parts = (self.python, self.extra_index_url or "", *self.requirements, "-c", *self.constraints)
        return _digest(*parts)

    @property
    def interpreter(self) -> str:
        """The environment's Python, as a shell on the machine sees it."""
        return f'"{HOME}/envs/{self.key}/bin/python"'

    @property
    def import_path(self) -> str:
        """Where skyward itself lies, as a shell on the machine sees it."""
        return f'"{HOME}/skyward/{self.wheel}"'


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


def image_recipe(image: Image, python: str) -> Recipe:
    """Return the recipe of an image as it is, nothing pinned to what is installed here."""
    return Recipe(
        python=image.python or python,
        requirements=tuple(image.pip),
        extra_index_url=image.pip_extra_index_url,
        apt=tuple(image.apt),
    )


def script(recipe: Recipe, *, ttl_s: int = 0) -> str:
    """Return the script for `recipe`.

    Parameters
    ----------
    ttl_s
        Seconds after which the machine switches itself off, whatever happens; 0: never, for a machine that was there
        before.
    """
    steps = [_START]
    if ttl_s:
        steps.append(_dead_man(ttl_s))
    if recipe.apt:
        steps.append(_apt(recipe.apt))
    steps.append(_environment(recipe))
    if recipe.wheel:
        steps.append(_skyward(recipe.wheel))
    steps += [f"say step done\nprintf '%s\\n' {recipe.interpreter}\n"]
    return "\n".join(steps)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


_START = f"""#!/bin/sh
set -u
umask 077
home="{HOME}"
PATH="$PATH:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:$HOME/.local/bin"
mkdir -p "$home/envs" "$home/stamps" "$home/logs" || exit 1
log="$home/logs/bootstrap.log"
: > "$log"

say() {{ printf '{_SAY} %s\\n' "$*"; }}
fail() {{
    say failed "$1" "$2"
    tail -n {LAST_LINES} "$log" | sed 's/^/{_SAY} line /'
    exit 1
}}
# step NAME STAMP FUNCTION: run it unless the stamp is there, and leave the stamp when it has worked.
step() {{
    [ -e "$home/stamps/$2" ] && return 0
    say step "$1"
    ( "$3" ) >> "$log" 2>&1 < /dev/null || fail "$1" "$?"
    : > "$home/stamps/$2"
}}
as_root() {{
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo > /dev/null && sudo -n true 2> /dev/null; then sudo -n "$@"
    else echo "this needs root: user $(id -un) is not root and has no sudo without a password"; return 77
    fi
}}
# Two pools that start on one machine at once: the second finds what the first has made.
if command -v flock > /dev/null; then exec 9> "$home/lock" && flock 9; fi
"""


def _dead_man(ttl_s: int) -> str:
    return f"""
# The dead man's switch comes first: from here on the machine ends even if nobody is left to end it.
if ! [ -e /tmp/.skyward-dead-man ]; then
    : > /tmp/.skyward-dead-man
    ( trap '' HUP; sleep {int(ttl_s)}; as_root poweroff || as_root shutdown -P now ) > /dev/null 2>&1 < /dev/null 9>&- &
fi
"""


def _apt(packages: tuple[str, ...]) -> str:
    names = " ".join(shlex.quote(p) for p in sorted(packages))
    return f"""
install_apt() {{
    command -v apt-get > /dev/null || {{ echo "Image.apt needs apt-get, which this machine lacks"; return 78; }}
    export DEBIAN_FRONTEND=noninteractive
    as_root apt-get -q update &&
    as_root apt-get -qy install --no-install-recommends -- {names}
}}
step apt apt-{_digest(*sorted(packages))} install_apt
"""


def _environment(recipe: Recipe) -> str:
    requirements = "\n".join(recipe.requirements)
    constraints = "\n".join(recipe.constraints)
    extra = f"export UV_INDEX={shlex.quote(recipe.extra_index_url)}" if recipe.extra_index_url else ""
    return f"""
environment="$home/envs/{recipe.key}"

# uv does not read pip's settings: the machine's own package index and certificates are handed on.
use_pip_settings() {{
    export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1 UV_NO_PROGRESS=1 UV_NO_CONFIG=0
    {extra}
    command -v python3 > /dev/null || return 0
    python3 -m pip config list 2> /dev/null > "$home/logs/pip" || return 0
    setting() {{ sed -n "s/^[^=]*[.]$1='\\(.*\\)'\\$/\\1/p" "$home/logs/pip" | tail -n 1; }}
    value=$(setting index-url); [ -z "$value" ] || export UV_DEFAULT_INDEX="$value"
    value=$(setting extra-index-url); [ -z "$value" ] || export UV_INDEX="${{UV_INDEX:+$UV_INDEX }}$value"
    value=$(setting find-links); [ -z "$value" ] || export UV_FIND_LINKS="$value"
    value=$(setting cert); [ -z "$value" ] || export SSL_CERT_FILE="$value"
    # pip takes the best version of all indexes.
    [ -z "${{UV_INDEX:-}}" ] || export UV_INDEX_STRATEGY=unsafe-best-match
}}

find_uv() {{
    for uv in "$(command -v uv)" "$HOME/.local/bin/uv" "$home/uv/bin/uv"; do
        [ -n "$uv" ] && [ -x "$uv" ] && return 0
    done
    return 1
}}

get_uv() {{
    find_uv && return 0
    if python3 -m pip --version > /dev/null 2>&1; then
        python3 -m pip install -q --disable-pip-version-check --target "$home/uv" uv
    elif command -v curl > /dev/null; then
        curl -LsSf https://astral.sh/uv/install.sh | UV_INSTALL_DIR="$home/uv/bin" UV_NO_MODIFY_PATH=1 sh
    elif command -v wget > /dev/null; then
        wget -qO- https://astral.sh/uv/install.sh | UV_INSTALL_DIR="$home/uv/bin" UV_NO_MODIFY_PATH=1 sh
    else
        echo "uv can't be fetched: this machine has neither pip nor curl nor wget"; return 79
    fi && find_uv
}}

find_python() {{
    for python in python{recipe.python} python3 /usr/bin/python3 /usr/local/bin/python3; do
        "$python" -c 'import sys, venv; sys.exit("%d.%d" % sys.version_info[:2] != "{_minor(recipe.python)}")' \\
            > /dev/null 2>&1 && return 0
    done
    python={recipe.python}
    find_uv && "$uv" python install -q "$python"
}}

make_environment() {{
    find_uv && find_python || {{
        echo "Python {recipe.python} is not on this machine, and uv could not install it"; return 80
    }}
    rm -rf "$environment"
    "$uv" venv -q --python "$python" "$environment"
}}

install_packages() {{
    find_uv
    cat > "$environment/requirements.txt" <<'END_OF_REQUIREMENTS'
{requirements}
END_OF_REQUIREMENTS
    cat > "$environment/constraints.txt" <<'END_OF_CONSTRAINTS'
{constraints}
END_OF_CONSTRAINTS
    "$uv" pip install --python "$environment/bin/python" --requirement "$environment/requirements.txt" \\
        --constraint "$environment/constraints.txt"
}}

if ! [ -e "$home/stamps/packages-{recipe.key}" ]; then
    use_pip_settings
    step uv uv get_uv
    step python python-{recipe.key} make_environment
    step packages packages-{recipe.key} install_packages
fi
"""


def _skyward(wheel: str) -> str:
    return f"""
unpack_skyward() {{
    "$environment/bin/python" -m zipfile -e "$home/wheels/{wheel}" "$home/skyward/{wheel}"
}}
step skyward {wheel} unpack_skyward
"""


def _minor(python: str) -> str:
    return ".".join(python.split(".")[:2])
