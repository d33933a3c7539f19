"""Logs of machines that could not be made ready, kept on this computer: the machines themselves are gone by then."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from skyward.paths import data_folder

logger = logging.getLogger(__name__)

KEPT_DAYS = 30
"""Days after which a log is removed. Chosen, not measured: long enough to come back to it after a holiday."""
MOST_BYTES = 2_000_000
"""Of a longer log the end is kept."""


def path_of(pool_id: str, machine_id: str) -> Path:
    """Return where the log of a machine is, if it was kept."""
    return data_folder() / "logs" / pool_id / f"{machine_id.replace('/', '_')}.log"


def keep(pool_id: str, machine_id: str, text: str) -> Path | None:
    """Write the log of a machine, for this user only, and remove old ones; return its path.

    None: it can't be written, which is logged: whatever the log is about matters more.
    """
    path = path_of(pool_id, machine_id)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.parent.chmod(0o700)
        data = text.encode("utf-8", "replace")
        if len(data) > MOST_BYTES:
            data = b"... the beginning is left out ...\n" + data[-MOST_BYTES:]
        # It may quote the addresses of package indexes, passwords included.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
    except OSError as exc:
        logger.warning("the log of %s can't be kept at %s: %s", machine_id, path, exc)
        return None
    _remove_old(path.parent.parent)
    return path


def _remove_old(logs: Path) -> None:
    oldest = time.time() - KEPT_DAYS * 86_400
    for folder in logs.glob("*"):
        # Another process may be at it too.
        with contextlib.suppress(OSError):
            for file in folder.glob("*.log"):
                if file.stat().st_mtime < oldest:
                    file.unlink()
            folder.rmdir()  # unless something is left in it
