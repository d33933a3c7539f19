"""Calls that feed calls: graphs, values that stay on the cluster, and what can't be one."""

from __future__ import annotations

import functools
import gc
import os
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import distributed
import numpy as np
import pytest
from tornado import iostream

import skyward as sky
from tests.waiting import wait_until


@sky.compute
def train(rate: float, ran: Path | None = None) -> dict[str, float]:
    if ran is not None:
        (ran / uuid.uuid4().hex).touch()
    return {"rate": rate}


@sky.compute
def score(model: dict[str, float], part: int, **more: Any) -> float:
    return model["rate"] * part + len(more)


@sky.compute
def total(values: Any) -> float:
    return float(sum(values.values() if isinstance(values, dict) else values))


@sky.compute
def add(a: float, b: float) -> float:
    return a + b


@sky.compute
def fail(x: object) -> float:
    raise LookupError("no such rate", x)


@sky.compute
def ones(n: int) -> np.ndarray[Any, Any]:
    return np.ones(n)


@sky.compute
def where_sum(array: np.ndarray[Any, Any]) -> tuple[int, float]:
    return os.getpid(), float(array.sum())


@sky.compute
def wait_for(path: Path, value: Any = None) -> Any:
    (path.parent / f"{path.name}-waits").touch()
    wait_until(path.exists)
    return value


@sky.compute
def value(x: Any) -> Any:
    return x


@sky.compute
def count_to(x: int) -> Iterator[int]:
    yield from range(x)


# --- dependencies -------------------------------------------------------------------------------------------


def test_a_call_gets_the_value_of_the_call_that_is_its_argument(any_pool: sky.ComputePool) -> None:
    assert score(sky.ref(train(0.5)), 4) >> any_pool == 2
    assert any_pool.submit(score(sky.ref(train(0.5)), part=4, more=1)).result() == 3


def test_a_call_that_several_need_runs_once(any_pool: sky.ComputePool, tmp_path: Path) -> None:
    model: Any = train(2, tmp_path)

    assert sky.gather(*[score(model, part) for part in range(5)]) >> any_pool == (0, 2, 4, 6, 8)

    assert len(list(tmp_path.iterdir())) == 1


def test_calls_in_lists_tuples_dicts_and_batches_are_found(any_pool: sky.ComputePool) -> None:
    one: Any = add(0, 1)

    assert total([one, 2, add(0, 3)]) >> any_pool == 6
    assert total((one, [one, 2][1])) >> any_pool == 3
    assert total({"a": one, "b": add(one, one)}) >> any_pool == 3
    assert total(sky.gather(*[add(i, one) for i in range(3)])) >> any_pool == 6
    assert total(one & add(one, 1)) >> any_pool == 3


def test_a_call_of_a_batch_that_another_needs_runs_once(any_pool: sky.ComputePool, tmp_path: Path) -> None:
    model: Any = train(2, tmp_path)

    assert (score(model, 3) & model & score(model, 4)) >> any_pool == (6, {"rate": 2}, 8)
    assert (model & train(1)) >> any_pool == ({"rate": 2}, {"rate": 1})

    assert len(list(tmp_path.iterdir())) == 2


def test_a_stream_takes_calls_that_feed_calls(any_pool: sky.ComputePool, tmp_path: Path) -> None:
    model: Any = train(2, tmp_path)
    calls = (score(model, part) if part % 2 else add(part, 0) for part in range(200))

    values = list(sky.gather(calls, stream=True) >> any_pool)

    assert values == [part * 2 if part % 2 else part for part in range(200)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_stream_lets_go_of_values_that_no_call_can_need_any_more(pool: sky.ComputePool) -> None:
    calls = (total(ones(10 + part)) for part in range(300))

    for at, found in enumerate(sky.gather(calls, stream=True) >> pool):
        assert found == 10 + at
        if at == 200:
            assert len(pool.engine.graphs.by_key) < 250  # of 2 x 300 calls


def test_a_chain_of_calls_gives_its_last_value(any_pool: sky.ComputePool) -> None:
    call: Any = add(0, 0)
    for _ in range(100):
        call = add(call, 1)

    assert call >> any_pool == 100


def test_dependencies_of_a_broadcast_run_once(any_pool: sky.ComputePool, tmp_path: Path) -> None:
    values = score(sky.ref(train(2, tmp_path)), 3) @ any_pool

    assert values == (6,) * any_pool.instance_count
    assert len(list(tmp_path.iterdir())) == 1


def test_a_broadcast_whose_dependency_fails_does_not_begin(any_pool: sky.ComputePool, tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no such rate"):
        train(fail(1), tmp_path) @ any_pool

    assert not list(tmp_path.iterdir())


def test_large_arguments_travel_beside_the_graph(any_pool: sky.ComputePool) -> None:
    array = np.ones(1_000_000)

    assert total([value(array.sum()), where_sum_only(array), where_sum_only(ones(10))]) >> any_pool == 2_000_010


@sky.compute
def where_sum_only(array: np.ndarray[Any, Any]) -> float:
    return float(array.sum())


def test_progress_counts_the_calls_of_a_graph(pool: sky.ComputePool) -> None:
    told: list[sky.TaskProgress] = []
    pool.on(sky.TaskProgress, told.append)

    total([add(i, 0) for i in range(20)]) >> pool

    wait_until(lambda: told and told[-1].done == told[-1].total and told[-1].done >= 21)


def test_progress_of_a_graph_is_told_while_it_runs(pool: sky.ComputePool, tmp_path: Path) -> None:
    told: list[sky.TaskProgress] = []
    pool.on(sky.TaskProgress, told.append)
    go = tmp_path / "go"

    future = pool.submit(value(wait_for(go, sky.ref(sky.compute(time.sleep)(0.3)))))

    wait_until(lambda: told and 1 <= told[-1].done < told[-1].total)
    go.touch()
    assert future.result() is None


PROMISED = """\
model  = train(0.1)                                                  # nothing runs yet
scores = sky.gather(*[score(model, part) for part in parts]) >> pool   # train runs once; its value goes from worker to worker
kept   = pool.persist(train(0.1))                                    # runs; the value stays on the cluster
best   = score(kept, holdout) >> pool                                # no way back to the caller in between
value  = kept.result()                                               # fetched only when wanted
"""  # noqa: E501


def test_the_promised_lines_run_as_they_are_written(any_pool: sky.ComputePool, tmp_path: Path) -> None:
    names: dict[str, Any] = {"sky": sky, "pool": any_pool, "parts": range(1, 4), "holdout": 10, "score": score}
    names["train"] = lambda rate: train(rate, tmp_path)

    exec(PROMISED, names)

    assert names["scores"] == (0.1, 0.2, pytest.approx(0.3))
    assert (names["best"], names["value"]) == (1.0, {"rate": 0.1})
    assert len(list(tmp_path.iterdir())) == 2  # once for `model`, once for `kept`


# --- failures -----------------------------------------------------------------------------------------------


def test_a_failure_names_the_call_that_needed_it(any_pool: sky.ComputePool) -> None:
    with pytest.raises(LookupError) as caught:
        score(sky.ref(train(fail(1))), 2) >> any_pool  # type: ignore[arg-type]

    assert caught.value.args == ("no such rate", 1)
    assert [note for note in caught.value.__notes__ if "needs" in note] == ["train() needs the value of fail()"]
    assert any("raised on" in note for note in caught.value.__notes__)
    assert "raise LookupError" in str(caught.value.__cause__)


def test_all_outcomes_of_a_batch_with_a_failed_dependency(any_pool: sky.ComputePool) -> None:
    calls = [add(1, 1), add(sky.ref(fail(1)), 1), add(sky.ref(add(1, 1)), 1)]

    two, error, three = sky.gather(calls, return_exceptions=True) >> any_pool

    assert (two, three) == (2, 3)
    assert isinstance(error, LookupError)


def test_a_failed_dependency_is_retried_as_it_asks(any_pool: sky.ComputePool, tmp_path: Path) -> None:
    @sky.compute(retries=2)
    def flaky() -> int:
        (tmp_path / uuid.uuid4().hex).touch()
        if len(list(tmp_path.iterdir())) < 3:
            raise ValueError("not yet")
        return 3

    assert add(sky.ref(flaky()), 1) >> any_pool == 4


def test_a_dependency_has_its_time_limit(pool: sky.ComputePool) -> None:
    sleep = sky.compute(timeout=0.2)(time.sleep)

    with pytest.raises(TimeoutError, match=r"sleep\(\) did not end within its timeout of 0.2 s"):
        value(sleep(60)) >> pool

    assert value(value(1)) >> pool == 1


def test_warnings_of_dependencies_are_issued_in_the_caller(any_pool: sky.ComputePool) -> None:
    @sky.compute
    def warn(text: str) -> int:
        warnings.warn(text, FutureWarning, stacklevel=1)
        return 1

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert add(warn("first"), warn("second")) >> any_pool == 2  # type: ignore[arg-type]
        assert value(warn("third")) @ any_pool
        assert any_pool.persist(warn("fourth")).result() == 1
        assert list(count_to(sky.ref(warn("fifth"))) >> any_pool) == [0]

    assert {str(w.message) for w in shown} >= {"first", "second", "third", "fourth", "fifth"}


def test_prints_of_dependencies_arrive(pool: sky.ComputePool) -> None:
    word = uuid.uuid4().hex

    value(sky.compute(print)(word)) >> pool

    wait_until(lambda: any(word in line for line in pool.logs()))


def test_a_worker_that_dies_in_a_graph_is_replaced(pool: sky.ComputePool, tmp_path: Path) -> None:
    @sky.compute
    def die_once(array: np.ndarray[Any, Any]) -> float:
        if not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return float(array.sum())

    assert add(sky.ref(die_once(sky.ref(ones(10)))), 1) >> pool == 11


def test_a_call_that_always_kills_its_worker_fails_its_graph(pool: sky.ComputePool) -> None:
    @sky.compute
    def die(_: object) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(sky.WorkerDiedError, match=r"die\(\) was lost with its worker process 4 times") as caught:
        add(sky.ref(die(ones(2))), 1) >> pool

    assert "add() needs the value of die()" in caught.value.__notes__
    assert add(sky.ref(add(1, 1)), 1) >> pool == 3


def test_leaving_a_stream_interrupts_its_graph(pool: sky.ComputePool, tmp_path: Path) -> None:
    go = tmp_path / "go"
    calls = [add(1, sky.ref(add(1, 1))), value(wait_for(go))]

    for found in sky.gather(iter(calls), stream=True) >> pool:
        assert found == 3
        wait_until((tmp_path / "go-waits").exists)
        break

    assert value(value(1)) @ pool.slots == (1,) * pool.total_slots  # no slot waits for the file
    assert pool.engine.graphs.running == set()


def test_cancelling_a_future_interrupts_what_it_needs(pool: sky.ComputePool, tmp_path: Path) -> None:
    future = pool.submit(value(wait_for(tmp_path / "go")))
    wait_until((tmp_path / "go-waits").exists)

    assert future.cancel()

    assert value(value(1)) @ pool.slots == (1,) * pool.total_slots


def test_nothing_of_a_graph_stays_on_the_cluster(pool: sky.ComputePool) -> None:
    total([score(sky.ref(train(1)), 1) for _ in range(3)]) >> pool

    def held(dask_scheduler: Any = None) -> list[str]:
        return [key for key in map(str, dask_scheduler.tasks) if key.startswith(("train-", "score-", "total-"))]

    wait_until(lambda: pool.client.run_on_scheduler(held) == [])


# --- beside other calls -------------------------------------------------------------------------------------


def test_graphs_and_other_calls_share_slots_one_at_a_time(pool: sky.ComputePool, tmp_path: Path) -> None:
    @sky.compute
    def alone(_: object) -> bool:
        mine = tmp_path / str(os.getpid())
        mine.touch(exist_ok=False)  # raises if another call runs in this process
        time.sleep(0.01)
        mine.unlink()
        return True

    graph = pool.submit(total([alone(alone(i)) for i in range(40)]))
    direct = [pool.submit(alone(i)) for i in range(40)]

    assert graph.result() == 40
    assert all(future.result() for future in direct)


def test_a_long_row_of_calls_does_not_hold_up_a_graph(pool: sky.ComputePool, tmp_path: Path) -> None:
    stop = tmp_path / "stop"

    @sky.compute
    def until_stopped(_: int) -> bool:
        time.sleep(0.01)
        return stop.exists()

    def calls() -> Iterator[sky.PendingCompute[bool]]:
        while not stop.exists():
            yield until_stopped(0)

    row = threading.Thread(target=lambda: list(sky.gather(calls(), stream=True) >> pool))
    row.start()
    try:
        assert add(sky.ref(add(1, 1)), 1) >> pool == 3
    finally:
        stop.touch()
        row.join()


def test_a_call_does_not_wait_behind_a_long_one_of_a_graph(pool: sky.ComputePool, tmp_path: Path) -> None:
    go = tmp_path / "go"
    graph = pool.submit(value(wait_for(go, 1)))
    wait_until((tmp_path / "go-waits").exists)

    found = [pool.submit(add(i, 1)) for i in range(2 * pool.total_slots)]

    assert [future.result() for future in found] == [i + 1 for i in range(2 * pool.total_slots)]
    go.touch()
    assert graph.result() == 1


# --- values that stay ---------------------------------------------------------------------------------------


def test_a_kept_value_is_computed_once_and_passed_on(any_pool: sky.ComputePool, tmp_path: Path) -> None:
    kept = any_pool.persist(train(2, tmp_path))

    assert score(sky.ref(kept), 3) >> any_pool == 6
    assert sky.gather(*[score(sky.ref(kept), part) for part in range(3)]) >> any_pool == (0, 2, 4)
    assert kept.result() == {"rate": 2}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_kept_value_is_a_dask_future(any_pool: sky.ComputePool) -> None:
    kept = any_pool.persist(sky.gather(add(1, 1), add(1, sky.ref(add(1, 1)))))

    assert isinstance(kept[0], distributed.Future)
    with any_pool.client.as_current():
        assert distributed.wait(kept).not_done == set()
    assert any_pool.client.gather(list(kept)) == [2, 3]
    assert any_pool.client.submit(sum, list(kept)).result() == 5


def test_dask_futures_and_delayed_values_are_arguments(any_pool: sky.ComputePool) -> None:
    future = any_pool.client.submit(pow, 2, 3)
    delayed = dask.delayed(pow)(3, 2)

    assert add(sky.ref(future), sky.ref(delayed)) >> any_pool == 17  # type: ignore[call-overload]


def test_a_kept_value_goes_when_nothing_refers_to_it(any_pool: sky.ComputePool) -> None:
    kept = any_pool.persist(ones(100))
    kept.result()
    key = kept.key

    del kept

    def is_there(dask_scheduler: Any = None) -> bool:
        return key in dask_scheduler.tasks

    wait_until(lambda: not any_pool.client.run_on_scheduler(is_there))


@pytest.mark.parametrize("way", ["run", "submit", "broadcast", "gather", "stream", "persist"])
def test_a_kept_value_goes_when_the_calls_that_used_it_have_ended(any_pool: sky.ComputePool, way: str) -> None:
    ways: dict[str, Callable[[Any], object]] = {
        "run": any_pool.run,
        "submit": lambda call: any_pool.submit(call).result(),
        "broadcast": any_pool.broadcast,
        "gather": lambda call: sky.gather(call, add(1, 1)) >> any_pool,
        "stream": lambda call: list(sky.gather(iter([call]), stream=True) >> any_pool),
        "persist": lambda call: any_pool.persist(call).result(),
    }
    gc.disable()  # which would also take what refers to itself, some time
    try:
        kept = any_pool.persist(ones(100))
        ways[way](total(kept))
        key = kept.key
        del kept

        def is_there(dask_scheduler: Any = None) -> bool:
            return key in dask_scheduler.tasks

        wait_until(lambda: not any_pool.client.run_on_scheduler(is_there), 10)
    finally:
        gc.enable()


@sky.compute
def ones_beside(n: int, others: int, here: Path) -> np.ndarray[Any, Any]:
    (here / str(os.getpid())).touch()
    wait_until(lambda: len(list(here.iterdir())) == others)  # each is made on another worker
    return np.ones(n)


@sky.compute
def total_of(arrays: list[np.ndarray[Any, Any]], more: int = 0) -> float:
    return float(sum(array.sum() for array in arrays)) + more


_passed: list[int] = []
"""Bytes of each read from and write to a connection of this process since `count_bytes`."""


def count_bytes(dask_scheduler: Any = None) -> None:
    for stream in (iostream.IOStream, iostream.SSLIOStream):
        for name in ("read_from_fd", "write_to_fd"):
            setattr(stream, name, _counted(vars(stream)[name]))


def _counted(transfer: Any) -> Any:
    @functools.wraps(transfer)
    def counted(self: Any, data: Any) -> Any:
        size = transfer(self, data)
        _passed.append(size or 0)
        return size

    return counted


def stop_counting(dask_scheduler: Any = None) -> int:
    for stream in (iostream.IOStream, iostream.SSLIOStream):
        for name in ("read_from_fd", "write_to_fd"):
            setattr(stream, name, vars(stream)[name].__wrapped__)
    size = sum(_passed)
    _passed.clear()
    return size


@contextmanager
def _traffic(pool: sky.ComputePool) -> Iterator[dict[str, int]]:
    """Count the bytes that pass through this process and the scheduler while the block runs; known after it."""
    found: dict[str, int] = {}
    pool.client.run_on_scheduler(count_bytes)
    count_bytes()
    try:
        yield found
    finally:
        found["caller"] = stop_counting()
        found["scheduler"] = pool.client.run_on_scheduler(stop_counting)


def test_a_kept_value_passes_neither_caller_nor_scheduler(pool: sky.ComputePool, tmp_path: Path) -> None:
    size, slots = 20_000_000, pool.total_slots

    with _traffic(pool) as traffic:
        kept = pool.persist(sky.gather(*[ones_beside(size // 8, slots, tmp_path) for _ in range(slots)]))
        arrays: Any = list(kept)
        found = sky.gather(*[total_of(arrays, more) for more in range(6)]) >> pool
        everywhere = total_of(arrays) @ pool
        holders = set().union(*pool.client.who_has(kept).values())
    with _traffic(pool) as control:
        pool.client.gather(kept[:1], direct=False)  # by way of the scheduler

    assert len(holders) == slots
    assert found == tuple(slots * size // 8 + more for more in range(6))  # each of values from all workers
    assert everywhere == (slots * size // 8,) * 2
    assert 0 < traffic["caller"] < size / 10
    assert 0 < traffic["scheduler"] < size / 10
    assert control["caller"] > size
    assert control["scheduler"] > 2 * size


def test_a_kept_value_that_was_lost_is_computed_again(pool: sky.ComputePool, tmp_path: Path) -> None:
    kept = pool.persist(train(2, tmp_path))
    wait_until(kept.done)
    (holder,) = next(iter(pool.client.who_has([kept]).values()))

    pool.client.run(lambda: os.kill(os.getpid(), signal.SIGKILL), workers=[holder], on_error="ignore")

    assert score(sky.ref(kept), 3) >> pool == 6
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kept_value_that_fails_raises_what_the_call_raised(any_pool: sky.ComputePool) -> None:
    kept = any_pool.persist(fail(1))

    with pytest.raises(LookupError, match="no such rate"):
        kept.result()
    with pytest.raises(LookupError, match="no such rate"):
        value(kept) >> any_pool


# --- what can't be ------------------------------------------------------------------------------------------


def test_a_call_that_needs_itself_is_refused(any_pool: sky.ComputePool) -> None:
    values: list[Any] = []
    call = total(values)
    values.append(add(sky.ref(call), 1))

    with pytest.raises(sky.SpecError, match=r"\(\) needs its own value"):
        call >> any_pool


def test_a_dependency_that_returns_a_generator_is_refused(any_pool: sky.ComputePool) -> None:
    with pytest.raises(sky.SerializationError, match=r"numbers\(\) returned a generator"):
        total(sky.compute(numbers)()) >> any_pool


def numbers() -> Any:
    return (i for i in range(3))


def test_batches_and_streams_that_cannot_be_arguments(any_pool: sky.ComputePool) -> None:
    with pytest.raises(sky.SpecError, match=r"gather\(\.\.\., stream=True\) can't be an argument"):
        total(sky.gather(add(1, 1), stream=True)) >> any_pool
    with pytest.raises(sky.SpecError, match="return_exceptions=True can't be an argument"):
        total(sky.gather([add(1, 1)], return_exceptions=True)) >> any_pool


def test_what_cannot_be_kept_is_refused(any_pool: sky.ComputePool) -> None:
    with pytest.raises(TypeError, match=r"persist\(\) takes a call or a batch"):
        any_pool.persist(sky.gather(add(1, 1), stream=True))  # type: ignore[call-overload]
    with pytest.raises(sky.SpecError, match="return_exceptions=True is invalid"):
        any_pool.persist(sky.gather([add(1, 1)], return_exceptions=True))


def test_a_value_of_another_pool_or_of_a_closed_one_is_refused(pool: sky.ComputePool, joined: sky.ComputePool) -> None:
    with sky.ComputePool("local", display="quiet") as other:
        kept = other.persist(add(1, 1))
        with pytest.raises(sky.SpecError, match=r"value\(\) can't get .* which is on another cluster"):
            value(kept) >> pool
        kept.result()

    with pytest.raises(sky.PoolError, match="its pool is closed"):
        value(kept) >> joined
    with pytest.raises(sky.PoolError, match="the value is gone: its pool is closed"):
        kept.result()


def test_a_function_that_captures_a_call_is_refused(any_pool: sky.ComputePool) -> None:
    model = train(2)

    with pytest.raises(sky.SerializationError, match="as an argument"):
        sky.compute(lambda: model + 1)() >> any_pool  # type: ignore[operator]


def test_more_calls_than_a_graph_takes_are_refused(
    any_pool: sky.ComputePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skyward.engine.graph_builder._MOST_CALLS", 10)
    call: Any = add(0, 0)
    for _ in range(10):
        call = add(call, 1)

    with pytest.raises(sky.SpecError, match="more than 10 calls feed one another"):
        call >> any_pool


def test_a_call_inside_an_object_is_found_too(any_pool: sky.ComputePool) -> None:
    assert value(Box(add(1, 1))) >> any_pool == Box(2)


class Box:
    def __init__(self, content: Any) -> None:
        self.content = content

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and self.content == other.content

    __hash__ = None  # type: ignore[assignment]
