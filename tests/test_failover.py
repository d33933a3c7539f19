"""Local pools whose Dask scheduler is killed: what runs on them goes on with the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError

import skyward as sky
from tests.waiting import wait_until


def scheduler_of(pool: sky.ComputePool) -> psutil.Process:
    """Return the process of a local pool's scheduler."""
    port = int(pool.cluster._failover.address.rpartition(":")[2])  # type: ignore[attr-defined]
    for process in psutil.Process().children(recursive=True):
        listens = [c for c in process.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
        if listens:
            return process
    raise LookupError(port)


def kill_scheduler(pool: sky.ComputePool) -> None:
    """Kill the scheduler, and return when the pool has noticed."""
    losses = pool.cluster._failover.losses  # type: ignore[attr-defined]
    scheduler_of(pool).kill()
    wait_until(lambda: pool.cluster._failover.losses > losses)  # type: ignore[attr-defined]


def kill_when_busy(pool: sky.ComputePool) -> None:
    wait_until(pool.engine.busy)
    kill_scheduler(pool)


@pytest.fixture(scope="module")
def pool() -> Iterator[sky.ComputePool]:
    with sky.ComputePool(sky.Local(), nodes=2, concurrency=2, display="quiet", retries=1) as pool:
        yield pool


@pytest.fixture
def moved(pool: sky.ComputePool) -> list[sky.SchedulerMoved]:
    told: list[sky.SchedulerMoved] = []
    pool.on(sky.SchedulerMoved, told.append)
    return told


@sky.compute
def square(i: int, begun: Path | None = None, gate: Path | None = None) -> int:
    if begun is not None:
        with begun.open("a") as file:
            file.write(f"{i}\n")
    while gate is not None and not gate.exists():
        time.sleep(0.02)
    time.sleep(0.2)
    return i * i


@sky.compute
def add(a: int, b: int) -> int:
    time.sleep(0.1)
    return a + b


@sky.compute
def count(values: int) -> Iterator[int]:
    for i in range(values):
        time.sleep(0.05)
        yield i


@sky.compute
def held(gate: Path) -> str:
    while not gate.exists():
        time.sleep(0.02)
    return "done"


def has_begun(path: Path, lines: int = 1) -> Callable[[], bool]:
    return lambda: path.exists() and len(path.read_text().splitlines()) >= lines


def test_calls_run_again_and_each_value_arrives_once(
    pool: sky.ComputePool, moved: list[sky.SchedulerMoved], tmp_path: Path
) -> None:
    begun, found, gate = tmp_path / "begun", [], tmp_path / "gate"
    calls = [square(i, begun, gate if i >= 5 else None) for i in range(24)]

    for value in sky.gather(*calls, stream=True, ordered=False) >> pool:
        found.append(value)
        if len(found) == 5:
            wait_until(has_begun(begun, 6))
            kill_scheduler(pool)
            gate.touch()

    assert sorted(found) == [i * i for i in range(24)]
    again = len(begun.read_text().splitlines()) - 24
    assert 1 <= again <= 8  # those that were on the four workers
    assert [event.node for event in moved] == [0]
    assert "ended by signal 9" in moved[0].reason


def test_futures_go_on(pool: sky.ComputePool, tmp_path: Path) -> None:
    futures = [pool.submit(square(i, tmp_path / "begun")) for i in range(12)]
    wait_until(has_begun(tmp_path / "begun"))

    kill_scheduler(pool)

    assert not wait(futures, 60).not_done
    assert [future.result() for future in futures] == [i * i for i in range(12)]


def test_calls_that_feed_calls_go_on(pool: sky.ComputePool, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    level: list[Any] = [square(i, begun) for i in range(16)]
    while len(level) > 1:
        level = [add(a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
    running = pool.submit(level[0])
    wait_until(has_begun(begun, 6))

    kill_scheduler(pool)

    assert running.result(60) == sum(i * i for i in range(16))


def test_a_connection_that_breaks_before_the_loss_is_known_fails_no_call(
    pool: sky.ComputePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathering = threading.Event()

    async def gather(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        gathering.set()
        raise CommClosedError("the stream is closed")

    monkeypatch.setattr(pool.client, "gather", gather)
    with ThreadPoolExecutor() as threads:
        total = threads.submit(lambda: add(square(2), square(3)) >> pool)
        assert gathering.wait(30)
        kill_scheduler(pool)

        assert total.result(60) == 13


def test_a_kept_value_is_computed_again(pool: sky.ComputePool) -> None:
    total = add(square(2), square(3))
    kept = pool.persist(total)
    assert kept.result(60) == 13

    kill_scheduler(pool)

    assert add(kept, 1) >> pool == 14
    assert kept.result(60) == 13


def test_a_wait_for_a_kept_value_goes_on(pool: sky.ComputePool, tmp_path: Path) -> None:
    kept = pool.persist(add(square(2, tmp_path / "begun"), 1))
    wait_until(has_begun(tmp_path / "begun"))

    kill_scheduler(pool)

    assert kept.result(60) == 5


def test_a_value_that_can_not_be_computed_again_says_why(
    pool: sky.ComputePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: Any) -> Any:
        raise sky.PoolError("no room")

    kept = pool.persist(add(1, 2))
    assert kept.result(60) == 3
    monkeypatch.setattr(pool.engine.graphs, "scatter", fail)

    kill_scheduler(pool)

    with pytest.raises(sky.PoolError, match="no room"):
        kept.result(60)
    monkeypatch.undo()
    assert add(square(2), 1) >> pool == 5


def test_a_large_argument_is_sent_again(pool: sky.ComputePool) -> None:
    data = np.arange(1 << 20, dtype=np.int64)

    @sky.compute
    def total(values: Any) -> int:
        return int(values.sum())

    kept = pool.persist(total(data))
    assert kept.result(60) == data.sum()

    kill_scheduler(pool)

    assert add(kept, total(data)) >> pool == 2 * data.sum()


def test_a_generator_of_which_values_were_used_says_that_it_is_lost(pool: sky.ComputePool) -> None:
    values = count(200) >> pool
    assert next(values) == 0

    kill_scheduler(pool)

    with pytest.raises(sky.WorkerDiedError, match="lost with its worker"):
        list(values)
    assert list(count(3) >> pool) == [0, 1, 2]


def test_a_broadcast_ends_and_the_pool_is_usable(pool: sky.ComputePool, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(lambda: held(gate) @ pool)
        wait_until(lambda: len(pool.engine.busy()) == 2)
        kill_scheduler(pool)
        with pytest.raises(sky.MachineLostError, match="A broadcast is not retried"):
            running.result(60)

    gate.touch()
    assert held(gate) @ pool == ("done", "done")


@sky.compute
def train(folder: Path, epochs: int) -> int:
    """Add up the numbers of its epochs on all nodes; the first one saves the sum after each epoch."""
    state, begun = folder / "state", folder / "begun"
    first, total = map(int, state.read_text().split()) if state.exists() else (0, 0)
    for epoch in range(first, epochs):
        time.sleep(0.05)
        total += epoch
        if sky.instance_info().node == 0:
            with begun.open("a") as file:
                file.write(f"{epoch}\n")
            state.with_suffix(".part").write_text(f"{epoch + 1} {total}")
            state.with_suffix(".part").replace(state)
    return total


def test_a_training_that_is_sent_again_goes_on_from_its_checkpoint(pool: sky.ComputePool, tmp_path: Path) -> None:
    failures = []

    def train_to_the_end() -> tuple[int, ...]:
        while True:
            try:
                return train(tmp_path, 40) @ pool
            except sky.MachineLostError as exc:
                failures.append(exc)

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(train_to_the_end)
        wait_until(has_begun(tmp_path / "begun", 10))
        kill_scheduler(pool)
        totals = running.result(60)

    assert len(failures) == 1
    assert totals == (sum(range(40)),) * 2
    begun = [int(line) for line in (tmp_path / "begun").read_text().splitlines()]
    assert len(begun) <= 41  # the epoch that was not saved may run again
    assert sorted(set(begun)) == list(range(40))


def test_the_client_is_the_same_and_its_old_futures_say_what_happened(pool: sky.ComputePool) -> None:
    client, before = pool.client, pool.dashboard_link
    old = client.submit(lambda: 1)
    assert old.result(60) == 1

    kill_scheduler(pool)
    new = client.submit(lambda: 2)  # while there is no scheduler yet

    with pytest.raises(FutureCancelledError, match="the Dask scheduler was lost"):
        old.result(60)
    assert new.result(60) == 2
    assert pool.client is client
    wait_until(lambda: pool.dashboard_link != before)


def test_a_grid_search_finds_the_same(pool: sky.ComputePool) -> None:
    from sklearn.datasets import make_classification  # here: workers import what this module does
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    x, y = make_classification(200, random_state=0)
    search = GridSearchCV(LogisticRegression(), {"C": np.logspace(-3, 3, 60)}, cv=3, n_jobs=-1)
    with sky.integrations.joblib_backend(pool):
        expected = search.fit(x, y).cv_results_
        with ThreadPoolExecutor(1) as threads:
            killing = threads.submit(kill_when_busy, pool)
            found = search.fit(x, y).cv_results_
            killing.result(60)

    for name in ("mean_test_score", "rank_test_score", "split0_test_score"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_without_retries_the_pool_ends_and_says_why(tmp_path: Path) -> None:
    with sky.ComputePool(sky.Local(), display="quiet", retries=0) as pool:
        running = pool.submit(held(tmp_path / "gate"))
        wait_until(pool.engine.busy)
        kill_scheduler(pool)

        with pytest.raises(sky.PoolError, match=r"lost again and again.*\n  local: the Dask scheduler was ended"):
            running.result(60)
