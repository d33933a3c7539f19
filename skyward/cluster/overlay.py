"""Packages that an image asks for and this environment lacks, in a folder beside it: the local pool's environment."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from skyward.cluster.requirements import parsed
from skyward.environment.found import direct_url, distribution, requirements_of, url_of
from skyward.environment.wheels import Wheel
from skyward.errors import BootstrapError

logger = logging.getLogger(__name__)


def missing(requirements: Sequence[str]) -> list[str]:
    """Return those of `requirements` that the running environment does not satisfy."""
    return [text for text in requirements if not _satisfied(text)]


def missing_wheels(wheels: Sequence[Wheel]) -> list[Wheel]:
    """Return the wheels of packages that are not installed, in whatever version: what is here may be newer."""
    return [wheel for wheel in wheels if distribution(wheel.project) is None]


def _satisfied(text: str) -> bool:
    requirement = parsed(text)
    if requirement is None:
        return False
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    found = distribution(requirement.name)
    if found is None:
        return False
    if requirement.url:
        direct = direct_url(found)
        return direct is not None and url_of(direct).partition("#")[0] == requirement.url.partition("#")[0]
    needed = [r for extra in requirement.extras for r in requirements_of(found.requires or (), extra)]
    return requirement.specifier.contains(found.version, prereleases=True) and not missing(needed)


def overlay(requirements: Sequence[str], indexes: Sequence[str] = (), wheels: Sequence[Wheel] = ()) -> Path | None:
    """Install what is missing of `requirements` into a cached folder; return it, or None when nothing is missing.

    The folder belongs in front of ``sys.path``. What is installed here keeps its version there.

    Raises
    ------
    BootstrapError
        pip failed; the message has its last lines.
    """
    wanted = sorted(text.partition(" --hash=")[0] for text in missing(requirements))
    lacking = missing_wheels(wheels)
    if not wanted and not lacking:
        return None
    here = sorted(
        f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions() if d.metadata["Name"]
    )
    recipe = "\n".join([sys.version, *indexes, *wanted, *(wheel.digest for wheel in lacking), "--", *here])
    folder = platformdirs.user_cache_path("skyward") / "overlays" / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Installed beside it and renamed: a folder under its own name is always whole.
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for wheel in lacking:
            (part / wheel.name).write_bytes(wheel.data)
            wanted.append(str(part / wheel.name))
        _install(wanted, here, part / "site", indexes)
        try:
            (part / "site").rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _install(wanted: list[str], here: list[str], target: Path, indexes: Sequence[str]) -> None:
    constraints = target.parent / "constraints.txt"
    names = {requirement.name.lower() for text in wanted if (requirement := parsed(text))}
    constraints.write_text("\n".join(line for line in here if line.partition("==")[0].lower() not in names))
    command = [*_installer(), "--target", str(target), "--constraint", str(constraints)]
    for url in indexes:
        command += ["--extra-index-url", url]
    logger.info("installing %s for the local pool", ", ".join(wanted))
    done = subprocess.run([*command, "--", *wanted], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        lines = tuple((done.stdout + done.stderr).splitlines()[-20:])
        raise BootstrapError(
            "\n  ".join([f"Image.pip: {', '.join(wanted)} could not be installed:", *lines]),
            machine="local",
            step="pip",
            last_lines=lines,
        )


def _installer() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    raise BootstrapError(
        "Image.pip asks for packages that are not installed here, and neither pip nor uv is there to install them. "
        "Install them into this environment, or install pip.",
        machine="local",
        step="pip",
        last_lines=(),
    )
