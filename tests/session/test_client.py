"""The Dask client of a pool, while the scheduler that it looks for is lost."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

import skyward as sky
from skyward.session import client


def cluster() -> Any:
    is_connected = asyncio.Event()
    is_connected.set()
    return SimpleNamespace(scheduler_address="tls://a", is_connected=is_connected, failure=None)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of schedulers that were looked for; one that begins with `up` answers."""
    addresses: list[str] = []

    def connect(found: Any, **_: Any) -> str:
        addresses.append(found.scheduler_address)
        if not found.scheduler_address.startswith("up"):
            raise TimeoutError
        return "the client"

    monkeypatch.setattr(client, "_connect", connect)
    return addresses


def test_a_client_waits_for_the_next_scheduler(tried: list[str]) -> None:
    found = cluster()
    found.is_connected.clear()  # it was lost while the client looked for it

    def moved() -> None:
        found.scheduler_address = "up"
        found.is_connected.set()

    threading.Timer(0.2, moved).start()
    assert client.connect(found, direct=False) == "the client"
    assert tried == ["tls://a", "up"]


def test_a_client_that_waits_hears_why_there_is_none(tried: list[str]) -> None:
    found = cluster()
    found.is_connected.clear()
    threading.Timer(0.2, setattr, [found, "failure", sky.PoolError("no machine is left")]).start()
    with pytest.raises(sky.PoolError, match="no machine is left"):
        client.connect(found, direct=False)
    assert tried == ["tls://a"]


def test_a_scheduler_that_never_answers_is_given_up(tried: list[str]) -> None:
    with pytest.raises(sky.PoolError, match="tls://a does not answer"):
        client.connect(cluster(), direct=False)
    assert len(tried) == 4
