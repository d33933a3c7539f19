"""Requirements files as pip reads them, as requirements and wheels for machines.

Source of the format: https://pip.pypa.io/en/stable/reference/requirements-file-format/, 2026-11-29.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from skyward.environment.found import Found, applies, hidden, linux, name_in
from skyward.errors import SpecError

_OPTION = re.compile(r"(-[rcefi]|--[a-z-]+)[ =]*(.*)")
_LONG = {"-r": "--requirement", "-c": "--constraint", "-e": "--editable", "-i": "--index-url", "-f": "--find-links"}
_NEEDLESS = ("--require-hashes", "--prefer-binary")
"""Options that change nothing: hashes are checked where they are given, and versions are fixed."""
_ARCHIVES = (".whl", ".tar.gz", ".zip", ".tar.bz2", ".tar.xz")
_PATH = re.compile(r"(?P<path>[^\[;]+)(\[(?P<extras>[^\]]*)\])? *(;(?P<marker>.*))?")


def read_requirements(found: Found, path: Path) -> None:
    """Add what a requirements file asks for.

    Raises
    ------
    SpecError
        The file, or one that it names, can't be read, or has a line that is no requirement.
    """
    _read(found, path, set(), is_constraint=False)


def _read(found: Found, path: Path, seen: set[tuple[Path, bool]], *, is_constraint: bool) -> None:
    path = Path(os.path.normpath(path))
    if (path, is_constraint) in seen:
        return
    seen.add((path, is_constraint))
    for number, line in _lines(path):
        if not (option := _OPTION.fullmatch(line)):
            _add(found, path, number, line, is_constraint=is_constraint)
            continue
        name, value = _LONG.get(option[1], option[1]), option[2].strip().strip("\"'")
        match name:
            case "--requirement" | "--constraint":
                if "://" in value:
                    raise _invalid(path, number, line, "the path of a file: download it")
                _read(found, path.parent / value, seen, is_constraint=is_constraint or name == "--constraint")
            case "--editable":
                _add(found, path, number, value, is_constraint=is_constraint)
            case "--index-url" | "--extra-index-url":
                found.add_index(value)
            case _ if name not in _NEEDLESS:
                found.not_reproduced[hidden(f"{name} {value}".strip())] = "an option of pip that machines don't get"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line without comments, with its number; what a backslash continues is one line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise SpecError(f"Image.from_here() can't read {path}: {exc}", option="from_here", value=str(path)) from exc
    joined, begun = "", 0
    for number, line in enumerate([*text.splitlines(), ""], 1):
        begun = begun or number
        if line.endswith("\\") and not line.lstrip().startswith("#"):
            joined += line[:-1] + " "
            continue
        whole = re.sub(r"(^|\s)#.*$", "", joined + line).strip()
        if whole:
            yield begun, re.sub(r"\$\{([A-Z0-9_]+)\}", lambda m: os.environ.get(m[1], m[0]), whole)
        joined, begun = "", 0


def _add(found: Found, path: Path, number: int, line: str, *, is_constraint: bool) -> None:
    text, *options = re.split(r"\s+(?=--[a-z])", line)
    hashes = "".join(f" {option}" for option in options if option.startswith("--hash=sha"))
    for option in options:
        if not option.startswith("--hash=sha"):
            found.not_reproduced[option] = "an option of pip that machines don't get"
    try:
        is_file = text.partition(";")[0].strip().endswith(_ARCHIVES) and "@" not in text  # would be a name, too
        requirement = None if is_file else Requirement(text)
    except InvalidRequirement:
        requirement = None
    if requirement is None:
        if not is_constraint:
            _add_unnamed(found, path, number, text)
        return
    name = canonicalize_name(requirement.name)
    if is_constraint:
        if requirement.url is None and requirement.specifier:
            requirement.extras.clear()  # which uv refuses in constraints
            found.constraints.append(str(requirement))
    elif name == "skyward" and requirement.extras and name not in found.replaced:
        found.add(str(requirement))  # its extras: skyward itself is on the machines
    elif not found.takes(name):
        return
    elif requirement.url is None:
        found.add(f"{requirement}{hashes}")
    elif requirement.url.startswith("file:") or "://" not in requirement.url:
        if _wanted(str(requirement.marker or "")):
            found.add_local(name, _folder(path, requirement.url), sorted(requirement.extras))
    else:
        marker = str(requirement.marker or "")
        found.add_url(name, requirement.url, extras=sorted(requirement.extras), marker=marker, suffix=hashes)


def _add_unnamed(found: Found, path: Path, number: int, text: str) -> None:
    """Add an address or a path that stands without the package's name."""
    if re.match(r"[a-z+]+://", text) and not text.startswith("file:"):
        url, _, marker = text.partition(" ;")
        name = name_in(url)
        if not name:
            raise _invalid(path, number, text, "name @ address")
        url = re.sub(r"#egg=[^&]*&", "#", re.sub(r"[#&]egg=[^&]*$", "", url))
        if found.takes(name):
            found.add_url(canonicalize_name(name), url, marker=marker.strip())
        return
    match = _PATH.fullmatch(text)
    if match is None:
        raise _invalid(path, number, text, "a requirement in pip's format")
    target = _folder(path, match["path"].strip())
    if not (target.is_dir() or target.name.endswith(_ARCHIVES)):
        raise _invalid(path, number, text, "a requirement in pip's format, or the path of a project or an archive")
    if _wanted(match["marker"] or ""):
        found.add_local("", target, [e.strip() for e in (match["extras"] or "").split(",") if e.strip()])


def _wanted(marker: str) -> bool:
    return applies(marker.strip() or None, linux("x86_64"))


def _folder(path: Path, text: str) -> Path:
    """Return the path that a line names: beside its file, or, as pip has it, from the working directory."""
    if text.startswith("file:"):
        text = unquote(urlsplit(text).path)
    beside = path.parent / Path(text).expanduser()
    return beside if beside.exists() else Path.cwd() / Path(text).expanduser()


def _invalid(path: Path, number: int, line: str, expected: str) -> SpecError:
    return SpecError(
        f"line {number} of {path}, {line!r}, is invalid: expected {expected}",
        option="from_here", value=line, accepted=expected,
    )  # fmt: skip
