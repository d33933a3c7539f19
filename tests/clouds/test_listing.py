"""Clouds that list late what they have made: nothing is launched twice, taken for gone, or left. Addresses only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

import skyward as sky
from skyward.launch.provisioner import pool_keys
from skyward.providers import retry
from skyward.providers.base import LaunchOrder, Login, Machine, Need, Offer, UserData
from tests.clouds.emulated import NAMES, Emulated

POOL = "0123abcd"


@pytest.fixture(params=NAMES)
def cloud(request: pytest.FixtureRequest, emulate: Callable[..., Emulated]) -> Emulated:
    """Each cloud in turn."""
    return emulate(request.param, boots=False)


@cache
def keys() -> tuple[Login, UserData]:
    return pool_keys(3600)


def offer(cloud: Emulated) -> Offer:
    return next(o for o in cloud.provider().offers(Need(machine=cloud.type)) if o.instance.name == cloud.type)


def launch(cloud: Emulated, chosen: Offer, count: int, token: str = "a1b2c3d4", **facts: Any) -> list[Machine]:
    login, user_data = keys()
    order = LaunchOrder(
        pool_id=POOL, token=token, count=count, spot=False, user_data=user_data, login=login, owner="me@here",
        expires=2_000_000_000.0, **facts,
    )  # fmt: skip
    return list(cloud.provider().launch(chosen, order))


def ids(machines: list[Machine]) -> set[str]:
    return {machine.id for machine in machines}


def test_an_end_finds_machines_that_are_listed_late(cloud: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "LATE_S", 1.0)
    launch(cloud, offer(cloud), 2)
    cloud.list_late(0.5)

    cloud.provider().end(POOL, [cloud.region])

    assert cloud.left() == []


def test_after_a_lost_answer_late_listing_doubles_and_loses_nothing(
    cloud: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "LISTED_S", 20.0)
    chosen = offer(cloud)
    cloud.list_late(0.5)
    cloud.lose_create_answer()

    machines = launch(cloud, chosen, 3)

    assert len(ids(machines)) == len(cloud.machines()) == 3
    cloud.provider().end(POOL, [cloud.region])
    assert cloud.left() == []


def test_machines_that_are_not_listed_yet_are_terminated(cloud: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "LISTED_S", 20.0)
    machines = launch(cloud, offer(cloud), 2)
    cloud.list_late(0.5)

    cloud.provider().terminate(machines)

    assert cloud.machines() == []


def test_a_failed_launch_leaves_other_machines_what_they_need(cloud: Emulated) -> None:
    chosen = offer(cloud)
    facts = {"volumes": (sky.S3Volume("/in", "data"),)} if cloud.name == "aws" else {}
    machines = launch(cloud, chosen, 1, **facts)
    before = cloud.left()
    cloud.list_late(60)
    cloud.refuse_creates()

    with pytest.raises(sky.CapacityError):
        launch(cloud, chosen, 1, "e5f6a7b8", **facts)

    cloud.list_late(0)
    assert cloud.left() == before
    found = cloud.provider().machines(POOL)
    assert ids(found) == ids(machines)
    assert {machine.expires for machine in found} == {2_000_000_000.0}  # tags are there


def test_machines_that_have_lost_a_mark_are_found_and_ended(cloud: Emulated) -> None:
    machines = launch(cloud, offer(cloud), 2)
    cloud.take_mark(POOL)

    found = cloud.provider().machines(POOL)
    everywhere = cloud.provider().machines()
    cloud.provider().end(POOL, [cloud.region])

    assert ids(found) == ids(everywhere) == ids(machines)
    assert {machine.pool_id for machine in everywhere} == {POOL}
    assert cloud.machines() == []
