"""Dask beside the calls of a pool: its collections, futures and primitives, and functions of `sky.compute` in it."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import distributed
import numpy as np
import pytest

import skyward as sky
from skyward.worker import interrupts
from tests.test_compute import Model
from tests.waiting import wait_until


@sky.compute
def double(x: Any) -> Any:
    return 2 * x


@sky.compute(timeout=60, retries=1)
async def later(x: int) -> int:
    await asyncio.sleep(0)
    return 3 * x


# --- functions of sky.compute in Dask -----------------------------------------------------------------------


def test_dask_runs_compute_functions(any_pool: sky.ComputePool) -> None:
    client = any_pool.client
    functions = [double, later, Model(5).scale, functools.partial(Model(7).scale), sky.compute(lambda x: -x)]

    futures = [client.submit(fn, 2) for fn in functions]

    assert client.gather(futures) == [4, 6, 10, 14, -2]
    assert client.gather(client.map(double, range(4))) == [0, 2, 4, 6]
    assert set(client.run(double, 4).values()) == {8}


def test_dask_collections_run_compute_functions(any_pool: sky.ComputePool) -> None:
    bag = db.from_sequence(range(4), npartitions=2)
    collections = [
        dask.delayed(double)(3),
        bag.map(double),
        bag.groupby(double),  # which toolz calls
        da.arange(4, chunks=2).map_blocks(double),  # which runs here once, to learn its type
    ]

    one, mapped, grouped, blocks = dask.compute(*collections, scheduler=any_pool.client)

    assert one == 6
    assert mapped == [0, 2, 4, 6]
    assert sorted(grouped) == [(2 * x, [x]) for x in range(4)]
    assert np.array_equal(blocks, [0, 2, 4, 6])


def test_a_function_in_dask_makes_calls_as_everywhere(any_pool: sky.ComputePool) -> None:
    def make(x: int) -> str:
        return repr(double(x)) + str(double.local(x))

    assert any_pool.client.submit(make, 4).result(timeout=30) == "<PendingCompute double(...)>8"


# --- Dask beside calls --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single() -> Iterator[sky.ComputePool]:
    """A pool with one slot."""
    with sky.ComputePool(provider="local", display="quiet") as pool:
        yield pool


def alone(folder: Path, x: Any) -> Any:
    """Return `x` after a moment in which nothing else may run in this worker process."""
    mark = folder / str(os.getpid())
    mark.touch(exist_ok=False)
    time.sleep(0.005)
    mark.unlink()
    return x


def test_collections_and_calls_take_turns_on_the_slots(any_pool: sky.ComputePool, tmp_path: Path) -> None:
    work = functools.partial(alone, tmp_path)
    calls = [any_pool.submit(sky.compute(work)(i)) for i in range(60)]

    array = da.arange(40, chunks=2).map_blocks(work, meta=np.array([], int)).sum()
    bag = db.from_sequence(range(20), npartitions=10).map(work).sum()
    chain = dask.delayed(work)(dask.delayed(work)(3))

    assert dask.compute(array, bag, chain, scheduler=any_pool.client) == (780, 190, 3)
    assert [call.result(60) for call in calls] == list(range(60))


def test_a_task_has_its_turn_while_calls_stream(single: sky.ComputePool) -> None:
    deadline = time.monotonic() + 60
    tasks: list[Any] = []

    def calls() -> Iterator[sky.PendingCompute[None]]:
        while not (tasks and tasks[0].done()) and time.monotonic() < deadline:
            yield sky.compute(time.sleep)(0.002)

    for count, _ in enumerate(sky.gather(calls(), stream=True) >> single):
        if count == 20:
            tasks.append(single.client.submit(pow, 2, 5))

    assert time.monotonic() < deadline
    assert tasks[0].result(30) == 32


def test_calls_and_the_caller_share_dasks_primitives(any_pool: sky.ComputePool) -> None:
    def use(go: str, i: int) -> int:
        from distributed import Event, Lock, Queue, Semaphore, Variable

        assert Event(go).wait(timeout=30)
        with Lock("lock"), Semaphore(max_leases=1, name="semaphore"):
            total = Variable("total")
            total.set(total.get(timeout=30) + i)
        Queue("queue").put(i)
        return i

    client = any_pool.client
    total, queue = distributed.Variable("total", client=client), distributed.Queue("queue", client=client)
    go = distributed.Event("go", client=client)
    total.set(0)
    calls = [any_pool.submit(sky.compute(use)("go", i)) for i in range(4)]
    go.set()

    assert sorted(queue.get(timeout=30) for _ in calls) == [0, 1, 2, 3]
    assert [call.result(30) for call in calls] == [0, 1, 2, 3]
    assert total.get() == 6
    go.clear()


def test_calls_that_wait_for_tasks_free_their_slot(single: sky.ComputePool) -> None:
    def with_client(x: int) -> Any:
        with distributed.worker_client() as client:
            return client.submit(pow, x, 2).result()

    def seceding(x: int) -> Any:
        future = distributed.get_client().submit(pow, x, 3)
        distributed.secede()
        value = future.result()
        distributed.rejoin()
        return value

    calls = [single.submit(sky.compute(fn)(x)) for x in range(2, 6) for fn in (with_client, seceding)]

    assert [call.result(60) for call in calls] == [4, 8, 9, 27, 16, 64, 25, 125]
    assert len(set(single.client.nthreads().values())) == 1


def test_each_call_may_secede(any_pool: sky.ComputePool) -> None:
    """Those of one chunk too, which would otherwise begin in a thread that has seceded already."""

    def secede(x: int) -> int:
        distributed.secede()
        return x

    assert sky.gather(*(sky.compute(secede)(i) for i in range(30))) >> any_pool == tuple(range(30))


@pytest.mark.parametrize("name", ["single", "joined"])
def test_a_call_may_be_cancelled_while_it_rejoins(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pool: sky.ComputePool = request.getfixturevalue(name)
    go, waits = tmp_path / "go", tmp_path / "waits"

    def wait_for(path: Path, begun: Path) -> None:
        begun.touch()
        while not path.exists():
            time.sleep(0.01)

    def is_interrupted() -> bool:
        return all(found.why is not None for found in interrupts._running.values())

    def rejoin() -> None:
        distributed.secede()
        wait_for(tmp_path / "task", tmp_path / "call")
        waits.touch()
        distributed.rejoin()

    call = pool.submit(sky.compute(rejoin)())
    wait_until((tmp_path / "call").exists)
    task = pool.client.submit(wait_for, go, tmp_path / "task")  # it has the thread that is to be given back
    wait_until(waits.exists)
    call.cancel()
    wait_until(lambda: all(pool.client.run(is_interrupted).values()))
    go.touch()
    task.result(30)

    assert [pool.submit(double(i)).result(30) for i in range(3)] == [0, 2, 4]


def test_what_was_scattered_is_an_argument_of_tasks(any_pool: sky.ComputePool) -> None:
    data = any_pool.client.scatter(np.arange(10), broadcast=True)

    assert any_pool.client.submit(np.sum, data).result(30) == 45
    assert double(21) >> any_pool == 42


# --- the default client -------------------------------------------------------------------------------------


def test_a_block_makes_its_client_the_default(single: sky.ComputePool) -> None:
    here = dask.delayed(os.getpid)()
    with sky.ComputePool(sky.Dask(single.client), display="quiet") as outer:
        assert distributed.default_client() is outer.client
        with sky.ComputePool(sky.Dask(single.client), display="quiet") as inner, ThreadPoolExecutor(1) as thread:
            assert distributed.default_client() is inner.client
            assert thread.submit(distributed.default_client).result() is inner.client
            assert here.compute() != os.getpid()
            assert distributed.wait(inner.client.map(double, [1, 2]), timeout=30).not_done == set()
            with dask.config.set(scheduler="sync"):
                assert here.compute() == os.getpid()
        assert distributed.default_client() is outer.client


def test_the_default_client_is_the_one_around_a_block_after_it(single: sky.ComputePool) -> None:
    before = distributed.default_client()
    pools = [sky.ComputePool(sky.Dask(single.client), display="quiet").start() for _ in range(2)]
    with distributed.Client(single.cluster, set_as_default=True) as own:
        with sky.ComputePool(sky.Dask(own), display="quiet") as pool:
            assert distributed.default_client() is pool.client
        assert distributed.default_client() is own

    assert distributed.default_client() is pools[1].client
    pools[0].close()  # not the innermost
    assert distributed.default_client() is pools[1].client
    pools[1].close()
    assert distributed.default_client() is before


def test_a_pool_that_is_not_the_current_one_has_no_default_client(single: sky.ComputePool) -> None:
    before = distributed.default_client()

    with sky.MultiPool(sky.ComputePool(sky.Dask(single.client), display="quiet")) as (pool,):
        assert pool.is_active
        assert distributed.default_client() is before
