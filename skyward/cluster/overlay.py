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
from skyward.errors import BootstrapError

logger = logging.getLogger(__name__)


def missing(requirements: Sequence[str]) -> list[str]:
    """Return those of `requirements` that the running environment does not satisfy."""
    return [text for text in requirements if not _satisfied(text)]


def _satisfied(text: str) -> bool:
    requirement = parsed(text)
    if requirement is None:
        return False
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    if requirement.url or requirement.extras:
        return False
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def overlay(requirements: Sequence[str], extra_index_url: str | None = None) -> Path | None:
    """Install what is missing of `requirements` into a cached folder; return it, or None when nothing is missing.

    The folder belongs in front of ``sys.path``. What is installed here keeps its version there.

    Raises
    ------
    BootstrapError
        pip failed; the message has its last lines.
    """
    wanted = sorted(missing(requirements))
    if not wanted:
        return None
    here = sorted(
        f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions() if d.metadata["Name"]
    )
    recipe = "\n".join([sys.version, extra_index_url or "", *wanted, "--", *here])
    folder = platformdirs.user_cache_path("skyward") / "overlays" / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Installed beside it and renamed: a folder under its own name is always whole.
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _install(wanted, here, part / "site", extra_index_url)
        try:
            (part / "site").rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _install(wanted: list[str], here: list[str], target: Path, extra_index_url: str | None) -> None:
    constraints = target.parent / "constraints.txt"
    names = {requirement.name.lower() for text in wanted if (requirement := parsed(text))}
    constraints.write_text("\n".join(line for line in here if line.partition("==")[0].lower() not in names))
    command = [*_installer(), "--target", str(target), "--constraint", str(constraints)]
    if extra_index_url:
        command += ["--extra-index-url", extra_index_url]
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
