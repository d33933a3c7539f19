"""Pools on machines reached over SSH, end to end."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

import skyward as sky
from tests.cloudbox import Machine
from tests.machines.conftest import IMAGE, Site


@pytest.fixture(scope="module")
def machines(boot: Callable[[int], list[Machine]]) -> list[Machine]:
    return boot(3)


@pytest.fixture(scope="module")
def pool(site: Site, machines: list[Machine]) -> Iterator[sky.ComputePool]:
    with sky.ComputePool(site.provider(*machines), nodes=3, concurrency=2, image=IMAGE, display="quiet") as pool:
        yield pool


def test_a_broadcast_reaches_every_machine(pool: sky.ComputePool, machines: list[Machine]) -> None:
    assert sky.compute(socket.gethostname)() @ pool == tuple(m.name for m in machines)
