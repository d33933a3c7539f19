"""`sky.Executor`, beside what `concurrent.futures` promises."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import skyward as sky
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def executor() -> Iterator[sky.Executor]:
    with sky.Executor("local", nodes=1, concurrency=2, display="quiet") as executor:
        yield executor


def test_it_is_an_executor(executor: sky.Executor) -> None:
    assert isinstance(executor, concurrent.futures.Executor)
    assert executor.submit(pow, 2, 10).result(timeout=30) == 1024
    assert executor.submit(pow, 2, exp=3).result(timeout=30) == 8
    assert executor.total_slots == 2


def test_compute_functions_are_taken_too(executor: sky.Executor) -> None:
    double = sky.compute(lambda x: 2 * x)

    assert executor.submit(double, 4).result(timeout=30) == 8
    assert list(executor.map(double, [1, 2])) == [2, 4]


def test_wait_and_as_completed_work_with_its_futures(executor: sky.Executor) -> None:
    futures = [executor.submit(pow, i, 2) for i in range(20)]

    ended = concurrent.futures.as_completed(futures, timeout=30)
    assert sorted(f.result() for f in ended) == [i * i for i in range(20)]
    done, pending = concurrent.futures.wait(futures, timeout=30)
    assert len(done) == 20
    assert not pending


def test_exceptions_are_the_users_own(executor: sky.Executor) -> None:
    future = executor.submit(int, "x")

    assert isinstance(future.exception(timeout=30), ValueError)
    with pytest.raises(ValueError, match="invalid literal"):
        future.result()


def test_done_callbacks_are_called(executor: sky.Executor) -> None:
    called = threading.Event()
    executor.submit(pow, 1, 1).add_done_callback(lambda f: called.set())

    assert called.wait(30)


def test_map_is_in_order_and_raises_in_its_turn(executor: sky.Executor) -> None:
    assert list(executor.map(pow, [2, 3], [3, 2], chunksize=5)) == [8, 9]
    results = executor.map(int, ["1", "x", "3"])
    assert next(results) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        next(results)
    with pytest.raises(ValueError, match="chunksize"):
        executor.map(int, [], chunksize=0)


def test_map_ends_with_its_timeout_and_frees_the_slots(executor: sky.Executor) -> None:
    results = executor.map(time.sleep, [0, 60, 60], timeout=1)

    assert next(results) is None
    with pytest.raises(TimeoutError):
        next(results)
    assert executor.submit(pow, 2, 2).result(timeout=30) == 4


def test_a_running_call_can_be_cancelled(executor: sky.Executor, tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "began").touch()
        for _ in range(6000):
            time.sleep(0.01)

    future = executor.submit(work)
    wait_until((tmp_path / "began").exists)

    assert future.running()
    assert future.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    assert executor.submit(pow, 2, 2).result(timeout=30) == 4


def test_machines_come_with_the_first_call_and_go_with_shutdown() -> None:
    executor = sky.Executor("local", display="quiet")
    assert not executor.pool.is_active

    pid = executor.submit(os.getpid).result(timeout=60)
    executor.shutdown()

    assert not executor.pool.is_active
    wait_until(lambda: not psutil.pid_exists(pid))
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(pow, 1, 1)
    executor.shutdown()


def test_shutdown_waits_for_what_was_submitted(tmp_path: Path) -> None:
    with sky.Executor("local", display="quiet") as executor:
        future = executor.submit(time.sleep, 0.5)

    assert future.done()
    assert future.result() is None


def test_shutdown_without_waiting_ends_the_machines_later() -> None:
    executor = sky.Executor("local", display="quiet")
    future = executor.submit(time.sleep, 1)

    executor.shutdown(wait=False)

    assert executor.pool.is_active
    assert future.result(timeout=30) is None
    wait_until(lambda: not executor.pool.is_active)


def test_shutdown_can_cancel_what_has_not_ended() -> None:
    executor = sky.Executor("local", display="quiet")
    futures = [executor.submit(time.sleep, 60) for _ in range(4)]

    executor.shutdown(cancel_futures=True)

    assert all(f.cancelled() for f in futures)
    assert not executor.pool.is_active


def test_an_executor_that_is_forgotten_ends_its_machines() -> None:
    executor = sky.Executor("local", display="quiet")
    pid = executor.submit(os.getpid).result(timeout=60)

    del executor
    gc.collect()

    wait_until(lambda: not psutil.pid_exists(pid))


def test_bad_options_are_found_at_once() -> None:
    with pytest.raises(sky.SpecError, match="nodes=0"):
        sky.Executor("local", nodes=0)
