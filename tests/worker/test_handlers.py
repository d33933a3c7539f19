"""Chunks that go to workers without the scheduler in between: who waits for whom, and what the scheduler knows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from skyward.engine import Call
from skyward.engine.placement import Placement
from skyward.transfer.wire import Slot
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def pool() -> Iterator[sky.ComputePool]:
    with sky.ComputePool(provider="local", nodes=1, concurrency=2, display="quiet", retries=0) as pool:
        yield pool


@sky.compute
def wait_for(path: Path) -> str:
    while not path.exists():
        time.sleep(0.01)
    return path.name


@sky.compute
def short(i: int) -> int:
    return i


def processing(pool: sky.ComputePool) -> list[str]:
    """Return the names of the tasks that the scheduler believes to be running."""
    found = pool.client.run_on_scheduler(
        lambda dask_scheduler: [ts.prefix.name for w in dask_scheduler.workers.values() for ts in w.processing]
    )
    assert isinstance(found, list)
    return found


def test_calls_do_not_wait_behind_a_long_one_while_a_slot_is_free(pool: sky.ComputePool, tmp_path: Path) -> None:
    assert list(sky.gather(*(short(i) for i in range(20))) >> pool) == list(range(20))  # known to be short
    go = tmp_path / "go"
    long = pool.submit(wait_for(go))
    wait_until(long.running)

    for _ in range(5):
        futures = [pool.submit(short(i)) for i in range(8)]
        assert [f.result(30) for f in futures] == list(range(8))

    go.touch()
    assert long.result(30) == "go"


def test_the_scheduler_knows_of_a_long_call_as_long_as_it_runs(pool: sky.ComputePool, tmp_path: Path) -> None:
    go = tmp_path / "go"
    long = pool.submit(wait_for(go))

    wait_until(lambda: processing(pool) == ["wait_for"])
    # What the user sends through Dask goes to the other worker.
    busy = {address for address, keys in pool.client.processing().items() if keys}
    elsewhere = pool.client.submit(lambda: __import__("distributed").get_worker().address, pure=False)
    assert elsewhere.result(30) not in busy

    go.touch()
    long.result(30)
    wait_until(lambda: processing(pool) == [])


def test_dasks_own_ways_to_ask_where_one_is_work_in_calls(pool: sky.ComputePool) -> None:
    @sky.compute
    def where() -> Any:
        from distributed import get_client, get_worker

        return get_worker().address, get_client().submit(pow, 2, 5).result()

    address, value = where() >> pool

    assert address in pool.client.scheduler_info()["workers"]
    assert value == 32


def test_what_waits_behind_a_call_that_ends_its_process_is_not_lost(tmp_path: Path) -> None:
    go = tmp_path / "go"

    @sky.compute
    def ends_its_process() -> None:
        import os

        while not go.exists():
            time.sleep(0.01)
        os._exit(1)

    with sky.ComputePool(provider="local", nodes=1, concurrency=1, display="quiet", retries=0) as pool:
        sky.gather(*(short(i) for i in range(20))) >> pool
        killer = pool.submit(ends_its_process())
        wait_until(killer.running)
        behind = pool.submit(short(7))
        wait_until(behind.running)
        go.touch()

        with pytest.raises(sky.WorkerDiedError):
            killer.result(30)
        assert behind.result(60) == 7


def test_calls_for_a_group_that_was_cancelled_are_cancelled(pool: sky.ComputePool) -> None:
    group = pool.engine.group()
    group.cancel()

    future = pool.engine.submit(Call(pow, (2, 3)), group=group)

    cancelled = threading.Event()
    future.add_done_callback(lambda f: cancelled.set() if f.cancelled() else None)
    assert cancelled.wait(30)


# --- where the next chunk goes ------------------------------------------------------------------------------


def placed(count: int) -> Placement:
    placement = Placement()
    placement.update([Slot(f"w{n}", 0, n) for n in range(count)])
    return placement


def test_the_next_chunk_goes_where_there_is_least_to_do() -> None:
    placement = placed(2)
    assert placement.pick(2) == "w0"
    placement.add("w0")
    assert placement.pick(2) == "w1"
    placement.add("w1")
    assert placement.pick(1) is None
    placement.add("w0")
    assert placement.pick(2) == "w1"


def test_a_shunned_worker_gets_nothing_until_its_time_ends_or_it_is_gone() -> None:
    placement = placed(2)
    placement.avoid("w0", time.monotonic() + 0.05)
    placement.avoid("w1", float("inf"))
    assert placement.pick(2) is None
    assert not placement.has_idle()

    wait_until(lambda: placement.pick(2) == "w0")
    placement.update([Slot("w0", 0, 0)])
    placement.update([Slot("w0", 0, 0), Slot("w1", 0, 1)])  # another process with the same address
    placement.add("w0")
    assert placement.pick(2) == "w1"


def test_workers_are_crowded_when_something_waits_there() -> None:
    placement = placed(3)
    for address in ("w0", "w1", "w1"):
        placement.add(address)

    assert placement.overloaded() == ["w1"]
    assert placement.busy() == {"w0", "w1"}
    placement.remove("w1")
    placement.remove("w0")
    placement.remove("w1")
    assert placement.busy() == set()


# --- what calls print ---------------------------------------------------------------------------------------


def test_what_a_call_prints_is_there_once_and_in_order_when_its_result_is(pool: sky.ComputePool) -> None:
    @sky.compute
    def say(i: int) -> None:
        print(f"{i} begins")
        time.sleep(0.15)  # meanwhile that is sent
        print(f"{i} ends")

    before = len(pool.logs())
    for i in range(4):
        say(i) >> pool
        assert pool.logs()[before:] == [f"{n} {word}" for n in range(i + 1) for word in ("begins", "ends")]
