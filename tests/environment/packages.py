"""Metadata of installed packages, as installers leave it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skyward.environment.wheels import Wheel, pack


def install(
    site: Path,
    name: str,
    version: str = "1.0",
    *,
    installer: str = "pip",
    direct_url: dict[str, Any] | None = None,
    requires: Sequence[str] = (),
    tag: str = "py3-none-any",
    files: dict[str, str] | None = None,
) -> Path:
    """Write the metadata of a package, and `files` of it, into `site`; return the metadata's folder."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*metadata, *(f"Requires-Dist: {r}" for r in requires), ""]))
    (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
    (info / "INSTALLER").write_text(f"{installer}\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(json.dumps(direct_url))
    listed = [f"{info.name}/{part}" for part in ("METADATA", "WHEEL", "INSTALLER", "RECORD")]
    for path, text in (files or {}).items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        listed.append(path)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in listed))
    return info


BACKEND = '''
import os, zipfile

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    files = {
        "NAME.py": open("NAME.py").read(),
        "NAME-VERSION.dist-info/METADATA": "Metadata-Version: 2.1\\nName: NAME\\nVersion: VERSION\\nNEEDS",
        "NAME-VERSION.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    record = "NAME-VERSION.dist-info/RECORD"
    files[record] = "".join(f"{name},,\\n" for name in [*files, record])
    with zipfile.ZipFile(os.path.join(wheel_directory, "NAME-VERSION-py3-none-any.whl"), "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)  # with the time of day
    return "NAME-VERSION-py3-none-any.whl"
'''


def build_quickly(folder: Path) -> Wheel:
    """Return the wheel of a folder without its build, which takes pip seconds."""
    name = f"{folder.resolve().name.replace('-', '_')}-1.0-py3-none-any.whl"
    return pack(name, {}, ("numpy", "rich; extra == 'fancy'"))


def project(folder: Path, name: str, version: str, needs: str = "") -> Path:
    """Write a project that builds itself, so that its build needs no network."""
    folder.mkdir(parents=True)
    backend = BACKEND.replace("NAME", name).replace("VERSION", version).replace("NEEDS", needs)
    (folder / "backend.py").write_text(backend)
    (folder / f"{name}.py").write_text(f"VERSION = {version!r}\n")
    build = 'requires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    named = f'[project]\nname = "{name}"\nversion = "{version}"\n'
    (folder / "pyproject.toml").write_text(f"[build-system]\n{build}{named}")
    return folder
