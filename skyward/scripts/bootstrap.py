"""The script that makes a machine ready for a pool: plain POSIX sh, as text. What runs it is the cluster's business.

Every step is skipped where what it makes is there and whole: a second start of the same image does nothing, and one
after an interruption makes again what was left half made.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skyward.scripts import uv
from skyward.scripts.apt import debian_packages
from skyward.scripts.dead_man import timer_once
from skyward.scripts.steps import HOME, digest, opening

if TYPE_CHECKING:
    from skyward.spec.image import Image

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


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the environment on a machine is made of.

    Attributes
    ----------
    requirements, constraints
        As pip takes them; constraints only limit what the requirements pull in.
    extra_index_url
        Indexes with priority over the default one, between spaces.
    wheel
        Name of skyward's own wheel among the ``wheels`` of the skyward folder on the machine. It is unpacked beside
        the environment and put on its import path, so that an environment serves every version of skyward.
    local
        Paths of the user's own wheels among those ``wheels``, each in a folder named for its content.
    """

    python: str
    requirements: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    wheel: str | None = None
    extra_index_url: str | None = None
    apt: tuple[str, ...] = ()
    local: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Names the environment: 12 hex digits of what it is made of."""
        requirements, constraints = sorted(self.requirements), sorted(self.constraints)
        parts = (self.python, self.extra_index_url or "", *requirements, "-c", *constraints, *sorted(self.local))
        return digest(*parts)

    @property
    def interpreter(self) -> str:
        """The environment's Python, as a shell on the machine sees it."""
        return f'"{HOME}/envs/{self.key}/bin/python"'

    @property
    def import_path(self) -> str:
        """Where skyward itself lies, as a shell on the machine sees it."""
        return f'"{HOME}/skyward/{self.wheel}"'


def image_recipe(image: Image, python: str) -> Recipe:
    """Return the recipe of an image as it is, nothing pinned to what is installed here."""
    return Recipe(
        python=image.python or python,
        requirements=tuple(dict.fromkeys(image.pip)),
        constraints=tuple(dict.fromkeys(image.constraints)),
        extra_index_url=" ".join(image.indexes) or None,
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
        steps.append(timer_once(ttl_s))  # first: from here on the machine ends even if the caller is gone
    if not outlives_pool:
        steps.append(_NO_UPGRADES)
    if recipe.apt:
        steps.append(debian_packages(recipe.apt, asked_by="Image.apt"))
    steps.append(_environment(recipe))
    if recipe.wheel:
        steps.append(_skyward(recipe.wheel))
    steps += [f"say step done\nprintf '%s\\n' {recipe.interpreter}\n"]
    return "\n".join(steps)


_NO_UPGRADES = """
# Upgrades would hold apt's locks, take processors from the work and restart services.
if command -v systemctl > /dev/null; then
    as_root systemctl --no-block stop apt-daily.timer apt-daily-upgrade.timer > /dev/null 2>&1 < /dev/null
fi
"""


def _environment(recipe: Recipe) -> str:
    names = " ".join(dict.fromkeys([f"python{recipe.python}", f"python{_minor(recipe.python)}", "python3"]))
    local = "".join(f' "$home/wheels/{path}"' for path in recipe.local)
    overrides = ' --override "$environment/overrides.txt"' if recipe.wheel or recipe.local else ""
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
    {_overrides(recipe)} &&
    "$uv" pip install --python "$environment/bin/python" --requirement "$environment/requirements.txt" \\
        --constraint "$environment/constraints.txt"{overrides}{local} &&
    touch "$environment/complete"
}}

# An incomplete environment is made again from nothing: it can't be told which of its packages are whole.
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


def _overrides(recipe: Recipe) -> str:
    """Return the command that writes what holds whatever packages ask for.

    skyward is not installed a second time where a package needs it, and a local package is not fetched from the address
    that another one names.
    """
    skyward = ["\"skyward ; sys_platform == 'never'\""] if recipe.wheel else []
    files = [(path.rpartition("/")[2].partition("-")[0], path) for path in recipe.local]
    words = " ".join([*skyward, *(f'"{name} @ file://$folder/{path}"' for name, path in files)])
    if not words:
        return ":"
    quoted = "sed 's/%/%25/g; s/ /%20/g; s/#/%23/g; s/?/%3F/g'"
    folder = f'folder=$(cd "$home" && pwd | {quoted})/wheels'
    return f"{folder} && printf '%s\\n' {words} > \"$environment/overrides.txt\""


def _skyward(wheel: str) -> str:
    return f"""
unpack_skyward() {{
    rm -rf "$home/skyward/{wheel}.part"
    "$environment/bin/python" -m zipfile -e "$home/wheels/{wheel}" "$home/skyward/{wheel}.part" &&
    mv "$home/skyward/{wheel}.part" "$home/skyward/{wheel}"
}}
[ -e "$home/skyward/{wheel}" ] || step skyward unpack_skyward
"""
