"""A forked child and its parent's pool: every way to use it raises at once, and nothing of the child ends it."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import distributed
import pytest
from joblib import Parallel, delayed, parallel_config

import skyward as sky
from tests.waiting import wait_until

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

Work = Callable[[], Any]


def in_child(work: Work) -> str:
    """Run `work` in a forked child and return what it raised: a class and a message. Fails when the child hangs."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        said = "nothing"
        try:
            work()
        except BaseException as exc:  # all of it is told
            said = f"{type(exc).__name__}: {exc}"
            traceback.clear_frames(exc.__traceback__)
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said or "a hang"


@sky.compute
def double(x: int) -> int:
    return 2 * x


def _joblib(pool: sky.ComputePool) -> Any:
    with parallel_config("skyward", pool=pool):
        return Parallel(n_jobs=2)(delayed(abs)(i) for i in range(4))


USES: dict[str, Callable[[sky.ComputePool], Any]] = {
    ">>": lambda pool: double(1) >> pool,
    "@": lambda pool: double(1) @ pool,
    "@ slots": lambda pool: double(1) @ pool.slots,
    "&": lambda pool: (double(1) & double(2)) >> pool,
    "gather": lambda pool: sky.gather(double(1), double(2)) >> pool,
    "stream": lambda pool: list(sky.gather((double(i) for i in range(3)), stream=True) >> pool),
    "submit": lambda pool: pool.submit(double(1)),
    "map": lambda pool: list(pool.map(abs, [1])),
    "engine": lambda pool: pool.engine,
    "client": lambda pool: pool.client,
    "scale": lambda pool: pool.scale(3),
    "total_slots": lambda pool: pool.total_slots,
    "joblib": _joblib,
}


def test_a_forked_child_does_not_have_the_pools_default_client(pool: sky.ComputePool) -> None:
    assert distributed.default_client() is not None

    assert in_child(distributed.default_client).startswith("ValueError: No clients found")


@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_pool_in_a_forked_child_raises(pool: sky.ComputePool, use: str) -> None:
    assert in_child(lambda: USES[use](pool)).startswith(f"PoolError: this pool belongs to process {os.getpid()}")


def test_what_was_begun_before_the_fork_raises_in_the_child(any_pool: sky.ComputePool) -> None:
    engine, future = any_pool.engine, any_pool.submit(double(1))
    stream = sky.gather((double(i) for i in range(1000)), stream=True) >> any_pool
    assert next(stream) == 0

    assert "belongs to process" in in_child(lambda: double(1) >> any_pool)
    assert "belongs to process" in in_child(future.result)
    assert "belongs to process" in in_child(lambda: list(stream))
    assert "belongs to process" in in_child(lambda: engine.group().put(None))  # type: ignore[arg-type]
    assert list(stream) == [2 * i for i in range(1, 1000)]
    assert future.result(timeout=60) == 2


def test_a_child_that_leaves_the_block_ends_nothing() -> None:
    with (
        sky.ComputePool("local", display="quiet") as pool,
        sky.integrations.JoblibPool("local", display="quiet") as other,
    ):

        def leave() -> None:
            other.__exit__(None, None, None)
            pool.__exit__(None, None, None)

        assert in_child(leave) == "nothing"
        assert double(2) >> pool == 4
        assert double(3) >> other == 6


SCRIPT = """
import os, sys
import skyward as sky

with sky.ComputePool("local", display="quiet") as pool:
    if (pid := os.fork()) == 0:
        sys.exit(7)  # out of the block, and through all that runs at an interpreter's end
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(status, sky.compute(abs)(-1) >> pool)
"""


def test_a_child_that_exits_inside_the_block_ends_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)

    assert (done.stdout, done.returncode) == ("7 1\n", 0), done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_of_multiprocessing_raises_too(pool: sky.ComputePool) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def use() -> None:
        try:
            double(1) >> pool
        except sky.PoolError as exc:
            answers.put(str(exc))

    process = context.Process(target=use)
    process.start()
    wait_until(lambda: not process.is_alive(), timeout_s=60)

    assert "spawn" in answers.get()
    assert double(1) >> pool == 2


def test_an_executor_in_a_forked_child_takes_nothing_and_waits_for_nothing() -> None:
    with sky.Executor("local", display="quiet") as executor:
        future = executor.submit(pow, 2, 3)

        assert "PoolError" in in_child(lambda: executor.submit(pow, 2, 3))
        assert "PoolError" in in_child(lambda: list(executor.map(abs, [1])))
        assert in_child(executor.shutdown) == "nothing"

        assert future.result(timeout=60) == 8
        assert concurrent.futures.wait([executor.submit(pow, 2, 4)], timeout=60).not_done == set()
