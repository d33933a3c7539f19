"""skyward itself as a wheel, made from what the caller runs: a checkout and a release travel in the same way."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

import skyward.version
from skyward.environment.wheels import Wheel, pack
from skyward.errors import PoolError


@cache
def own_wheel() -> Wheel:
    """Return the wheel. Its version carries a digest of the content, so that two checkouts never pass for each other.

    Raises
    ------
    PoolError
        skyward is not installed, only imported.
    """
    package = Path(skyward.version.__file__).parent
    files = dict(_files(package, "skyward"))
    backend = package.parent / "skyward_joblib"
    files |= dict(_files(backend if backend.is_dir() else package.parent / "backends" / backend.name, backend.name))
    digest = hashlib.sha256(b"\0".join(k.encode() + b"\0" + v for k, v in sorted(files.items()))).hexdigest()[:12]
    version = f"{skyward.version.__version__.partition('+')[0]}+{digest}"
    try:
        requirements = tuple(r for r in importlib.metadata.requires("skyward") or () if "extra ==" not in r)
    except importlib.metadata.PackageNotFoundError:
        raise PoolError(
            f"skyward is imported from {package} without being installed, so what it needs on the machines is not "
            "known. Install it: pip install skyward, or in a checkout pip install -e ."
        ) from None
    info = f"skyward-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: skyward", f"Version: {version}"]
    metadata += [f"Requires-Dist: {r}" for r in requirements]
    files[f"{info}/METADATA"] = "\n".join([*metadata, ""]).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: skyward\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    return pack(f"skyward-{version}-py3-none-any.whl", files, requirements)


def _files(folder: Path, name: str) -> list[tuple[str, bytes]]:
    found = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [(f"{name}/{p.relative_to(folder).as_posix()}", p.read_bytes()) for p in found]
