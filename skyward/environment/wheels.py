"""Wheels in memory: of files, of a package that is installed here, or of a project's folder."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import site
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path

from packaging.tags import parse_tag
from packaging.utils import canonicalize_name, parse_wheel_filename

_TIME = (2020, 1, 1, 0, 0, 0)  # any fixed one: the same content makes the same wheel
_OF_INSTALL = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json", "uv_build.json"}
"""Files that an installer adds to a package's metadata."""


class WheelError(Exception):
    """A wheel can't be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel in memory. `requirements` are what it needs, as its metadata has them."""

    name: str
    data: bytes = field(repr=False)
    requirements: tuple[str, ...] = ()

    @property
    def project(self) -> str:
        """The package's name, as package indexes compare names."""
        return canonicalize_name(self.name.partition("-")[0])

    @property
    def version(self) -> str:
        return self.name.split("-")[1]

    @property
    def digest(self) -> str:
        """16 hex digits of the content."""
        return hashlib.sha256(self.data).hexdigest()[:16]


def pack(name: str, files: Mapping[str, bytes], requirements: tuple[str, ...] = ()) -> Wheel:
    """Return the wheel that holds `files` and the record of them."""
    info = f"{'-'.join(name.split('-')[:2])}.dist-info"
    record = [f"{path},sha256={_hash(data)},{len(data)}" for path, data in files.items()]
    whole = {**files, f"{info}/RECORD": "\n".join([*record, f"{info}/RECORD,,", ""]).encode()}
    return Wheel(name, _zip(whole), requirements)


def read(path: Path) -> Wheel:
    """Return a wheel file, with its members as of one fixed time.

    Raises
    ------
    WheelError
        It isn't a wheel, or machines can't use it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(m.filename for m in archive.infolist() if not m.is_dir())
            files = {name: archive.read(name) for name in members}
            modes = {m.filename: m.external_attr for m in archive.infolist()}
        metadata = next(data for name, data in files.items() if name.endswith(".dist-info/METADATA"))
    except (OSError, zipfile.BadZipFile, StopIteration) as exc:
        raise WheelError(f"{path} is not a wheel that can be read: {exc or 'it has no metadata'}") from exc
    check_platform(path.name)
    headers = HeaderParser().parsestr(metadata.decode(errors="replace"))
    return Wheel(path.name, _zip(files, modes), tuple(headers.get_all("Requires-Dist") or ()))


def repack(found: importlib.metadata.Distribution) -> Wheel:
    """Return an installed package as a wheel, as its own record lists it.

    Raises
    ------
    WheelError
        It has no record, a file of it is gone, or machines can't use it.
    """
    described = HeaderParser().parsestr(found.read_text("WHEEL") or "")
    tags = [tag for text in described.get_all("Tag") or () for tag in parse_tag(text)]
    if not tags or not found.files:
        raise WheelError("its metadata doesn't list its files")
    parts = [sorted({getattr(t, part) for t in tags}) for part in ("interpreter", "abi", "platform")]
    project = f"{canonicalize_name(found.metadata['Name']).replace('-', '_')}-{found.version}"
    name = "-".join([project, *map(".".join, parts)]) + ".whl"
    check_platform(name)
    try:
        return pack(name, dict(sorted(_files(found, project))), tuple(found.requires or ()))
    except OSError as exc:
        raise WheelError(f"a file of it can't be read: {exc}") from exc


def _files(found: importlib.metadata.Distribution, project: str) -> Iterator[tuple[str, bytes]]:
    made = {point.name for point in found.entry_points if point.group in ("console_scripts", "gui_scripts")}
    prefixes = [Path(sys.prefix), Path(site.getuserbase())]
    for entry in found.files or ():
        # Not resolved: installers may have linked each file to a cache.
        path = Path(os.path.normpath(str(found.locate_file(entry))))
        if "__pycache__" in path.parts or (entry.parent.name.endswith(".dist-info") and entry.name in _OF_INSTALL):
            continue
        if ".." not in entry.parts:
            first, _, rest = entry.as_posix().partition("/")
            first = f"{project}.dist-info" if first.endswith(".dist-info") else first
            yield f"{first}/{rest}" if rest else first, path.read_bytes()
        elif path.parent.name == "bin":
            if path.name not in made:  # installers make those of entry points
                yield f"{project}.data/scripts/{path.name}", _portable(path.read_bytes())
        elif inside := next((p for p in prefixes if path.is_relative_to(p)), None):
            yield f"{project}.data/data/{path.relative_to(inside).as_posix()}", path.read_bytes()


def _portable(script: bytes) -> bytes:
    """Return a script without the path of the Python here: installers put theirs in place of ``#!python``."""
    first, newline, rest = script.partition(b"\n")
    return b"#!python" + newline + rest if first.startswith(b"#!") and b"python" in first else script


def build(project: Path) -> Wheel:
    """Return the wheel that uv or pip builds of a folder, or of a source archive.

    Raises
    ------
    WheelError
        There is neither uv nor pip, the build failed, or machines can't use the wheel.
    """
    with tempfile.TemporaryDirectory() as target:
        if uv := shutil.which("uv"):
            command = [uv, "build", "--quiet", "--wheel", "--python", sys.executable, "--out-dir", target]
        elif importlib.util.find_spec("pip") is not None:
            command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--wheel-dir", target]
        else:
            raise WheelError("neither uv nor pip is installed here to build it")
        done = subprocess.run([*command, str(project)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        built = sorted(Path(target).glob("*.whl"))
        if done.returncode or not built:
            lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise WheelError(f"`{' '.join([*command[:4], '...'])}` failed: {' | '.join(lines[-3:])}")
        return read(built[0])


def check_platform(name: str) -> None:
    """Raise `WheelError` when the wheel of this file name can't be installed on Linux."""
    try:
        platforms = {tag.platform for tag in parse_wheel_filename(name)[3]}
    except ValueError as exc:  # InvalidWheelFilename, InvalidVersion
        raise WheelError(str(exc)) from exc
    if not any(p == "any" or "linux" in p for p in platforms):
        raise WheelError(f"it is built for {', '.join(sorted(platforms))}; machines run Linux")


def _zip(files: Mapping[str, bytes], modes: Mapping[str, int] | None = None) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            member = zipfile.ZipInfo(name, _TIME)
            member.external_attr = (modes or {}).get(name, 0)
            archive.writestr(member, data, zipfile.ZIP_DEFLATED)
    return whole.getvalue()


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
