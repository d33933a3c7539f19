"""Where skyward keeps files on this computer. Imports nothing of skyward."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def data_folder() -> Path:
    """Return the folder for what outlives a process: SKYWARD_DATA_DIR, or the platform's folder for user data."""
    return _absolute(os.environ.get("SKYWARD_DATA_DIR") or platformdirs.user_data_path("skyward"))


def config_folder() -> Path:
    """Return the folder of the user's configuration: SKYWARD_CONFIG_DIR, or the platform's folder for it."""
    return _absolute(os.environ.get("SKYWARD_CONFIG_DIR") or platformdirs.user_config_path("skyward"))


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()
