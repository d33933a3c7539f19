"""What `Image.from_here` finds: requirements, constraints, indexes, wheels, and what machines don't get and why."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename

from skyward.environment.wheels import Wheel, WheelError, build, check_platform, read, repack

INSTALLERS = frozenset({"pip", "uv", "wheel", "distribute"})
_INSTALLER = "an installer; machines have their own"
_ELSEWHERE = {
    **dict.fromkeys(("appnope", "py2app", "rumps"), "macOS"),
    **dict.fromkeys(
        ("comtypes", "pypiwin32", "pyreadline", "pyreadline3", "pywin32", "pywin32-ctypes", "pywinpty",
         "windows-curses", "winkerberos", "wmi"),
        "Windows",
    ),
}  # fmt: skip
"""Packages that only work on another system than the machines', by name."""
DEFAULT_INDEX = "https://pypi.org/simple"


def linux(machine: str) -> dict[str, str]:
    """Return the environment for markers on a Linux machine with this processor and the Python that runs here."""
    here = {name: str(value) for name, value in default_environment().items()}
    return here | {
        "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": machine,
        "platform_release": "", "platform_version": "",
    }  # fmt: skip


def applies(marker: Marker | str | None, environment: Mapping[str, str], extra: str = "") -> bool:
    marker = Marker(marker) if isinstance(marker, str) else marker
    return marker is None or marker.evaluate({**environment, "extra": extra})


def requirements_of(
    requirements: Iterable[str], extra: str, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield what an extra of a package adds to what the package needs, without markers.

    Markers count in `environment`; None: here.
    """
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is not None and applies(marker, environment or {}, extra) and not applies(marker, environment or {}):
            requirement.marker = None
            yield str(requirement)


def distribution(name: str) -> importlib.metadata.Distribution | None:
    """Return the installed package; None: there is none."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass
class Found:
    """Collects an environment. Packages in `exclude` and `replaced` are left out, the latter without a word.

    Attributes
    ----------
    not_reproduced
        What machines don't get as it is here, each with the reason.
    """

    exclude: Collection[str] = ()
    replaced: Collection[str] = ()
    pip: list[str] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    indexes: list[str] = field(default_factory=list)
    wheels: dict[str, Wheel] = field(default_factory=dict)
    not_reproduced: dict[str, str] = field(default_factory=dict)

    def takes(self, name: str) -> bool:
        """Tell whether machines get this package; note the reason if not."""
        key = canonicalize_name(name)
        if key == "skyward" or key in self.replaced:
            return False
        system = "macOS" if key.startswith("pyobjc") else _ELSEWHERE.get(key)
        if key in self.exclude:
            self.not_reproduced[key] = "excluded"
        elif key in INSTALLERS:
            self.not_reproduced[key] = _INSTALLER
        elif system:
            self.not_reproduced[key] = f"it works on {system} alone; machines run Linux"
        else:
            return True
        return False

    @property
    def is_surprising(self) -> bool:
        """Whether something is not reproduced that calls may need."""
        return any(why not in (_INSTALLER, "excluded") for why in self.not_reproduced.values())

    def add(self, requirement: str) -> None:
        if requirement not in self.pip:
            self.pip.append(requirement)

    def add_index(self, url: str) -> None:
        """Add a package index, unless it is the default one or a folder here."""
        url = url.rstrip("/")
        if "://" not in url or url.startswith("file:"):
            self.not_reproduced[f"index {url}"] = "a folder of this computer; machines use their own index instead"
        elif url != DEFAULT_INDEX and url not in self.indexes:
            self.indexes.append(url)

    def add_url(self, name: str, url: str, *, extras: Sequence[str] = (), marker: str = "", suffix: str = "") -> None:
        """Add a package by its address, or as it is installed here where machines can't use the address."""
        if _is_reachable(url):
            if url.partition("#")[0].endswith(".whl"):
                try:
                    check_platform(url.partition("#")[0].rpartition("/")[2].replace("%2B", "+"))
                except WheelError as exc:
                    self.not_reproduced[name] = str(exc)
                    return
            bracket = f"[{','.join(sorted(extras))}]" if extras else ""
            self.add(f"{name}{bracket} @ {url}{f' ; {marker}' if marker else ''}{suffix}")
        elif (found := distribution(name)) is not None:
            self.add_installed(found, extras)
        else:
            self.not_reproduced[name] = f"machines can't use its address {hidden(url)}, and it is not installed here"

    def add_installed(self, found: importlib.metadata.Distribution, extras: Sequence[str] = ()) -> None:
        """Add a package as a wheel of what is installed here; of an editable one, build its project."""
        name = canonicalize_name(found.metadata["Name"])
        direct = direct_url(found)
        if direct is not None and (direct.get("dir_info") or {}).get("editable"):
            self.add_local(name, Path(unquote(urlsplit(str(direct["url"])).path)), extras)
            return
        try:
            self._add_wheel(repack(found), extras)
        except WheelError as exc:
            self.not_reproduced[name] = f"it can't be packed: {exc}"

    def add_local(self, name: str, path: Path, extras: Sequence[str] = ()) -> None:
        """Add the package of a folder, a wheel or a source archive here."""
        if not path.exists():
            self.not_reproduced[name or path.name] = f"{path} does not exist"
            return
        try:
            wheel = read(path) if path.suffix == ".whl" else build(path)
        except WheelError as exc:
            source = "; your own modules in it still travel as source" if path.is_dir() else ""
            self.not_reproduced[name or path.name] = f"no wheel of {path}: {exc}{source}"
            return
        if self.takes(wheel.project):
            self._add_wheel(wheel, extras)

    def _add_wheel(self, wheel: Wheel, extras: Sequence[str]) -> None:
        self.wheels[wheel.project] = wheel
        for extra in extras:
            for requirement in requirements_of(wheel.requirements, extra, linux("x86_64")):
                self.add(requirement)


def _is_reachable(url: str) -> bool:
    """Tell whether machines can fetch from an address: pip writes ``****`` or ``${NAME}`` in the place of passwords."""
    return url.startswith(("https://", "http://", "git+https://", "git+http://")) and not re.search(r"\*\*\*|\$\{", url)


def hidden(text: str) -> str:
    """Return a text without the credentials of addresses in it, and without hashes."""
    return re.sub(r" --hash=\S+", "", re.sub(r"(?<=//)[^/@\s]+@", "...@", text))


def by_reason(not_reproduced: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names for each reason why something is not reproduced."""
    reasons: dict[str, list[str]] = {}
    for name, why in not_reproduced.items():
        reasons.setdefault(why, []).append(name)
    return reasons


def direct_url(found: importlib.metadata.Distribution) -> dict[str, Any] | None:
    """Return where a package was installed from; None: from an index."""
    text = found.read_text("direct_url.json")
    return json.loads(text) if text else None


def url_of(direct: Mapping[str, Any]) -> str:
    """Return the address that a ``direct_url.json`` describes, as pip takes it (PEP 610)."""
    url, fragments = str(direct["url"]), []
    if vcs := direct.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    if hashes := (direct.get("archive_info") or {}).get("hashes"):
        fragments = [f"{name}={value}" for name, value in hashes.items() if name == "sha256"]
    if subdirectory := direct.get("subdirectory"):
        fragments.append(f"subdirectory={subdirectory}")
    return f"{url}#{'&'.join(fragments)}" if fragments else url


def name_in(url: str) -> str:
    """Return the package's name that an address has in it; empty if it has none."""
    if match := re.search(r"[#&]egg=([A-Za-z0-9._-]+)", url):
        return match[1]
    file = url.partition("#")[0].partition("?")[0].rpartition("/")[2]
    if file.endswith(".whl"):
        return file.partition("-")[0]
    try:
        return parse_sdist_filename(file)[0]
    except ValueError:
        return ""


def is_linux_here() -> bool:
    return sys.platform == "linux"
