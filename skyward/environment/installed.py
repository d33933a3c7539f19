"""The packages that are installed here, as requirements and wheels for machines."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from skyward.environment.found import Found, applies, direct_url, is_linux_here, linux, url_of

_SYSTEM = re.compile(r"/usr/lib(64)?/python3[^/]*/(dist|site)-packages")
"""Where a distribution's own packages are; pip, run as root, writes to ``/usr/local``."""
_SYSTEM_INSTALLERS = ("debian", "apt", "dpkg", "rpm", "dnf", "zypper", "pacman", "apk", "portage")
_CONDA = re.compile(r"(conda|mamba|libmambapy|menuinst|navigator-updater|(anaconda|conda|mamba)-.*)")


def read_installed(found: Found) -> None:
    """Add what is installed in this environment, each package in its version here."""
    elsewhere = _only_here()
    distributions: dict[str, importlib.metadata.Distribution] = {}
    # One package may be there twice: a project's folder on the path beside its editable install, which says more.
    for one in sorted(importlib.metadata.distributions(), key=lambda d: d.read_text("RECORD") is None):
        distributions.setdefault(canonicalize_name(one.metadata["Name"] or ""), one)
    for name, one in sorted(distributions.items()):
        if not name or not found.takes(name):
            continue
        if name in elsewhere:
            found.not_reproduced[name] = f"nothing needs it on Linux, but on {sys.platform}"
        else:
            _add(found, name, one)
    for package in _conda_packages():
        if package not in distributions and package not in found.replaced:
            found.not_reproduced.setdefault(package, "a conda package that is not a Python package")


def _add(found: Found, name: str, one: importlib.metadata.Distribution) -> None:
    installer = (one.read_text("INSTALLER") or "").strip().lower()
    folder = Path(str(one.locate_file("")))
    direct = direct_url(one)
    if installer == "conda":  # whose builds note an address on the computer that built them
        if _CONDA.fullmatch(name):
            found.not_reproduced[name] = "a part of conda"
        else:
            _add_version(found, name, one.version)
    elif installer in _SYSTEM_INSTALLERS or _SYSTEM.fullmatch(str(folder)):
        found.not_reproduced[name] = "the system's package manager installed it; if calls need it, name it in pip="
    elif direct is not None and "dir_info" in direct:
        found.add_installed(one)
    elif direct is not None:
        found.add_url(name, url_of(direct))
    elif one.read_text("RECORD") is None and not {"site-packages", "dist-packages"} & set(folder.parts):
        project = next((p for p in (folder, folder.parent) if _is_project(p)), None)  # as after `setup.py develop`
        if project is not None:
            found.add_local(name, project)
        else:
            found.not_reproduced[name] = f"it is imported from {folder}, which is no project; it travels as source"
    else:
        _add_version(found, name, one.version)


def _add_version(found: Found, name: str, version: str) -> None:
    public, _, label = version.partition("+")
    found.add(f"{name}=={public}")
    if label:
        found.not_reproduced[name] = (
            f"{version} is here; machines get {public} from their index. To keep +{label}, name it in pip= and its "
            "index in pip_extra_index_url="
        )


def _is_project(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("pyproject.toml", "setup.py"))


def _only_here() -> set[str]:
    """Return packages that others need here and not on Linux, and that were not asked for by name."""
    if is_linux_here():
        return set()
    here = {name: str(value) for name, value in default_environment().items()}
    target = linux("x86_64")
    only: set[str] = set()
    there: set[str] = set()
    for one in importlib.metadata.distributions():
        if one.read_text("REQUESTED") is not None:
            there.add(canonicalize_name(one.metadata["Name"] or ""))
        for text in one.requires or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            name = canonicalize_name(requirement.name)
            if applies(requirement.marker, target):
                there.add(name)
            elif applies(requirement.marker, here):
                only.add(name)
    return only - there


def _conda_packages() -> list[str]:
    """Return the names of this conda environment's packages that have no metadata for Python."""
    records = sorted((Path(sys.prefix) / "conda-meta").glob("*.json"))
    texts = ((path.stem.rsplit("-", 2)[0], path.read_text(encoding="utf-8", errors="replace")) for path in records)
    is_python = re.compile(r"\.(dist|egg)-info")
    return [name for name, text in texts if name != "python" and not is_python.search(text)]
