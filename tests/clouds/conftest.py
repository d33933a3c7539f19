"""Emulated clouds for these tests, each with the credentials in the environment that its SDK looks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skyward.providers import launches, retry
from tests.clouds.emulated import NAMES, Emulated
from tests.machines.conftest import baked, can_boot, site  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal and a cache of the test's own."""
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("SKYWARD_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _fast_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated clouds list what they make within some hundredths of a second."""
    monkeypatch.setattr(retry, "LISTED_S", 0.3)
    monkeypatch.setattr(retry, "LATE_S", 0.1)
    monkeypatch.setattr(retry, "PAUSES_S", (0.01, 0.1))


@pytest.fixture(autouse=True)
def _no_earlier_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tests have pools of the same id."""
    monkeypatch.setattr(launches, "_launches", {})


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Emulated]]:
    """Starts an emulated cloud by its name and points its SDK to it; it ends with the test."""
    started: list[Emulated] = []

    def emulate(name: str, **options: Any) -> Emulated:
        cloud = Emulated(name, **options)
        started.append(cloud)
        for variable, value in cloud.environment.items():
            monkeypatch.setenv(variable, value)
        return cloud

    yield emulate
    for cloud in started:
        cloud.close()


@pytest.fixture(params=NAMES)
def cloud(request: pytest.FixtureRequest, emulate: Callable[..., Emulated], baked: Path) -> Emulated:  # noqa: F811
    """Each cloud in turn, with machines that have the environment for `tests.machines.conftest.IMAGE`."""
    return emulate(request.param, baked=baked)
