"""Calls of generator functions: values that arrive while they run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed.comm import CommClosedError

import skyward as sky
from skyward.engine import value_stream
from skyward.transfer import wire
from tests.waiting import wait_until


@sky.compute
def numbers(n: int, trace: Path | None = None) -> Iterator[int]:
    try:
        for i in range(n):
            if trace is not None:
                with trace.open("a") as file:
                    file.write(".")
            yield i
    except GeneratorExit:
        if trace is not None:
            trace.with_suffix(".closed").touch()
        raise


@sky.compute
async def async_numbers(n: int, trace: Path | None = None) -> AsyncIterator[int]:
    try:
        for i in range(n):
            await asyncio.sleep(0)
            yield i
    finally:
        if trace is not None:
            trace.with_suffix(".closed").touch()


class Counter:
    def __init__(self, start: int) -> None:
        self.start = start

    @sky.compute
    def count(self, n: int) -> Iterator[int]:
        yield from range(self.start, self.start + n)


# --- values -------------------------------------------------------------------------------------------------


def test_values_arrive_in_order(pool: sky.ComputePool) -> None:
    assert list(numbers(100) >> pool) == list(range(100))
    assert list(async_numbers(20) >> pool) == list(range(20))
    assert list(Counter(5).count(3) >> pool) == [5, 6, 7]
    assert list(numbers(0) >> pool) == []


def test_values_arrive_while_the_function_runs(pool: sky.ComputePool, tmp_path: Path) -> None:
    go = tmp_path / "go"

    @sky.compute
    def halting() -> Iterator[str]:
        yield "first"
        while not go.exists():
            time.sleep(0.01)
        yield "second"

    values = halting() >> pool

    assert next(values) == "first"
    go.touch()
    assert list(values) == ["second"]


def test_the_function_begins_before_the_first_value_is_wanted(pool: sky.ComputePool, tmp_path: Path) -> None:
    values = numbers(3, tmp_path / "trace") >> pool

    wait_until((tmp_path / "trace").exists)
    assert list(values) == [0, 1, 2]


def test_a_generator_is_a_few_values_ahead_at_most(pool: sky.ComputePool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def made() -> int:
        return trace.stat().st_size if trace.exists() else 0

    values = numbers(1000, trace) >> pool
    wait_until(lambda: made() == wire.AHEAD_VALUES)
    for taken in range(1, 100):
        assert next(values) == taken - 1
        assert made() <= taken + wire.AHEAD_VALUES
    wait_until(lambda: made() >= 99 + wire.AHEAD_VALUES // 2)
    assert made() <= 99 + wire.AHEAD_VALUES


def test_large_values_are_few_ahead_and_keep_what_they_were(pool: sky.ComputePool, tmp_path: Path) -> None:
    @sky.compute
    def arrays() -> Iterator[np.ndarray[Any, Any]]:
        array = np.zeros(wire.AHEAD_BYTES // 8)
        for i in range(5):
            array[:] = i  # the same array again
            (tmp_path / str(i)).touch()
            yield array

    values = arrays() >> pool

    first = next(values)
    assert not (tmp_path / "2").exists()
    assert first.flags.writeable
    assert [first[0], first[-1]] == [0, 0]
    assert [array[7] for array in values] == [1, 2, 3, 4]


def test_arguments_may_be_calls_and_values_on_the_cluster(pool: sky.ComputePool, tmp_path: Path) -> None:
    @sky.compute
    def start() -> int:
        return 5

    @sky.compute
    def failing() -> int:
        raise KeyError("needed")

    @sky.compute
    def count() -> int:
        return 10_000

    trace = tmp_path / "trace"

    assert list(numbers(sky.ref(pool.persist(start()))) >> pool) == [0, 1, 2, 3, 4]
    for value in numbers(sky.ref(count()), trace) >> pool:
        if value == 20:
            break
    assert trace.with_suffix(".closed").exists()
    with pytest.raises(KeyError, match="needed"):
        numbers(sky.ref(failing())) >> pool
    assert list(numbers(2) >> pool) == [0, 1]


def test_a_stream_is_no_argument_of_other_calls(pool: sky.ComputePool) -> None:
    with pytest.raises(sky.SpecError, match=r"`numbers\(...\)` is a call of a generator function"):
        sky.compute(sum)(numbers(3)) >> pool
    with pytest.raises(TypeError, match=r"`numbers\(...\)` is a call of a generator function"):
        pool.persist(numbers(3))  # type: ignore[call-overload]


def test_several_streams_run_beside_each_other(pool: sky.ComputePool) -> None:
    streams = [numbers(30) >> pool for _ in range(3)]

    assert list(zip(*streams, strict=True)) == [(i, i, i) for i in range(30)]


def test_lost_answers_are_asked_for_again(pool: sky.ComputePool, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = 0

    async def lossy(*args: Any) -> list[wire.Outcome]:
        nonlocal requests
        requests += 1
        outcomes = await fetch(*args)
        if requests % 2:
            raise CommClosedError("lost on the way")
        return outcomes

    fetch = pool.engine._transport.values
    monkeypatch.setattr(pool.engine._transport, "values", lossy)
    monkeypatch.setattr(value_stream, "_AGAIN_S", 0.0)

    assert list(numbers(100) >> pool) == list(range(100))
    assert requests > 10


def test_local_iterates_here() -> None:
    async def in_a_loop() -> list[int]:
        return list(async_numbers.local(3))

    assert list(numbers.local(3)) == [0, 1, 2]
    assert list(async_numbers.local(3)) == [0, 1, 2]
    assert asyncio.run(in_a_loop()) == [0, 1, 2]


def test_prints_and_warnings_of_a_generator_arrive(pool: sky.ComputePool) -> None:
    @sky.compute
    def chatty() -> Iterator[int]:
        print("printed on the way")
        warnings.warn("warned on the way", FutureWarning, stacklevel=1)
        yield 1
        yield 2

    values = chatty() >> pool

    with pytest.warns(FutureWarning, match="warned on the way"):
        assert next(values) == 1
    assert list(values) == [2]
    assert any("printed on the way" in line for line in pool.logs())


# --- the end ------------------------------------------------------------------------------------------------


def test_an_exception_is_raised_after_the_values_before_it(pool: sky.ComputePool) -> None:
    @sky.compute
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("three")

    values = failing() >> pool

    assert [next(values), next(values)] == [1, 2]
    with pytest.raises(KeyError, match="three") as info:
        next(values)
    assert "in failing" in str(info.value.__cause__)


def test_a_value_that_does_not_pickle_is_named(pool: sky.ComputePool) -> None:
    @sky.compute
    def locks() -> Iterator[Any]:
        yield 1
        yield threading.Lock()

    values = locks() >> pool

    assert next(values) == 1
    with pytest.raises(sky.SerializationError, match=r"locks\(\) yielded a _thread.lock, which can't be sent back"):
        next(values)


@pytest.mark.parametrize("function", [numbers, async_numbers], ids=["sync", "async"])
def test_leaving_the_loop_closes_the_generator_there(pool: sky.ComputePool, tmp_path: Path, function: Any) -> None:
    for value in function(10_000, tmp_path / "trace") >> pool:
        if value == 20:
            break

    assert (tmp_path / "trace.closed").exists()
    assert list(function(3) >> pool) == [0, 1, 2]


def test_closing_the_iterator_closes_the_generator_there(pool: sky.ComputePool, tmp_path: Path) -> None:
    values: Any = numbers(10_000, tmp_path / "trace") >> pool
    next(values)

    values.close()

    assert (tmp_path / "trace.closed").exists()
    with pytest.raises(StopIteration):
        next(values)


def test_an_iterator_that_is_never_read_holds_no_slot(pool: sky.ComputePool) -> None:
    for _ in range(pool.total_slots + 1):
        del_me = numbers(10_000) >> pool
        del del_me

    assert sky.gather(*(sky.compute(abs)(-i) for i in range(8))) >> pool == tuple(range(8))


def test_a_generator_that_computes_is_interrupted_when_it_is_closed(pool: sky.ComputePool, tmp_path: Path) -> None:
    @sky.compute
    def stuck() -> Iterator[int]:
        yield 1
        (tmp_path / "computes").touch()
        try:
            time.sleep(1000)
        finally:
            (tmp_path / "finally").touch()
        yield 2

    values: Any = stuck() >> pool
    next(values)
    wait_until((tmp_path / "computes").exists)

    values.close()

    assert (tmp_path / "finally").exists()


def test_a_stream_holds_its_slot_until_it_ends() -> None:
    with sky.ComputePool(display="quiet") as pool:
        values = numbers(100) >> pool
        next(values)

        other = pool.submit(sky.compute(abs)(-1))
        assert not other.done()
        assert pool.engine.idle_since() >= time.monotonic() - 1
        assert list(values) == list(range(1, 100))

        assert other.result(30) == 1


def test_a_time_limit_counts_the_function_and_not_its_consumer(pool: sky.ComputePool, tmp_path: Path) -> None:
    limit = 0.5

    @sky.compute(timeout=limit)
    def limited() -> Iterator[int]:
        for i in range(20):
            (tmp_path / "begun").touch()
            yield i
        time.sleep(1000)

    values = limited() >> pool
    wait_until((tmp_path / "begun").exists)
    threading.Event().wait(2 * limit)  # the consumer's time, which is what this is about

    assert [next(values) for _ in range(20)] == list(range(20))
    with pytest.raises(TimeoutError, match=r"limited\(\) did not end within its timeout of 0.5 s"):
        next(values)


def test_a_lost_worker_ends_a_stream_with_an_error(tmp_path: Path) -> None:
    @sky.compute
    def identity() -> Iterator[int]:
        (tmp_path / str(os.getpid())).touch()
        yield os.getpid()
        time.sleep(1000)

    with sky.ComputePool(display="quiet") as pool:
        values = identity() >> pool
        os.kill(next(values), signal.SIGKILL)

        with pytest.raises(sky.WorkerDiedError, match=r"identity\(\) was lost .* first 1 values; it is not run"):
            next(values)
        assert len(list(tmp_path.iterdir())) == 1
        assert list(numbers(3) >> pool) == [0, 1, 2]


def test_a_generator_runs_again_if_it_was_lost_before_its_first_value(pool: sky.ComputePool, tmp_path: Path) -> None:
    @sky.compute
    def second_time() -> Iterator[int]:
        if not (tmp_path / "first").exists():
            (tmp_path / "first").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield 1

    assert list(second_time() >> pool) == [1]


def test_closing_the_pool_ends_its_streams() -> None:
    with sky.ComputePool(display="quiet") as pool:
        values = numbers(100) >> pool
        next(values)

    with pytest.raises(sky.PoolError, match="the pool is closed"):
        next(values)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused(pool: sky.ComputePool) -> None:
    values = numbers(100) >> pool
    next(values)

    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            try:
                next(values)
            except sky.PoolError:
                os._exit(7)
        os._exit(1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert list(values) == list(range(1, 100))


def test_ctrl_c_closes_the_generator_there(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import pathlib, signal, sys, threading, time
        import skyward as sky

        @sky.compute
        def ticks(trace):
            yield 1
            try:
                time.sleep(1000)
            finally:
                trace.touch()
            yield 2

        if __name__ == "__main__":
            trace = pathlib.Path(sys.argv[1])
            with sky.ComputePool(display="quiet") as pool:
                values = ticks(trace) >> pool
                next(values)
                main = threading.main_thread().ident
                threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT]).start()
                try:
                    next(values)
                except KeyboardInterrupt:
                    print("interrupted", trace.exists())
        """)
    )

    ran = subprocess.run([sys.executable, script, tmp_path / "trace"], capture_output=True, text=True, timeout=120)

    assert ran.stdout == "interrupted True\n", ran.stderr


# --- what a generator can't do ------------------------------------------------------------------------------


def test_a_plain_function_that_returns_a_generator_is_told_what_to_do(pool: sky.ComputePool) -> None:
    @sky.compute
    def returning() -> Iterator[int]:
        return (i for i in range(3))

    with pytest.raises(sky.SerializationError, match=r"returned a generator.*Decorate the generator function itself"):
        returning() >> pool
