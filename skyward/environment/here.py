"""The caller's environment: from a lock file or a requirements file of its project, or from what is installed."""

from __future__ import annotations

import logging
import os
import re
import sys
import sysconfig
from collections.abc import Collection, Sequence
from itertools import takewhile
from pathlib import Path

from skyward.environment.found import Found, by_reason
from skyward.environment.installed import read_installed
from skyward.environment.requirements_file import read_requirements
from skyward.environment.uv_lock import read_uv_lock

logger = logging.getLogger(__name__)

_SHOWN = 10
"""How many names for one reason are logged; `Image.not_reproduced` has all."""


def read_here(exclude: Collection[str], replaced: Collection[str]) -> Found:
    """Return the caller's environment, and log where it is from and what machines don't get.

    Raises
    ------
    SpecError
        A lock file or a requirements file can't be read.
    """
    found = Found(exclude, replaced)
    start = _start()
    source = _source(start)
    if source is None:
        read_installed(found)
    elif source.name == "uv.lock":
        read_uv_lock(found, source, start)
    else:
        read_requirements(found, source)
    count = len(found.pip) + len(found.wheels)
    logger.info("the image has %d packages, from %s", count, source or f"what is installed in {sys.prefix}")
    if found.not_reproduced:
        level = logging.WARNING if found.is_surprising else logging.INFO
        missing = "; ".join(f"{_some(names)} ({why})" for why, names in by_reason(found.not_reproduced).items())
        logger.log(level, "the image is not all of %s: %s", source or sys.prefix, missing)
    return found


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _start() -> Path:
    """Return the folder of the script that runs; the working directory of notebooks and of installed programs."""
    main = _script()
    return Path.cwd() if main is None else main.parent


def _script() -> Path | None:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if file is None:
        return None
    path = Path(file).absolute()
    is_installed = path.parent.name == "bin" or bool({"site-packages", "dist-packages"} & set(path.parts))
    is_installed |= path.is_relative_to(sysconfig.get_path("stdlib"))  # as with `python -m unittest`
    return None if is_installed or not path.exists() else path


def _source(start: Path) -> Path | None:
    """Return the nearest lock file or requirements file from `start` up to the root of its project."""
    script = _script()
    if script is not None and re.search(r"(?m)^# /// script\s*$", script.read_text(encoding="utf-8", errors="replace")):
        return None  # it names its own packages (PEP 723), and runs where they are installed
    for folder in _project(start):
        for name in ("uv.lock", "requirements.txt"):
            if (folder / name).is_file():
                return folder / name
    return None


def _project(start: Path) -> list[Path]:
    """Return `start` and the folders above it that belong to the same project, as far as they are this user's."""
    above = list(takewhile(lambda folder: folder.stat().st_uid == os.getuid(), start.parents))
    folders = [start, *above]
    for mark in (".git", "uv.lock", "pyproject.toml"):
        for number, folder in enumerate(folders, 1):
            if (folder / mark).exists():
                return folders[:number]
    return [start]
