"""A cloud is asked once for all machines of a pool, and nobody waits long for its answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from skyward.cluster import listing
from skyward.cluster.listing import Listing
from skyward.providers.base import Login, Machine


def machine(number: int) -> Machine:
    return Machine(id=f"i-{number}", provider="aws", login=Login(host=f"10.0.0.{number}", user="root"))


def test_a_hundred_nodes_that_ask_at_once_are_answered_by_two_listings() -> None:
    asked: list[int] = []

    def gone(machines: Sequence[Machine]) -> set[str]:
        asked.append(len(machines))
        return {"i-7"}

    async def ask_all() -> list[bool]:
        known = Listing(gone)
        return await asyncio.gather(*(known.has(machine(i)) for i in range(100)))

    assert asyncio.run(ask_all()) == [i != 7 for i in range(100)]
    assert asked == [1, 99]


def test_a_cloud_that_does_not_answer_has_the_machine_and_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "LIMIT_S", 0.1)
    asked: list[Sequence[Machine]] = []
    blocked = threading.Event()

    def gone(machines: Sequence[Machine]) -> set[str]:
        asked.append(machines)
        blocked.wait(60)
        return {m.id for m in machines}

    async def ask() -> list[bool]:
        known = Listing(gone)
        answers = [await known.has(machine(1)) for _ in range(3)]
        count = len(asked)
        blocked.set()
        monkeypatch.setattr(listing, "LIMIT_S", 60)
        return [*answers, count == 1, await known.has(machine(1))]

    assert asyncio.run(ask()) == [True, True, True, True, False]


def test_a_listing_that_fails_loses_no_machine(caplog: pytest.LogCaptureFixture) -> None:
    def gone(_: Sequence[Machine]) -> set[str]:
        raise ValueError("an SDK's fault")

    async def ask() -> bool:
        return await Listing(gone).has(machine(1))

    assert asyncio.run(ask())
    assert "the listing of machines failed" in caplog.text
