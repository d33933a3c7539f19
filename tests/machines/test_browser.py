"""The dashboard of a pool on a machine elsewhere, through the tunnel, as a browser shows it."""

from __future__ import annotations

from collections.abc import Callable

import skyward as sky
from tests.chromium import Browser
from tests.cloudbox import Machine
from tests.dashboard import drawn, wait_until_drawn
from tests.machines.conftest import IMAGE, Site
from tests.waiting import wait_until


@sky.compute
def train_far_away(fold: int) -> int:
    return fold


def test_the_dashboard_of_a_remote_pool_shows_function_names_and_machine(
    site: Site, boot: Callable[[int], list[Machine]], browser: Browser
) -> None:
    (machine,) = boot(1)

    with sky.ComputePool(site.provider(machine), image=IMAGE, concurrency=2, display="quiet") as pool:
        sky.gather(*(train_far_away(fold) for fold in range(20))) >> pool
        browser.open(pool.dashboard_link)
        wait_until_drawn(browser, {"train_far_away"})
        bars = drawn(browser)
        browser.open(browser.links()["Skyward"])
        wait_until(lambda: "20 calls so far" in browser.text)
        shown = browser.text
        complaints = browser.complaints()

    assert pool.cost == 0
    assert {bar["name"] for bar in bars} == {"train_far_away"}
    assert all(bar["worker"].startswith(f"tls://{machine.address}:") for bar in bars)
    assert f"0 root@{machine.address} ready" in shown
    assert complaints == []
