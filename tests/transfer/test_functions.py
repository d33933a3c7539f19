"""Each call gets its function as it was sent, whatever earlier calls have done to theirs."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from joblib import Parallel, delayed

import skyward as sky
from skyward.engine.calls import Call
from skyward.engine.packer import Packer
from skyward.engine.sources import Sources
from skyward.engine.store import Store
from skyward.transfer import pickling
from skyward.transfer.functions import is_constant

CALLS = 12  # more than slots: each worker has several


def in_main(source: str) -> Any:
    """Return `fn` of a program: its functions travel by value, with the globals that they use."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(source, names)
    return names["fn"]


class Simulation:
    def __init__(self) -> None:
        self.rng = random.Random(0)
        self.count = 0

    def draw(self, i: int) -> float:
        return self.rng.random()

    def __call__(self, i: int) -> int:
        self.count += 1
        return self.count

    @sky.compute
    def drawn(self, i: int) -> float:
        return self.rng.random()


def closure_of_list() -> Callable[[int], int]:
    seen: list[int] = []

    def fn(i: int) -> int:
        seen.append(i)
        return len(seen)

    return fn


def counter() -> Callable[[int], int]:
    count = 0

    def fn(i: int) -> int:
        nonlocal count
        count += 1
        return count

    return fn


def generator() -> Callable[[int], float]:
    draw = random.Random(0).random
    return lambda i: draw()


def mutable_default() -> Callable[[int], int]:
    def fn(i: int, seen: list[int] = []) -> int:  # noqa: B006 - that is what this is about
        seen.append(i)
        return len(seen)

    return fn


def keyword_default() -> Callable[[int], int]:
    def fn(i: int, *, seen: set[int] = set()) -> int:  # noqa: B006
        seen.add(len(seen))
        return len(seen)

    return fn


def partial_of_dict() -> Callable[[int], int]:
    def fn(seen: dict[int, int], i: int) -> int:
        seen[len(seen)] = i
        return len(seen)

    return functools.partial(fn, {})


def through_another() -> Callable[[int], int]:
    fn = closure_of_list()
    return lambda i: fn(i)


ATTRIBUTE = """
def fn(i):
    fn.count = getattr(fn, "count", 0) + 1
    return fn.count
"""
GLOBAL_LIST = """
seen = []
def fn(i):
    seen.append(i)
    return len(seen)
"""
GLOBAL_COUNTER = """
count = 0
def fn(i):
    global count
    count += 1
    return count
"""
THROUGH_GLOBALS = """
count = 0
def fn(i):
    globals()["count"] += 1
    return count
"""
CLASS = """
class Counter:
    count = 0
def fn(i):
    Counter.count += 1
    return Counter.count
"""

STATEFUL: dict[str, Callable[[], Callable[[int], Any]]] = {
    "bound method": lambda: Simulation().draw,
    "callable object": Simulation,
    "closure of a list": closure_of_list,
    "counter": counter,
    "random numbers": generator,
    "mutable default": mutable_default,
    "keyword default": keyword_default,
    "partial": partial_of_dict,
    "through another function": through_another,
    "attribute": lambda: in_main(ATTRIBUTE),
    "global list": lambda: in_main(GLOBAL_LIST),
    "global counter": lambda: in_main(GLOBAL_COUNTER),
    "through globals()": lambda: in_main(THROUGH_GLOBALS),
    "class": lambda: in_main(CLASS),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_call_sees_nothing_that_earlier_calls_left(pool: sky.ComputePool, name: str) -> None:
    fn, call = STATEFUL[name](), sky.compute(STATEFUL[name]())
    first = STATEFUL[name]()(0)

    assert [f.result(timeout=60) for f in [pool.submit(call(0)) for _ in range(CALLS)]] == [first] * CALLS
    assert sky.gather(*(call(0) for _ in range(CALLS))) >> pool == (first,) * CALLS
    assert fn(0) == first  # and nothing came back to here


def test_a_compute_method_has_its_object_as_it_was_sent(pool: sky.ComputePool) -> None:
    simulation = Simulation()
    first = Simulation().draw(0)

    assert sky.gather(*(simulation.drawn(i) for i in range(CALLS))) >> pool == (first,) * CALLS


def test_parallel_sends_an_object_with_each_batch(pool: sky.ComputePool) -> None:
    simulation = Simulation()
    first = Simulation().draw(0)

    with sky.integrations.joblib_backend(pool):
        values = Parallel(n_jobs=2, batch_size=1)(delayed(simulation.draw)(i) for i in range(CALLS))

    assert values == [first] * CALLS


def test_on_a_joined_cluster_calls_see_nothing_of_earlier_ones(joined: sky.ComputePool) -> None:
    for make in (counter, closure_of_list, lambda: Simulation().draw):
        first = make()(0)
        assert sky.gather(*(sky.compute(make())(0) for _ in range(3))) >> joined == (first,) * 3
        call = sky.compute(make())
        assert sky.gather(*(call(0) for _ in range(3))) >> joined == (first,) * 3


# --- which functions calls share ----------------------------------------------------------------------------


def constant_closure() -> Callable[[int], float]:
    factor, names = 2, ("a", frozenset({1}))

    def fn(x: int) -> float:
        record = Simulation  # by name, where its module can be imported
        return math.sqrt(factor * x) + len(names) + (record is not None)

    return fn


HELPER = """
import math
SCALE = 2
def helper(x):
    return math.floor(SCALE * x)
def fn(x, more=1, *, name="x"):
    total = 0
    def add(y):
        nonlocal total
        total += y
    add(helper(x))
    return total + more
"""
SETS_ATTRIBUTES = """
def fn(model):
    model.rate = 1
    return model
"""


@pytest.mark.parametrize(
    "fn",
    [
        len,
        math.sqrt,
        functools.partial(pow, 2),
        constant_closure(),
        lambda x: x + 1,
        in_main(HELPER),
        in_main(SETS_ATTRIBUTES),
        functools.partial(in_main(HELPER), 1, name="y"),
    ],
)
def test_calls_share_a_function_that_holds_constants_only(fn: Any) -> None:
    assert is_constant(fn)


@pytest.mark.parametrize("name", STATEFUL)
def test_calls_share_no_function_that_they_can_change(name: str) -> None:
    assert not is_constant(STATEFUL[name]())


def test_a_constant_function_is_unpickled_once(pool: sky.ComputePool) -> None:
    fn = in_main("import os\ndef fn(i):\n    return os.getpid(), id(fn)")

    found = sky.gather(*(sky.compute(fn)(i) for i in range(40))) >> pool

    assert len(set(found)) == len({pid for pid, _ in found})


# --- bound methods ------------------------------------------------------------------------------------------


class Table:
    def __init__(self, size: int) -> None:
        self.lines = [f"{i:0999d}" for i in range(size)]

    def look_up(self, i: int) -> str:
        return self.lines[i]

    def is_in(self, others: list[Any]) -> bool:
        return others[0] is self


def test_the_object_of_a_bound_method_is_stored_once_for_all_calls(tmp_path: Path) -> None:
    store = Store(tmp_path)
    packer, table = Packer(store, Sources(store, ship=True)), Table(3_000)

    items = [packer.pack(Call(table.look_up, (i,)), i) for i in range(20)]

    assert store.writes == 1
    assert all(len(item.arguments) < 2_000 for item in items)
    assert len({item.function.digest for item in items}) == 1

    table.lines[0] = "changed"
    packer.pack(Call(table.look_up, (0,)))

    assert store.writes == 2


def test_a_large_object_and_itself_as_an_argument_are_one(pool: sky.ComputePool) -> None:
    for table in (Table(10), Table(3_000)):
        assert sky.compute(table.is_in)([table]) >> pool
        assert sky.compute(table.look_up)(7) >> pool == table.lines[7]


def test_an_object_of_a_bound_method_that_cannot_travel_is_named(pool: sky.ComputePool) -> None:
    import threading

    table = Table(1)
    table.lock = threading.Lock()  # type: ignore[attr-defined]

    with pytest.raises(sky.SerializationError, match=r"argument 'self' of Table\.look_up\(\)"):
        sky.compute(table.look_up)(0) >> pool


def test_an_object_apart_keeps_its_arrays_apart_too() -> None:
    import numpy as np

    table = Table(3_000)
    table.array = np.ones(1 << 18)  # type: ignore[attr-defined]

    data, buffers = pickling.dumps((table, [table]), apart=table)
    again, (same,) = pickling.loads(data, buffers)

    assert len(data) < 2_000
    assert len(buffers) == 2
    assert again is same
    assert again.lines == table.lines
    assert again.array.sum() == 1 << 18
