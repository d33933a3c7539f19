"""uv's lock file, read without uv, as requirements and wheels for machines.

The file's format: https://docs.astral.sh/uv/concepts/projects/layout/#the-lockfile, and files that uv 0.4 to 0.9 wrote,
2026-11-29. Extras and dependency groups count as far as what they need is installed here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from packaging.markers import default_environment
from packaging.utils import canonicalize_name

from skyward.environment.found import DEFAULT_INDEX, Found, applies, distribution, is_linux_here, linux
from skyward.errors import SpecError

_MACHINES = ("x86_64", "aarch64")
_LOCAL = ("editable", "directory", "virtual", "path")
_CONFLICT = re.compile(r"extra (==|!=) '((?:extra|group|project)-[^']*)'")
"""How uv writes that an extra or a group that excludes another one is chosen."""


def read_uv_lock(found: Found, path: Path, start: Path) -> None:
    """Add what uv has locked for the project, of a workspace's the one that `start` is in.

    Raises
    ------
    SpecError
        The file can't be read, or is of another version.
    """
    try:
        lock = tomllib.loads(path.read_text(encoding="utf-8"))
        known = lock.get("version") == 1 and all("name" in p for p in lock.get("package", ()))
    except (OSError, ValueError) as exc:
        raise SpecError(f"Image.from_here() can't read {path}: {exc}", option="from_here", value=str(path)) from exc
    if not known:
        raise SpecError(
            f"{path} has the format {lock.get('version')!r}: expected a lock file of uv with version = 1",
            option="from_here", value=str(path),
        )  # fmt: skip
    _Lock(lock, path.parent).add_to(found, start)


class _Lock:
    def __init__(self, lock: Mapping[str, Any], folder: Path) -> None:
        self._folder = folder
        self._packages: list[dict[str, Any]] = list(lock.get("package", ()))
        self._groups: dict[str, Any] = lock.get("manifest", {}).get("dependency-groups", {})
        self._chosen: set[str] = set()  # conflict markers of the extras and groups that count

    def add_to(self, found: Found, start: Path) -> None:
        roots = self._roots(start)
        # In each environment the positions of the packages that it needs.
        here = {name: str(value) for name, value in default_environment().items()}
        first = [dep for root in roots for dep in self._first(root)]
        first += [dep for group in self._groups.values() if self._is_installed(group, here) for dep in group]
        needs = [self._reach(roots, first, linux(machine)) for machine in _MACHINES]
        here_needs = needs[0] if is_linux_here() else self._reach(roots, first, here)
        for position, package in enumerate(self._packages):
            on = [position in need for need in needs]
            name = canonicalize_name(package["name"])
            if not any(on):
                if position in here_needs and not any(name == self._packages[p]["name"] for n in needs for p in n):
                    found.not_reproduced[name] = "uv.lock needs it on this system and not on Linux"
                continue
            parts = [] if position in here_needs or is_linux_here() else ["sys_platform == 'linux'"]
            if not all(on):
                parts.append(f"platform_machine == '{_MACHINES[on.index(True)]}'")
            self._add(found, name, package, " and ".join(parts))

    def _roots(self, start: Path) -> list[dict[str, Any]]:
        """Return the project that `start` is in; if it is in none, all members of the workspace."""
        sources = [package.get("source", {}) for package in self._packages]
        places = [source.get("editable", source.get("virtual")) for source in sources]
        pairs = zip(places, self._packages, strict=True)
        members = [(self._folder / place, package) for place, package in pairs if place is not None]
        around = [m for m in members if start.resolve().is_relative_to(m[0].resolve())]
        if around:
            return [max(around, key=lambda m: len(m[0].resolve().parts))[1]]
        return [package for _, package in members]

    def _first(self, root: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what a project needs, with its extras and groups that are installed here."""
        here = {name: str(value) for name, value in default_environment().items()}
        needed = list(root.get("dependencies", ()))
        project = canonicalize_name(root["name"])
        for kind, field in (("extra", "optional-dependencies"), ("group", "dev-dependencies")):
            for name, dependencies in root.get(field, {}).items():
                if self._is_installed(dependencies, here):
                    self._chosen.add(f"{kind}-{len(project)}-{project}-{name}")
                    needed += dependencies
        self._chosen.add(f"project-{len(project)}-{project}")
        return needed

    def _is_installed(self, dependencies: Sequence[Mapping[str, Any]], here: Mapping[str, str]) -> bool:
        """Tell whether all that an extra or a group needs here is installed here."""
        targets = [t for d in dependencies if self._applies(_unconditional(d), here) for t in self._targets(d)]
        return bool(targets) and all(map(self._is_here, targets))

    def _is_here(self, package: Mapping[str, Any]) -> bool:
        if "virtual" in package.get("source", {}):
            return True
        one = distribution(package["name"])
        # Extras that exclude each other may need the same package in different versions.
        versions = {p.get("version") for p in self._packages if p["name"] == package["name"]}
        return one is not None and (len(versions) == 1 or one.version == package.get("version"))

    def _applies(self, dependency: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
        marker = dependency.get("marker")
        if marker is None:
            return True
        # Several of them may hold at once, which a marker's one `extra` can't: what always or never holds is put in.
        return applies(_CONFLICT.sub(self._always_or_never, marker), environment)

    def _always_or_never(self, match: re.Match[str]) -> str:
        holds = (match[2] in self._chosen) == (match[1] == "==")
        return "os_name != ''" if holds else "os_name == ''"

    def _targets(self, dependency: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the packages that a dependency may mean: one, but where it leaves a fork open."""
        return [
            p
            for p in self._packages
            if p["name"] == dependency["name"]
            and dependency.get("version", p.get("version")) == p.get("version")
            and dependency.get("source", p.get("source")) == p.get("source")
        ]

    def _reach(
        self, roots: Iterable[dict[str, Any]], first: Iterable[Mapping[str, Any]], environment: Mapping[str, str]
    ) -> set[int]:
        positions = {id(package): position for position, package in enumerate(self._packages)}
        reached = {positions[id(root)] for root in roots}
        seen: set[tuple[int, str]] = set()
        todo = list(first)
        while todo:
            dependency = todo.pop()
            if not self._applies(dependency, environment):
                continue
            for target in self._targets(dependency):
                marks = target.get("resolution-markers")
                if marks and not any(self._applies({"marker": m}, environment) for m in marks):
                    continue
                position = positions[id(target)]
                reached.add(position)
                for extra in ("", *dependency.get("extra", ())):
                    if (position, extra) not in seen:
                        seen.add((position, extra))
                        extras = {"": target.get("dependencies", ()), **target.get("optional-dependencies", {})}
                        todo += extras.get(extra, ())
        return reached

    def _add(self, found: Found, name: str, package: Mapping[str, Any], marker: str) -> None:
        source: Mapping[str, Any] = package.get("source", {})
        if "virtual" in source or not found.takes(name):  # the first is not installed: its modules travel as source
            return
        after = f" ; {marker}" if marker else ""
        if place := next((source[kind] for kind in _LOCAL if kind in source), None):
            found.add_local(name, self._folder / place)
        elif "git" in source:
            parts = urlsplit(str(source["git"]))
            folder = parse_qs(parts.query).get("subdirectory")
            url = f"git+{parts._replace(query='', fragment='').geturl()}@{parts.fragment}"
            found.add_url(name, f"{url}#subdirectory={folder[0]}" if folder else url, marker=marker)
        elif "url" in source:
            found.add_url(name, str(source["url"]), marker=marker, suffix=_hashes(package))
        else:
            found.add_index(str(source.get("registry", DEFAULT_INDEX)))
            found.add(f"{name}=={package['version']}{after}{_hashes(package)}")
            one = distribution(name)
            if one is not None and one.version != package["version"]:
                found.not_reproduced[name] = (
                    f"machines get {package['version']} of uv.lock, and {one.version} is installed here: run `uv sync`"
                )


def _unconditional(dependency: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dependency without what it says about the extras that are chosen."""
    marker = dependency.get("marker")
    return {**dependency, "marker": _CONFLICT.sub("os_name != ''", marker) if marker else None}


def _hashes(package: Mapping[str, Any]) -> str:
    """Return the hashes of a package's files, of those that are for Linux, as pip's options."""
    wheels = package.get("wheels", ())
    files = [f for f in wheels if re.search(r"linux|-any\.whl", str(f.get("url") or f.get("filename")))]
    files += [package["sdist"]] if "sdist" in package else []
    hashes = [str(file.get("hash") or "") for file in files]
    return "".join(f" --hash={h}" for h in sorted(set(hashes))) if all(h.startswith("sha") for h in hashes) else ""
