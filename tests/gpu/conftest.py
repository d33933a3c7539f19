"""Skips what needs an NVIDIA GPU where there is none, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyward.accelerators.devices import Device, read


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def gpus() -> tuple[Device, ...]:
    """The GPUs of this machine; there is at least one."""
    reading = read("NVIDIA")
    if not reading.devices:
        pytest.skip(f"no NVIDIA GPU here: {reading.error or 'the driver shows none'}")
    return reading.devices
