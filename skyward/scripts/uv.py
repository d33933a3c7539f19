"""Which uv machines get, and the shell text that fetches it from their package index, for the script of `bootstrap`.

The version and the SHA-256 of each wheel are fixed here, so that neither an index nor a proxy can put another program
in its place. Source: the index's own pages (PEP 691) of https://pypi.org/simple/uv/, 2026-11-28.
"""

from __future__ import annotations

import shlex

VERSION = "0.13.9"
WHEELS = {
    "x86_64 glibc": (
        "manylinux_2_17_x86_64.manylinux2014_x86_64",
        "d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19",
    ),
    "x86_64 musl": (
        "musllinux_1_1_x86_64",
        "2c45530751517d6c3bbc69a19473f6effe47cce047bede01ffd8af7ea7b36b25",
    ),
    "aarch64": (
        "manylinux_2_17_aarch64.manylinux2014_aarch64.musllinux_1_1_aarch64",
        "5435c5ce14a56431208ca0996416d310f1598e8c2c8ba707688985a16bb82dbe",
    ),
}
"""Platform and SHA-256 of the wheels, by processor and, where it matters, C library."""

_PIP_SETTINGS = """
import configparser, os
home, xdg = os.path.expanduser("~"), os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
own = os.environ.get("PIP_CONFIG_FILE", "")
files = ["/etc/xdg/pip/pip.conf", "/etc/pip.conf", home + "/.pip/pip.conf", xdg + "/pip/pip.conf", own]
for section in "global", "install":
    for name in [] if own == os.devnull else files:
        config = configparser.RawConfigParser()
        config.read(name)
        for key, value in config.items(section) if config.has_section(section) else []:
            print("%s.%s=%r" % (section, key, value))
for key, value in os.environ.items():
    if key.startswith("PIP_"):
        print(":env:.%s=%r" % (key[4:].lower().replace("_", "-"), value))
"""
"""Program that prints what `pip config list` prints, where there is no pip. For Python 3.6 and newer, as the next."""

_FETCH = """
import base64, hashlib, html, io, os, re, sys, zipfile
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import Request, urlopen

wheel, sha256, target = sys.argv[1:]

def get(url):
    parts = urlsplit(url)
    request = Request(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl())
    if parts.username:
        login = "%s:%s" % (unquote(parts.username), unquote(parts.password or ""))
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    return urlopen(request, timeout=60)

def find(index):
    with get(index) as answer:
        page = answer.read().decode()
    for link in re.findall(r"href *= *[\\"'](.*?)[\\"']", page):
        url = urljoin(index, html.unescape(link))
        if unquote(urlsplit(url).path).endswith("/" + wheel):
            return url
    raise OSError("it does not have " + wheel)

indexes = [re.sub(r"^[\\w-]+=", "", url) for url in os.environ.get("UV_INDEX", "").split()]
indexes.append(os.environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple")
places = [(folder, lambda f=folder: "file://" + os.path.abspath(f) + "/" + wheel)
          for folder in os.environ.get("UV_FIND_LINKS", "").split() if "://" not in folder]
places += [(index, lambda i=index: find(i.rstrip("/") + "/uv/")) for index in indexes]
for place, locate in places:
    name = re.sub("//.*@", "//", place)
    try:
        with get(locate()) as answer:
            data = answer.read()
    except (OSError, ValueError) as exc:
        print("%s: %s" % (name, exc))
        continue
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        print("%s: %s has the SHA-256 %s instead of %s" % (name, wheel, found, sha256))
        continue
    archive = zipfile.ZipFile(io.BytesIO(data))
    member = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, "wb") as file:
        file.write(archive.read(member))
    os.chmod(target, 0o755)
    sys.exit(0)
sys.exit(1)
"""
"""Program that fetches a wheel of uv from the indexes that uv would use, checks it and unpacks its program."""

_HASHES = " ".join(f"--hash=sha256:{sha256}" for _, sha256 in WHEELS.values())


def _wheel(key: str) -> str:
    platform, sha256 = WHEELS[key]
    return f"uv-{VERSION}-py3-none-{platform}.whl {sha256}"


SHELL = f"""
# uv does not read pip's settings: the machine's own package index and certificates are handed on.
read_pip_settings() {{
    python3 -m pip config list > "$home/logs/pip" 2> /dev/null ||
        python3 -IS -c {shlex.quote(_PIP_SETTINGS)} > "$home/logs/pip" 2> /dev/null
}}
# Variables win over files, and are listed first.
setting() {{
    {{ grep -v '^:env:' "$home/logs/pip"; grep '^:env:' "$home/logs/pip"; }} |
        sed -n "s/^[^=]*[.]$1='\\(.*\\)'\\$/\\1/p" | tail -n 1 | sed 's/\\\\n/ /g'
}}

find_uv() {{
    for uv in "$(command -v uv)" "$home/uv/bin/uv"; do
        [ -n "$uv" ] && "$uv" --version > /dev/null 2>&1 && return 0
    done
    return 1
}}

name_wheel() {{
    case $(uname -m) in
        x86_64) case $(ldd --version 2>&1) in
            *musl*) echo {_wheel("x86_64 musl")};;
            *) echo {_wheel("x86_64 glibc")};;
        esac;;
        aarch64|arm64) echo {_wheel("aarch64")};;
    esac
}}

# pip, where it is, knows more ways into an index than the program does. Both refuse what has another hash.
get_uv() {{
    rm -rf "$home/uv"
    if python3 -m pip --version > /dev/null 2>&1; then
        export PIP_ROOT_USER_ACTION=ignore PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0  # it goes into a folder of ours
        echo 'uv=={VERSION} {_HASHES}' | python3 -m pip install -q --disable-pip-version-check --no-deps \\
            --only-binary :all: --require-hashes --target "$home/uv" --requirement /dev/stdin
        find_uv && return 0
    fi
    wheel=$(name_wheel)
    [ -z "$wheel" ] || python3 -IS -c {shlex.quote(_FETCH)} $wheel "$home/uv/bin/uv"
    find_uv || {{
        echo "uv {VERSION} could not be fetched, which takes Python 3 and a package index that has it:" \\
            "install it on this machine"
        return 79
    }}
}}
"""
"""Shell functions: `read_pip_settings`, `setting`, `find_uv`, which sets `uv`, and `get_uv`."""
