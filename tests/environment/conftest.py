"""A site-packages folder that has only what the test puts there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from skyward.environment import here

assert here.__name__  # loaded before packages are hidden


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which is where the environment is searched for."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder with packages on the path."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    others = [path for path in sys.path if not {"site-packages", "dist-packages"} & set(Path(path).parts)]
    monkeypatch.setattr(sys, "path", [str(folder), *others])
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    return folder
