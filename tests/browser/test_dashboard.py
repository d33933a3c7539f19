"""The dashboard of a pool as a browser shows it."""

from __future__ import annotations

import pytest
from joblib import Parallel, delayed

import skyward as sky
from tests.chromium import Browser
from tests.dashboard import drawn, wait_until_drawn
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


@sky.compute
def load_table(seconds: float) -> float:
    from time import sleep

    sleep(seconds)
    return seconds


@sky.compute
def train_fold(fold: int) -> int:
    return fold


@sky.compute
def warm_cache() -> None:
    pass


@sky.compute
def fail_to_fit() -> None:
    raise ValueError("no convergence")


def score_candidate(candidate: int) -> int:
    return candidate


NAMES = {"load_table", "train_fold", "warm_cache", "fail_to_fit", "score_candidate"}


def run_all(pool: sky.ComputePool) -> None:
    """Run each of the functions in another way."""
    load_table(0.5) >> pool  # so long that the scheduler has a task for it too
    sky.gather(*(train_fold(fold) for fold in range(20))) >> pool
    warm_cache() @ pool
    sky.gather(fail_to_fit(), return_exceptions=True) >> pool
    with sky.integrations.joblib_backend(pool):
        Parallel(n_jobs=-1)(delayed(score_candidate)(candidate) for candidate in range(20))


def test_the_task_stream_shows_names_of_functions_from_before_and_after(browser: Browser) -> None:
    with sky.ComputePool("local", nodes=2, concurrency=2, display="quiet") as pool:
        run_all(pool)
        browser.open(pool.dashboard_link)
        wait_until_drawn(browser, NAMES)
        before = drawn(browser)
        sky.gather(*(train_fold(fold) for fold in range(20))) >> pool
        # After a pause of 20 s Dask begins a new picture.
        wait_until(lambda: any(bar["name"] == "train_fold" and bar not in before for bar in drawn(browser)))
        complaints = browser.complaints()

    assert {bar["name"] for bar in before} == NAMES
    assert {bar["name"] for bar in before if bar["color"] == "black"} == {"fail_to_fit"}
    assert any(bar["name"] == "load_table" and bar["duration"] > 400 for bar in before)
    assert len({bar["y"] for bar in before}) == 4  # a row for each slot
    assert complaints == []


def test_the_name_of_what_one_points_at_is_shown(browser: Browser) -> None:
    with sky.ComputePool("local", display="quiet") as pool:
        browser.open(pool.dashboard_link)
        load_table(0.5) >> pool
        wait_until_drawn(browser, {"load_table"})

        wait_until(lambda: "load_table:" in browser.shown_when_pointing_at("task_stream", "load_table"))


def test_the_page_of_skyward_shows_nodes_and_calls_and_keeps_up(browser: Browser) -> None:
    with sky.ComputePool("local", nodes=2, display="quiet") as pool:
        train_fold(1) >> pool
        browser.open(pool.dashboard_link)
        address = browser.links()["Skyward"]
        browser.open(address)
        wait_until(lambda: "ready" in browser.text)
        first = browser.text
        # With the first figures of all nodes, in the place of dashes.
        wait_until(lambda: "1 call so far" in browser.text and "–" not in browser.text)
        machines = [instance.id for instance in pool.instances]
        complaints = browser.complaints()

    assert address.endswith("/skyward")
    assert "2 nodes × 1 slot on local" in first
    assert all(machine in first for machine in machines)
    assert complaints == []


def test_the_page_of_skyward_shows_what_machines_of_a_cloud_cost(browser: Browser) -> None:
    with sky.ComputePool("local", display="quiet") as pool:
        browser.open(pool.dashboard_link.replace("status", "skyward"))
        wait_until(lambda: "ready" in browser.text)
        assert "USD" not in f"{browser.text} {browser.plots()}"
        for event in (  # a cloud's, which is not to be had here
            sky.InstanceProvisioned(
                instance_id="i-0ab3", node=0, spot=True, provider="aws", instance_type="g5.xlarge", price_spot=0.4031
            ),
            sky.BootstrapCompleted(instance_id="i-0ab3"),
            sky.CostUpdate(
                elapsed_seconds=110.0, accumulated_cost=0.0123, hourly_rate=0.0, spot_count=1, ondemand_count=0
            ),
        ):
            pool._life.session.emit(event)
        wait_until(lambda: "i-0ab3 g5.xlarge spot 0.4031 ready" in browser.text)
        wait_until(lambda: "Cost so far, in USD (times are UTC)" in browser.plots())
        shown, costs = browser.text, browser.data("cost")[0]["cost"]
        complaints = browser.complaints()

    assert "· 0.0123 USD so far, 0.0000 USD/h" in shown
    assert costs[-1] == 0.0123
    assert complaints == []
