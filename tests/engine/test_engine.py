"""The engine's own promises: chunks, groups, limits, the store."""

from __future__ import annotations

import functools
import pickle
import random
import threading
import time
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import skyward as sky
from skyward.engine import Call, broadcast, run
from skyward.engine.estimates import Estimates
from skyward.engine.roster import Roster
from skyward.engine.store import Store
from skyward.integrations.frameworks import Distributed
from skyward.transfer import pickling
from skyward.transfer.wire import INTERRUPT, Isolation, Slot
from tests.waiting import wait_until


def square(x: int) -> int:
    return x * x


# --- chunks -------------------------------------------------------------------------------------------------


@given(
    seconds=st.none() | st.floats(0, 1000),
    remaining=st.integers(1, 10**7),
    slots=st.integers(1, 4096),
)
def test_a_chunk_holds_at_least_one_call_and_not_much_more_than_its_time(
    seconds: float | None, remaining: int, slots: int
) -> None:
    estimates = Estimates()
    if seconds is not None:
        estimates.observe("f", seconds, 1)

    size = estimates.chunk_size("f", remaining, slots)

    assert size >= 1
    if seconds is None:
        assert size <= 16
    elif size > 1:
        assert size * seconds <= Estimates.TARGET_S * 1.001


@given(seconds=st.floats(0.02, 100), slots=st.integers(1, 64), count=st.integers(1, 2000))
def test_long_calls_are_spread_over_all_slots(seconds: float, slots: int, count: int) -> None:
    estimates = Estimates()
    estimates.observe("f", seconds, 1)

    size = estimates.chunk_size("f", count, slots)

    assert size <= max(1, count // slots)


def test_many_short_calls_become_few_tasks(pool: sky.ComputePool) -> None:
    sent = 0
    engine = pool.engine
    send = engine.dispatcher._send

    def count(*chunk: Any) -> None:
        nonlocal sent
        sent += 1
        send(*chunk)

    engine.dispatcher._send = count  # type: ignore[method-assign]
    try:
        assert len(sky.gather(*(sky.compute(square)(i) for i in range(5000))) >> pool) == 5000
    finally:
        engine.dispatcher._send = send  # type: ignore[method-assign]

    assert sent < 500


def test_a_slow_call_among_fast_ones_does_not_hold_them_back(pool: sky.ComputePool) -> None:
    def work(i: int) -> int:
        time.sleep(1.5 if i == 0 else 0)
        return i

    stream = sky.gather((sky.compute(work)(i) for i in range(200)), stream=True, ordered=False) >> pool

    order = list(stream)
    assert sorted(order) == list(range(200))
    assert order.index(0) > 150  # some may share its chunk


# --- what changes between two calls of one stream -----------------------------------------------------------


def largest(a: Any, scale: int = 1) -> float:
    return scale * float(np.max(a))


def changing(array: Any, make: Any) -> Iterator[Any]:
    for i in range(5):
        array[:] = i
        yield make(array)


@pytest.mark.parametrize("size", [300_000, 1_000_000])  # compared as a whole, and by samples
@pytest.mark.parametrize(
    "make",
    [
        lambda a: sky.compute(largest)(a),
        lambda a: sky.compute(largest)(a=a),
        lambda a: sky.compute(lambda d: largest(d["x"][0]))({"x": [a]}),
        lambda a: sky.compute(largest)(a[::-1]),
        lambda a: sky.compute(largest)(pd.DataFrame({"x": a}, copy=False)),
        lambda a: sky.compute(functools.partial(largest, a))(),
    ],
    ids=["argument", "keyword", "nested", "view", "pandas", "partial"],
)
def test_an_array_changed_in_place_arrives_as_it_was_at_each_call(pool: sky.ComputePool, make: Any, size: int) -> None:
    stream = sky.gather(changing(np.zeros(size), make), stream=True) >> pool

    assert list(stream) == [0, 1, 2, 3, 4]


def test_a_loop_over_a_stream_may_change_arrays_of_calls_still_to_come(
    pool: sky.ComputePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_window", lambda *_: 1)  # a call is sent when the value before it has been taken
    array = np.zeros(300_000)
    calls = [sky.compute(largest)(array) for _ in range(4)]
    values = []
    for value in sky.gather(calls, stream=True) >> pool:
        values.append(value)
        array[:] = len(values)

    assert values == [0, 1, 2, 3]


def test_a_callable_arrives_with_its_state_at_each_call(pool: sky.ComputePool) -> None:
    class Scale:
        factor = 0

        def times(self, x: int) -> int:
            return self.factor * x

    scale = Scale()
    times = sky.compute(scale.times)

    def calls() -> Iterator[Any]:
        for i in range(5):
            scale.factor = i
            yield times(2)

    assert list(sky.gather(calls(), stream=True) >> pool) == [0, 2, 4, 6, 8]


def test_large_arguments_do_not_leave_slots_idle(pool: sky.ComputePool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "_AHEAD_BYTES", 1 << 20)

    def meet(array: Any, i: int) -> int:
        (tmp_path / str(i)).touch()
        wait_until(lambda: len(list(tmp_path.iterdir())) >= 4)
        return i

    calls = (sky.compute(meet)(np.full(200_000, i), i) for i in range(4))

    assert list(sky.gather(calls, stream=True) >> pool) == [0, 1, 2, 3]


# --- groups -------------------------------------------------------------------------------------------------


def test_a_group_never_runs_more_than_its_limit(pool: sky.ComputePool, tmp_path: Path) -> None:
    def work(i: int) -> int:
        mark = tmp_path / str(i)
        mark.touch()
        running = len(list(tmp_path.iterdir()))
        time.sleep(0.02)
        mark.unlink()
        return running

    group = pool.engine.group(limit=2)
    futures = [pool.engine.submit(Call(work, (i,), alone=True), group=group) for i in range(30)]

    assert max(f.result(timeout=60) for f in futures) == 2


def test_cancelling_a_group_leaves_others_alone(pool: sky.ComputePool) -> None:
    engine = pool.engine
    one, other = engine.group(limit=2), engine.group(limit=2)
    stuck = [engine.submit(Call(time.sleep, (60,), alone=True), group=one) for _ in range(8)]
    fine = [engine.submit(Call(square, (i,), alone=True), group=other) for i in range(20)]

    one.cancel()

    assert [f.result(timeout=60) for f in fine] == [i * i for i in range(20)]
    for future in stuck:
        with pytest.raises(BaseException) as info:
            future.result(timeout=30)
        assert type(info.value).__name__ == "CancelledError"


def test_only_the_worker_that_runs_a_cancelled_call_is_asked_to_stop_it(
    pool: sky.ComputePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = pool.engine._transport
    asked: list[str] = []
    send = transport._send

    async def note(address: str, op: str, *args: Any, **what: Any) -> Any:
        if op == INTERRUPT:
            asked.append(address)
        return await send(address, op, *args, **what)

    monkeypatch.setattr(transport, "_send", note)
    future = pool.submit(sky.compute(time.sleep)(60))
    wait_until(future.running)
    future.cancel()

    wait_until(lambda: not pool.engine.busy())
    assert len(asked) == 1


@pytest.fixture
def asked(pool: sky.ComputePool, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, ...]]:
    """Which workers are asked, by each request to several. All: an empty tuple."""
    found: set[tuple[str, ...]] = set()
    run = pool.client._run

    async def note(*args: Any, workers: list[str] | None = None, **options: Any) -> Any:
        found.add(tuple(sorted(workers or ())))
        return await run(*args, workers=workers, **options)

    monkeypatch.setattr(pool.client, "_run", note)
    return found


def test_a_broadcast_asks_only_the_worker_of_a_cancelled_call(
    pool: sky.ComputePool, asked: set[tuple[str]], tmp_path: Path
) -> None:
    @sky.compute
    def work() -> None:
        (tmp_path / "begun").touch()
        time.sleep(60)

    sky.compute(int)() @ pool  # which asks the workers of calls that were cancelled before
    asked.clear()
    future = pool.submit(work())
    wait_until((tmp_path / "begun").exists)
    (sent,) = pool.engine.dispatcher.chunks.values()
    future.cancel()
    wait_until(lambda: not pool.engine.busy())

    sky.compute(int)() @ pool

    assert asked == {(sent.address,)}


def test_the_end_of_a_job_is_told_only_to_its_workers(pool: sky.ComputePool, asked: set[tuple[str]]) -> None:
    addresses = sky.compute(lambda: distributed.get_worker().address)() @ pool

    sky.compute(Distributed(square, Isolation("tests.plain_setup", {}, ())))(1) @ pool

    assert asked == {tuple(sorted(addresses))}


def test_a_chunk_carries_less_than_10_kb_about_a_thousand_slots(pool: sky.ComputePool) -> None:
    from skyward.worker import runtime

    numbers = random.Random(1)
    hosts = [f"172.31.{numbers.randrange(256)}.{numbers.randrange(256)}" for _ in range(125)]
    roster = Roster(
        pool.engine.loop,
        lambda: [Slot(f"tls://{hosts[i // 8]}:{numbers.randrange(32768, 61000)}", i // 8, i % 8) for i in range(1000)],
        pool_id="pool", expected=lambda: 1000, alive=None, wait_for_worker=None, is_needed=lambda: False,
        head_port=29500, accelerator=None, accelerators_per_node=0, parts_per_node=1,
    )  # fmt: skip

    roster.read()

    assert len(roster.pickled_layout) < 10_000
    assert runtime._load_layout(roster.pickled_layout) == roster.layout


def test_a_chunk_that_is_interrupted_before_it_begins_does_not_run() -> None:
    from skyward.transfer.wire import Chunk, Kind, Layout, WireCall
    from skyward.worker import interrupts, runtime

    layout = zlib.compress(pickling.dumps(Layout("pool", (), "", 0))[0])
    chunk = Chunk("early-key", (), [WireCall(0, b"", ())], layout, None)

    assert interrupts.interrupt(["early-key"]) == 0
    outcomes = runtime.run_batch(chunk)

    assert [o.kind for o in outcomes.items] == [Kind.CANCELLED]


def test_groups_are_served_in_turn(pool: sky.ComputePool) -> None:
    many = pool.engine.group()
    long = [pool.engine.submit(Call(time.sleep, (0.05,), alone=True), group=many) for _ in range(400)]

    assert pool.engine.submit(Call(square, (4,))).result(timeout=60) == 16
    assert not long[-1].done()
    many.cancel()


def test_blocking_calls_from_the_loops_own_thread_are_refused(pool: sky.ComputePool) -> None:
    async def block() -> None:
        sky.compute(square)(1) >> pool

    import asyncio

    future = asyncio.run_coroutine_threadsafe(block(), pool.client.loop.asyncio_loop)
    with pytest.raises(RuntimeError, match="can't be made from the thread of its event loop"):
        future.result(timeout=30)


def test_callbacks_may_submit_more(pool: sky.ComputePool) -> None:
    results: list[int] = []
    done = threading.Event()

    def again(future: Any) -> None:
        results.append(future.result())
        if len(results) < 5:
            pool.submit(sky.compute(square)(len(results))).add_done_callback(again)
        else:
            done.set()

    pool.submit(sky.compute(square)(0)).add_done_callback(again)

    assert done.wait(60)
    assert results == [0, 1, 4, 9, 16]


def test_many_threads_share_one_pool(pool: sky.ComputePool) -> None:
    found: dict[int, tuple[int, ...]] = {}

    def ask(k: int) -> None:
        found[k] = sky.gather(*(sky.compute(square)(i + k) for i in range(50))) >> pool

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)

    assert found == {k: tuple((i + k) ** 2 for i in range(50)) for k in range(8)}


# --- the store ----------------------------------------------------------------------------------------------


def test_equal_buffers_are_kept_once_and_unused_ones_make_room(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_bytes=3 << 20)
    first = store.put(memoryview(b"a" * (2 << 20)))
    same = store.put(memoryview(b"a" * (2 << 20)))
    other = store.put(memoryview(b"b" * (2 << 20)))

    assert first == same
    assert store.writes == 2
    assert Path(str(first.path)).stat().st_size == 2 << 20

    store.release((first,))
    assert Path(str(first.path)).exists()  # one use is left
    store.release((same,))
    assert Path(str(first.path)).exists()  # 2 MB of 3
    store.release((other,))
    assert not Path(str(first.path)).exists()
    assert Path(str(other.path)).exists()
    store.close()
    assert list(tmp_path.iterdir()) == []


# --- pickling -----------------------------------------------------------------------------------------------


# Dask's threads of the pool that other tests keep draw random numbers meanwhile, which hypothesis takes for ours.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
@given(st.recursive(st.none() | st.integers() | st.text() | st.floats(allow_nan=False), st.lists, max_leaves=20))
def test_plain_data_survives(value: Any) -> None:
    data, buffers = pickling.dumps(value)

    assert buffers == []
    assert pickling.loads(data) == value


def test_only_large_buffers_leave_the_pickle() -> None:
    small, large = np.ones(10), np.ones(1 << 18)

    data, buffers = pickling.dumps([small, large])

    assert [b.raw().nbytes for b in buffers] == [large.nbytes]
    assert len(data) < 2000
    np.testing.assert_array_equal(pickling.loads(data, buffers)[1], large)


def test_what_was_pickled_is_not_kept_alive() -> None:
    array = np.ones(10)
    gone = weakref.ref(array)

    pickling.dumps([array])
    del array

    assert gone() is None


def test_modules_of_site_packages_travel_by_name() -> None:
    data, _ = pickling.dumps(np.linalg.norm)

    assert len(data) < 200
    assert pickle.loads(data) is np.linalg.norm


# --- broadcasts ---------------------------------------------------------------------------------------------


def test_a_broadcast_waits_for_a_machine_however_long_none_is_left(
    pool: sky.ComputePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "RESTART_S", 0.5)
    engine, nodes = pool.engine, pool.cluster._nodes

    def set_nodes(present: set[int]) -> None:
        pool.cluster._nodes = present
        engine._read_roster()

    with ThreadPoolExecutor(1) as threads:
        engine.loop.call(lambda: set_nodes(set()), timeout_s=30)
        try:
            running = threads.submit(lambda: sky.compute(square)(3) @ pool)
            wait_until(lambda: engine._broadcaster.is_busy)
            with pytest.raises(TimeoutError):
                running.result(2 * broadcast.RESTART_S)
        finally:
            engine.loop.call(lambda: set_nodes(nodes), timeout_s=30)

        assert running.result(60) == (9, 9)
