"""A pool is joblib's default in all threads while its block is open."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import joblib
import pytest
from joblib import Parallel, delayed, parallel_config

import skyward as sky
from skyward.integrations import joblib_backend


@pytest.fixture(scope="module")
def other() -> Iterator[sky.ComputePool]:
    with sky.ComputePool("local", concurrency=2, display="quiet") as pool:
        yield pool


def slots(pool: sky.ComputePool) -> set[int]:
    return set(sky.compute(os.getpid)() @ pool.slots)


def used(**options: Any) -> set[int]:
    """Return the processes that joblib runs tasks in."""
    return set(Parallel(**options)(delayed(os.getpid)() for _ in range(8)))


def in_thread(fn: Callable[[], Any]) -> Any:
    """Run `fn` in a thread that knows nothing of the caller's context."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(contextvars.Context().run, fn).result(timeout=60)


def in_asyncio(fn: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return await asyncio.to_thread(fn)

    return asyncio.run(main())


@pytest.mark.parametrize("run", [in_thread, in_asyncio])
def test_other_threads_use_the_pool_as_its_own_thread_does(
    pool: sky.ComputePool, run: Callable[[Callable[[], Any]], Any]
) -> None:
    def found() -> Any:
        places = used(), used(n_jobs=2), used(n_jobs=2, prefer="threads"), used(n_jobs=1)
        return [p <= workers for p in places], joblib.effective_n_jobs(None), joblib.effective_n_jobs(-2)

    workers = slots(pool)
    with joblib_backend(pool):
        here = found()
        there = run(found)

    assert here == there == ([True, True, True, False], 4, 3)
    assert run(lambda: joblib.effective_n_jobs(None)) == 1


def test_a_threads_own_configuration_comes_first(pool: sky.ComputePool) -> None:
    def found() -> tuple[set[int], int, bool]:
        with parallel_config("threading", n_jobs=2):
            places = used()
        with parallel_config(n_jobs=3):
            return places, joblib.effective_n_jobs(None), used() <= workers

    workers = slots(pool)
    with joblib_backend(pool):
        assert in_thread(found) == ({os.getpid()}, 3, True)


def test_the_innermost_block_of_the_context_wins_then_the_process_one(
    pool: sky.ComputePool, other: sky.ComputePool
) -> None:
    outer, inner = slots(pool), slots(other)

    with joblib_backend(pool):
        context = contextvars.copy_context()
        with joblib_backend(other):
            assert used() <= inner
            assert in_thread(used) <= inner
            assert in_thread(lambda: context.run(used)) <= outer
            late = contextvars.copy_context()
        assert used() <= outer
        assert in_thread(used) <= outer
        assert in_thread(lambda: late.run(used)) <= outer  # the block that it was made in has ended


def test_blocks_may_end_in_any_order(pool: sky.ComputePool, other: sky.ComputePool) -> None:
    first, second = joblib_backend(pool), joblib_backend(other)
    first.__enter__()
    second.__enter__()

    first.__exit__(None, None, None)
    assert used() | in_thread(used) <= slots(other)
    second.__exit__(None, None, None)
    assert used() | in_thread(used) == {os.getpid()}


def test_a_block_may_end_in_another_thread(pool: sky.ComputePool, other: sky.ComputePool) -> None:
    workers = slots(pool)
    with joblib_backend(pool):
        block = joblib_backend(other)
        block.__enter__()
        in_thread(lambda: block.__exit__(None, None, None))
        assert used() | in_thread(used) <= workers
    assert joblib.effective_n_jobs(None) == in_thread(lambda: joblib.effective_n_jobs(None)) == 1
    assert used(n_jobs=1) | used() == {os.getpid()}


def test_a_thread_that_could_mean_several_pools_is_told_so(pool: sky.ComputePool, other: sky.ComputePool) -> None:
    opened, may_end = threading.Event(), threading.Event()

    def hold(pool: sky.ComputePool) -> bool:
        with joblib_backend(pool):
            opened.set()
            may_end.wait(60)
            return used() <= slots(pool)

    with ThreadPoolExecutor(1) as executor, joblib_backend(pool):
        for held in (pool, other):
            opened.clear()
            may_end.clear()
            running = executor.submit(contextvars.Context().run, hold, held)
            assert opened.wait(60)
            try:
                assert used() <= slots(pool)
                if held is pool:
                    assert in_thread(used) <= slots(pool)
                else:
                    with pytest.raises(sky.NoActivePoolError, match="belongs to none of them"):
                        in_thread(used)
            finally:
                may_end.set()
            assert running.result(60)


def test_an_iterable_of_tasks_uses_the_pool_of_its_call(pool: sky.ComputePool, other: sky.ComputePool) -> None:
    found: list[set[int]] = []

    def tasks() -> Iterator[Any]:
        for i in range(40):
            found.append(used(n_jobs=2))
            yield delayed(abs)(i)

    with joblib_backend(pool):
        context = contextvars.copy_context()
        with joblib_backend(other):
            assert in_thread(lambda: context.run(Parallel(n_jobs=2), tasks())) == list(range(40))

    assert set().union(*found) <= slots(pool)


def test_results_may_be_read_in_another_thread(pool: sky.ComputePool) -> None:
    def call() -> Any:
        return Parallel(return_as="generator")(delayed(abs)(i) for i in range(30))

    with joblib_backend(pool):
        results = call()
        assert in_thread(lambda: list(results)) == list(range(30))
        assert list(in_thread(call)) == list(range(30))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_does_not_use_its_parents_pool(pool: sky.ComputePool) -> None:
    reading, writing = os.pipe()

    with joblib_backend(pool):
        child = os.fork()
        if child == 0:
            try:
                os.write(writing, str(used() == {os.getpid()}).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reading, 10) == b"True"
        assert used() <= slots(pool)
    os.close(reading)
    os.close(writing)
