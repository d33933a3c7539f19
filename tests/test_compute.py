"""Calls as values: operators, gather, targets, and what misuse is told."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
import pytest

import skyward as sky
from skyward.current import current_pool, enter, leave
from tests.waiting import wait_until


@sky.compute
def double(x: int) -> int:
    """Twice as much."""
    return 2 * x


@sky.compute
async def later(x: int, y: str = "y") -> str:
    await asyncio.sleep(0)
    return f"{x}{y}"


@sky.compute
def fail(text: str) -> None:
    raise KeyError(text)


@sky.compute
def node() -> int:
    info = sky.instance_info()
    assert info is not None
    return info.node


class Model:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    @sky.compute
    def scale(self, x: int) -> int:
        return self.factor * x


# --- calls --------------------------------------------------------------------------------------------------


def test_a_compute_function_keeps_name_doc_and_signature() -> None:
    assert double.__name__ == "double"
    assert double.__doc__ == "Twice as much."
    assert repr(double) == "<ComputeFunction double(x: 'int') -> 'int'>"


def test_calling_runs_nothing() -> None:
    ran = []

    pending = sky.compute(ran.append)(1)

    assert ran == []
    assert pending.args == (1,)
    assert pending.kwargs == {}
    with pytest.raises(AttributeError):
        pending.args = ()  # type: ignore[misc]


def test_repr_of_a_call_does_not_show_large_arguments() -> None:
    assert repr(sky.compute(len)(b"x" * 10_000)) == "<PendingCompute len(...)>"


def test_local_runs_here_and_awaits_async_functions() -> None:
    assert double.local(4) == 8
    assert later.local(1, y="z") == "1z"


def test_local_awaits_inside_a_running_loop_too() -> None:
    async def main() -> str:
        return later.local(1)

    assert asyncio.run(main()) == "1y"


def test_local_leaves_the_threads_event_loop() -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        assert later.local(1) == "1y"
        assert asyncio.get_event_loop() is loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_libraries_that_run_functions_run_them() -> None:
    import dask.bag

    bag = dask.bag.from_sequence([1, 2], npartitions=1)

    assert bag.map(double).compute(scheduler="sync") == [2, 4]
    assert joblib.Parallel(n_jobs=1)(joblib.delayed(double)(x) for x in (1, 2)) == [2, 4]


def test_libraries_that_transform_data_make_calls() -> None:
    import pandas as pd

    assert [call.args for call in pd.Series([1, 2]).map(double)] == [(1,), (2,)]


def test_a_call_of_a_partial_runs_what_it_wraps(pool: sky.ComputePool) -> None:
    assert sky.compute(functools.partial(double, 3))() >> pool == 6


def test_lazy_is_compute() -> None:
    assert sky.lazy is sky.compute


def test_a_compute_function_can_be_wrapped_again_with_other_options() -> None:
    assert sky.compute(retries=2)(double)(1).retries == 2  # type: ignore[arg-type]


def test_a_compute_function_pickles() -> None:
    again = cloudpickle.loads(cloudpickle.dumps(double))

    assert again.local(2) == 4


@pytest.mark.parametrize("value", [-1, True, 1.5, "3"])
def test_retries_must_be_a_count(value: Any) -> None:
    with pytest.raises(sky.SpecError, match=r"retries=.*integer >= 0") as info:
        sky.compute(retries=value)

    assert info.value.option == "retries"  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [0, -5, float("nan"), float("inf"), "1"])
def test_timeout_must_be_seconds(value: Any) -> None:
    with pytest.raises(sky.SpecError, match=r"timeout=.*seconds greater than 0"):
        sky.compute(timeout=value)


def counting(n: int) -> Iterator[int]:
    yield from range(n)


async def counting_async(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


class Counting:
    def __call__(self, n: int) -> Iterator[int]:
        yield from range(n)


GENERATORS = [sky.compute(fn) for fn in (counting, counting_async, Counting(), functools.partial(counting, 1))]


@pytest.mark.parametrize("function", GENERATORS, ids=["sync", "async", "object", "partial"])
def test_a_call_of_a_generator_function_runs_by_itself(pool: sky.ComputePool, function: Any) -> None:
    call = function(3)

    for use in (
        lambda: sky.gather(call),
        lambda: sky.gather(double(1), call),
        lambda: call & double(1),
        lambda: double(1) & call,
        lambda: sky.gather([double(1)]) & call,
        lambda: list(sky.gather([call], stream=True) >> pool),
        lambda: call @ pool,
        lambda: call @ pool.slots,
        lambda: pool.broadcast(call),
        lambda: pool.submit(call),
        lambda: list(pool.map(function, [1])),
        lambda: sky.Executor().submit(function, 1),
        lambda: sky.Executor().map(function, [1]),
    ):
        with pytest.raises(TypeError, match=r"`\w+\(...\)` is a call of a generator .*`for value in \w+\(...\) >>"):
            use()


def test_retries_of_a_generator_function_are_refused() -> None:
    with pytest.raises(sky.SpecError, match=r"retries=2 is invalid: expected 0 for a generator function"):
        sky.compute(retries=2)(counting)


def test_what_is_not_callable_is_refused() -> None:
    with pytest.raises(TypeError, match="wraps a function, not a int"):
        sky.compute(3)  # type: ignore[call-overload]


# --- running ------------------------------------------------------------------------------------------------


def test_one_call_gives_its_value(pool: sky.ComputePool) -> None:
    assert double(21) >> pool == 42
    assert later(1, y="x") >> pool == "1x"


def test_methods_can_be_computed(pool: sky.ComputePool) -> None:
    assert Model(3).scale(5) >> pool == 15


def test_a_batch_gives_a_tuple_in_order(pool: sky.ComputePool) -> None:
    assert (double(1) & later(2) & double(3)) >> pool == (2, "2y", 6)
    assert (double(1) & (double(2) & double(3))) >> pool == (2, 4, 6)
    assert ((double(1) & double(2)) & (double(3) & double(4))) >> pool == (2, 4, 6, 8)


def test_gather_takes_any_number(pool: sky.ComputePool) -> None:
    assert sky.gather() >> pool == ()
    assert sky.gather(double(1)) >> pool == (2,)
    assert sky.gather([]) >> pool == ()
    assert sky.gather(double(i) for i in range(300)) >> pool == tuple(2 * i for i in range(300))


def test_a_stream_is_an_iterator_in_order_or_as_they_end(pool: sky.ComputePool) -> None:
    ordered = sky.gather((double(i) for i in range(50)), stream=True) >> pool
    unordered = sky.gather(*(double(i) for i in range(50)), stream=True, ordered=False) >> pool

    assert next(ordered) == 0
    assert list(ordered) == [2 * i for i in range(1, 50)]
    assert sorted(unordered) == [2 * i for i in range(50)]


def test_return_exceptions_keeps_every_outcome(pool: sky.ComputePool) -> None:
    first, second, third = sky.gather(double(1), fail("a"), double(3), return_exceptions=True) >> pool

    assert (first, third) == (2, 6)
    assert isinstance(second, KeyError)
    assert second.args == ("a",)


def test_return_exceptions_works_in_streams(pool: sky.ComputePool) -> None:
    calls = (fail("x") if i == 2 else double(i) for i in range(4))

    outcomes = list(sky.gather(calls, stream=True, return_exceptions=True) >> pool)  # type: ignore[var-annotated]

    assert [type(o) for o in outcomes] == [int, int, KeyError, int]


def test_broadcast_runs_once_on_every_node_and_every_slot(pool: sky.ComputePool) -> None:
    assert node() @ pool == (0, 1)
    assert node() @ pool.slots == (0, 0, 1, 1)


def test_retries_rerun_after_the_calls_own_exception(pool: sky.ComputePool, tmp_path: Any) -> None:
    marks = tmp_path / "runs"

    @sky.compute(retries=2)
    def flaky() -> int:
        with marks.open("a") as file:
            file.write("x")
        runs = len(marks.read_text())
        if runs < 3:
            raise OSError(f"run {runs}")
        return runs

    assert flaky() >> pool == 3


def test_a_call_over_its_time_raises_a_timeout_error(pool: sky.ComputePool) -> None:
    @sky.compute(timeout=0.2)
    def forever() -> None:
        while True:
            pass

    with pytest.raises(TimeoutError, match=r"forever.*0\.2 s"):
        forever() >> pool

    assert double(1) >> pool == 2


def test_native_code_that_holds_the_interpreter_lock_has_its_time_limit(
    pool: sky.ComputePool
) -> None:
    @sky.compute(timeout=0.5)
    def hold() -> None:
        ctypes.PyDLL(None).sleep(600)

    with pytest.raises(TimeoutError, match=r"hold.*0\.5 s"):
        hold() >> pool

    assert double(1) >> pool == 2
    assert any("in hold" in line for line in pool.logs())  # where it hung


def test_a_cancelled_call_that_holds_the_interpreter_lock_frees_its_slot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("skyward.engine.transport._SILENT_S", 1.0)
    begun = tmp_path / "begun"

    @sky.compute
    def hold() -> None:
        begun.touch()
        ctypes.PyDLL(None).sleep(600)

    with sky.ComputePool("local", display="quiet") as pool:
        held = pool.submit(hold())
        wait_until(begun.exists)
        held.cancel()

        assert pool.submit(double(1)).result(timeout=60) == 2


# --- the current pool ---------------------------------------------------------------------------------------


def test_the_module_is_the_pool_of_the_innermost_block(pool: sky.ComputePool) -> None:
    class Recorder:
        def run(self, pending: Any) -> str:
            return "inner"

    inner = Recorder()
    assert double(1) >> sky == 2
    enter(inner)
    try:
        assert double(1) >> sky == "inner"
    finally:
        leave(inner)
    assert double(1) >> sky == 2


def test_threads_and_tasks_see_the_pool(pool: sky.ComputePool) -> None:
    found: list[int] = []

    plain = threading.Thread(target=lambda: found.append(double(1) >> sky))
    copied = threading.Thread(target=copy_context().run, args=(lambda: found.append(double(2) >> sky),))
    for thread in (plain, copied):
        thread.start()
        thread.join()

    async def main() -> list[int]:
        return await asyncio.gather(*(asyncio.to_thread(lambda i=i: double(i) >> sky) for i in (3, 4)))

    assert found == [2, 4]
    assert asyncio.run(main()) == [6, 8]


def test_without_a_pool_both_ways_to_get_one_are_shown() -> None:
    # In a process of its own: in this one the session's pool is active.
    code = (
        "import skyward as sky\n"
        "@sky.compute\ndef train(x): ...\n"
        "for act in (lambda: train(1) >> sky, lambda: train(1) @ sky, lambda: (train(1) & train(2)) >> sky):\n"
        "    try: act()\n"
        "    except sky.NoActivePoolError as e: print(e)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert ran.stdout.count("with sky.ComputePool(nodes=2) as pool:") == 3
    assert ran.stdout.count("@sky.pool(nodes=2)") == 3
    assert "train(...) >> sky" in ran.stdout


# --- misuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [">>", "@", "&"])
def test_a_function_that_was_not_called_is_told_so(operator: str) -> None:
    with pytest.raises(TypeError, match=r"`double` was not called: write `double\(\.\.\.\)"):
        eval(f"double {operator} target", {"double": double, "target": double(1)})


def test_a_call_has_no_truth_value() -> None:
    with pytest.raises(TypeError, match=r"`double\(\.\.\.\)` is a call that has not run.*>> pool"):
        bool(double(1))


@pytest.mark.parametrize("use", [list, tuple, lambda p: [*p]])
@pytest.mark.parametrize("pending", [double(1), double(1) & double(2), sky.gather(double(1), stream=True)])
def test_a_call_cannot_be_iterated_over(use: Any, pending: Any) -> None:
    with pytest.raises(TypeError, match=r"can't be iterated over.*>> pool"):
        use(pending)


def test_awaiting_a_call_shows_how_coroutines_do_it() -> None:
    async def main() -> None:
        await double(1)  # type: ignore[misc]

    with pytest.raises(TypeError, match=r"asyncio\.wrap_future\(pool\.submit\(double\(\.\.\.\)\)\)"):
        asyncio.run(main())


def test_forgotten_parentheses_around_a_batch_are_explained() -> None:
    with pytest.raises(TypeError, match=r"write `\(a & b\) >> pool`"):
        double(1) & 5  # type: ignore[operator]


def test_a_batch_cannot_be_broadcast() -> None:
    with pytest.raises(TypeError, match="use `@` with each of its calls"):
        (double(1) & double(2)) @ sky  # type: ignore[operator]


def test_gather_says_which_item_is_no_call() -> None:
    with pytest.raises(TypeError, match="item 1: `double` was not called"):
        sky.gather(double(1), double)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="item 0 is a int"):
        sky.gather([1, 2])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="was given a batch"):
        sky.gather(double(1) & double(2))  # type: ignore[call-overload]


def test_wrong_targets_are_told_what_is_right(pool: sky.ComputePool) -> None:
    with pytest.raises(TypeError, match="module 'asyncio' can't run calls"):
        double(1) >> asyncio
    with pytest.raises(TypeError, match=r"`sky\.pool` is a decorator"):
        double(1) >> sky.pool  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"sky\.Dask\(client\)"):
        double(1) >> pool.client
    with pytest.raises(TypeError, match=r"`double\(\.\.\.\) @ pool\.slots`"):
        double(1) >> pool.slots  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"can't run `double.*` on a int"):
        double(1) >> 3  # type: ignore[operator]


def test_targets_may_be_left_in_any_order() -> None:
    first, second = object(), object()
    enter(first)
    enter(second)

    leave(first)
    found = [current_pool()]
    thread = threading.Thread(target=Context().run, args=(lambda: found.append(current_pool()),))
    thread.start()
    thread.join()
    leave(second)

    assert found == [second, second]
    assert current_pool() not in (first, second)
