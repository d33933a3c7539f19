"""The script that makes a machine ready for a pool: plain POSIX sh, as text. What runs it is the cluster's business.

Every step is skipped where what it makes is there and whole: a second start of the same image does nothing, and one
after an interruption makes again what was left half made. What a step prints goes into a log file; on standard output
there is one line per step, which `read_progress` understands.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skyward.scripts import lock, uv

if TYPE_CHECKING:
    from skyward.spec.image import Image

HOME = "${SKYWARD_HOME:-$HOME/.cache/skyward}"
"""Where environments lie on a machine, with uv, its cache and skyward itself; as a shell sees it."""
POOL = "SKYWARD_POOL"
"""Environment variable that marks the processes of a pool, so that they can be found and ended."""

POWER_OFF = "poweroff || sudo -n poweroff || shutdown -P now || sudo -n shutdown -P now"
"""Shell command that switches a machine off, for any of its users."""

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
_UNREACHABLE = 89
_REACH_S = 12.0
"""Seconds that a package index, or the proxy, may take to accept a connection. Chosen: pip tries for minutes."""
_REACH = f"""
import socket, sys
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

def place(url):
    url = urlsplit(url if "://" in url else "http://" + url)
    return url.scheme, url.hostname, url.port or {{"https": 443, "http": 80}}.get(url.scheme, 1080)

scheme, host, port = target = place(sys.argv[1])
if not host:
    sys.exit(0)
proxies = {{}} if proxy_bypass(host) else getproxies()
proxy = proxies.get(scheme) or proxies.get("all")
through = ""
if proxy:
    target = place(proxy)
    through = " through the proxy %s://%s:%s" % target
try:
    addresses = socket.getaddrinfo(*target[1:], type=socket.SOCK_STREAM)
    for number, (family, kind, protocol, _, address) in enumerate(addresses, 1):
        with socket.socket(family, kind, protocol) as connection:
            connection.settimeout({_REACH_S:g} / len(addresses))
            try:
                connection.connect(address)
                break
            except OSError:
                if number == len(addresses):
                    raise
except OSError as exc:
    print("the package index %s://%s is not reached%s: %s" % (scheme, host, through, exc))
    sys.exit({_UNREACHABLE})
"""
"""Program that connects to a package index, or to the proxy on the way. It has no single quotes, as the shell needs."""
_LOCK_S = 600
"""Seconds that cloud-init may take, and that other package managers may hold apt's locks. Chosen, not measured."""


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
        requirements, constraints = sorted(self.requirements), sorted(self.constraints)
        parts = (self.python, self.extra_index_url or "", *requirements, "-c", *constraints)
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
        requirements=tuple(dict.fromkeys(image.pip)),
        extra_index_url=image.pip_extra_index_url,
        apt=tuple(image.apt),
    )


def script(recipe: Recipe, *, ttl_s: int = 0, outlives_pool: bool = True) -> str:
    """Return the script for `recipe`.

    Parameters
    ----------
    ttl_s
        Seconds after which the machine switches itself off, whatever happens; 0: never.
    outlives_pool
        Whether the machine outlives the pool. On one that doesn't, Debian's timers for upgrades are stopped.
    """
    steps = [opening("bootstrap.log")]
    if ttl_s:
        steps.append(_dead_man(ttl_s))
    if not outlives_pool:
        steps.append(_NO_UPGRADES)
    if recipe.apt:
        steps.append(debian_packages(recipe.apt, asked_by="Image.apt"))
    steps.append(_environment(recipe))
    if recipe.wheel:
        steps.append(_skyward(recipe.wheel))
    steps += [f"say step done\nprintf '%s\\n' {recipe.interpreter}\n"]
    return "\n".join(steps)


def _digest(*parts: str) -> str:
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


_NO_UPGRADES = """
# Upgrades would hold apt's locks, take processors from the work and restart services.
if command -v systemctl > /dev/null; then
    as_root systemctl --no-block stop apt-daily.timer apt-daily-upgrade.timer > /dev/null 2>&1 < /dev/null
fi
"""


def _dead_man(ttl_s: int) -> str:
    return f"""
# The dead man's switch comes first: from here on the machine ends even if nobody is left to end it. It does not bear
# the pool's mark: it has to outlive the pool.
if ! [ -e /tmp/.skyward-dead-man ]; then
    : > /tmp/.skyward-dead-man
    ( trap '' HUP; exec env -u {POOL} sh -c '
        sleep {int(ttl_s)}; {POWER_OFF}
    ' ) > /dev/null 2>&1 < /dev/null 9>&- &
fi
"""


def debian_packages(packages: Sequence[str], *, asked_by: str) -> str:
    """Return the step that installs packages, where they are not installed; `asked_by` is named where it can't."""
    names = sorted(set(packages))
    asked = " ".join(shlex.quote(n) for n in names)
    return f"""
# Each host has its own: they may share the folder.
stamp="$home/stamps/apt-{_digest(*names)}-$(uname -n)-$(cat /etc/machine-id 2> /dev/null)"
has_packages() {{
    for name in {asked}; do
        dpkg-query -W -f '${{Status}} ' "$name" 2> /dev/null | grep -q ' installed ' || return 1
    done
}}
# Unmarked and without the lock: a package manager is not to be killed at its work, and may start what stays. While
# another one holds any of apt's locks it is run again; DPkg::Lock::Timeout covers only one of them.
apt() {{
    waits=no
    while :; do
        as_root env -u {POOL} LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive apt-get -q -o Acquire::Retries=3 "$@" \\
            > "$home/logs/apt.log" 2>&1 8>&- 9>&-
        status=$?
        if [ $status = 0 ] || [ $left = 0 ] || ! grep -q 'Could not get lock' "$home/logs/apt.log"; then break; fi
        [ $waits = yes ] || say step "apt: waiting for another package manager" >&8
        waits=yes left=$((left - 1))
        sleep 1
    done
    cat "$home/logs/apt.log"
    return $status
}}
# The lists may be incomplete although apt-get calls that a warning. The last try takes what it can get.
update_apt() {{
    for pause in 1 5 15; do
        apt -o APT::Update::Error-Mode=any update && return
        [ $left != 0 ] || return
        say step "apt: again in $pause s, $(sed -n 's/^[EW]: //p' "$home/logs/apt.log" | head -n 1)" >&8
        sleep $pause
    done
    apt update
}}
is_run_by_cloud_init() {{
    pid=$$
    while [ "${{pid:-0}}" -gt 1 ]; do
        ! grep -qsa cloud-init "/proc/$pid/cmdline" || return 0
        pid=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$pid/status")
    done
    return 1
}}
# At first boot cloud-init writes apt's sources, and may install packages.
await_cloud_init() {{
    [ -e /run/cloud-init/status.json ] && ! [ -e /run/cloud-init/result.json ] || return
    ! is_run_by_cloud_init || return
    say step "apt: waiting for cloud-init" >&8
    timeout {_LOCK_S} cloud-init status --wait 8>&- 9>&- || echo "cloud-init has failed, or not ended in {_LOCK_S} s"
}}
install_apt() {{
    command -v apt-get > /dev/null || {{ echo "{asked_by} needs apt-get, which this machine lacks"; return 78; }}
    as_root true || return
    left={_LOCK_S}
    await_cloud_init
    update_apt && apt install -y --no-install-recommends -- {asked}
}}
if ! [ -e "$stamp" ]; then
    has_packages || step apt install_apt 8>&1  # for what a step says while it runs
    touch "$stamp"
fi
"""


def _environment(recipe: Recipe) -> str:
    names = " ".join(dict.fromkeys([f"python{recipe.python}", f"python{_minor(recipe.python)}", "python3"]))
    extra = f"export UV_INDEX={shlex.quote(recipe.extra_index_url)}" if recipe.extra_index_url else ""
    return f"""
environment="$home/envs/{recipe.key}"
{uv.SHELL}
use_pip_settings() {{
    export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1 UV_NO_PROGRESS=1 UV_CACHE_DIR="$home/uv-cache"
    # A package that an extra index has comes from there, whatever newer version the default index offers: that may be
    # another one's package of the same name. One that is asked for in a version which is not there comes from the next.
    export UV_INDEX_STRATEGY="${{UV_INDEX_STRATEGY:-unsafe-first-match}}"
    {extra}
    read_pip_settings || return 0
    value=$(setting index-url); [ -z "$value" ] || export UV_DEFAULT_INDEX="$value"
    value=$(setting extra-index-url); [ -z "$value" ] || export UV_INDEX="${{UV_INDEX:+$UV_INDEX }}$value"
    value=$(setting find-links); [ -z "$value" ] || export UV_FIND_LINKS="$value"
    value=$(setting cert); [ -z "$value" ] || export SSL_CERT_FILE="$value"
    value=$(setting proxy); [ -z "$value" ] || export HTTP_PROXY="$value" HTTPS_PROXY="$value"
}}

may_execute() {{
    printf '#!/bin/sh\\n' > "$home/program" && chmod 700 "$home/program" && "$home/program" && return
    echo "programs can't be run in $home: its file system is mounted noexec, or full. In a start file of" \\
        "this user, set SKYWARD_HOME to a folder on another one"
    return 83
}}

# Installers try for minutes. What uv's own settings name, or is on a disk, is not known here.
reach_index() {{
    for file in "${{UV_CONFIG_FILE:-}}" /etc/uv/uv.toml "${{XDG_CONFIG_HOME:-$HOME/.config}}/uv/uv.toml"; do
        [ ! -f "$file" ] || return 0
    done
    [ -z "${{UV_NO_INDEX:-}}${{UV_FIND_LINKS:-}}" ] || return 0
    python3 -IS -c '{_REACH}' "${{UV_DEFAULT_INDEX:-${{UV_INDEX_URL:-https://pypi.org/simple}}}}" 2> /dev/null
    [ "$?" != {_UNREACHABLE} ] || return {_UNREACHABLE}
}}

find_python() {{
    IFS=:; set -- $PATH; unset IFS
    for name in {names}; do for folder; do
        # -I and -S: what a usercustomize or sitecustomize prints would be taken for the path.
        python=$("$folder/$name" -IS -c 'import sys
version = "%d.%d.%d." % sys.version_info[:3]
version.startswith("{recipe.python}.") or sys.exit(1)
print(sys.executable)' 2> /dev/null) && return 0
    done; done
    python=$("$uv" python find {recipe.python} 2> /dev/null) && return 0
    export UV_PYTHON_INSTALL_DIR="$home/python"
    python={recipe.python}
    "$uv" python install -q "$python"
}}

make_environment() {{
    find_python || {{
        echo "Python {recipe.python} is not on this machine, which has $(python3 --version 2>&1), and uv could not" \\
            "install it: install it there, or ask for another one with Image(python=...)"
        return 80
    }}
    # A usercustomize is not read here; what a sitecustomize prints uv takes for Python's answer.
    noise=$("$python" -I -c '' 2> /dev/null | head -n 1)
    [ -z "$noise" ] || {{
        echo "$python prints '$noise' when it starts, which installers can't read past: a sitecustomize or a .pth" \\
            "file of it has to print to standard error instead"
        return 84
    }}
    rm -rf "$environment"
    "$uv" venv -q --python "$python" "$environment"
}}

install_packages() {{
    {_file("requirements.txt", recipe.requirements)} &&
    {_file("constraints.txt", recipe.constraints)} &&
    "$uv" pip install --python "$environment/bin/python" --requirement "$environment/requirements.txt" \\
        --constraint "$environment/constraints.txt" &&
    touch "$environment/complete"
}}

# What is there but not complete is made again from nothing: which of its packages are whole, nobody knows.
if ! [ -e "$environment/complete" ] || ! "$environment/bin/python" -I -c '' > /dev/null 2>&1; then
    use_pip_settings
    ( may_execute ) >> "$log" 2>&1 || fail home "$?"
    ( reach_index ) >> "$log" 2>&1 || fail index "$?"
    find_uv || step uv get_uv
    find_uv
    step python make_environment
    step packages install_packages
fi
"""


def _minor(python: str) -> str:
    return ".".join(python.split(".")[:2])


def _file(name: str, lines: tuple[str, ...]) -> str:
    """Return the command that writes `lines` into a file of the environment."""
    # Not a here-document: a requirement could be spelt like the word that ends it.
    words = " ".join(shlex.quote(line) for line in lines)
    return f"printf '%s\\n' {words or chr(39) * 2} > \"$environment/{name}\""


def _skyward(wheel: str) -> str:
    return f"""
unpack_skyward() {{
    rm -rf "$home/skyward/{wheel}.part"
    "$environment/bin/python" -m zipfile -e "$home/wheels/{wheel}" "$home/skyward/{wheel}.part" &&
    mv "$home/skyward/{wheel}.part" "$home/skyward/{wheel}"
}}
[ -e "$home/skyward/{wheel}" ] || step skyward unpack_skyward
"""
