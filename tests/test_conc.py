"""Threads that carry the current pool."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest

import skyward as sky
from skyward import conc


def test_results_come_in_order_and_at_most_so_many_run_at_once() -> None:
    running, most, lock = 0, 0, threading.Lock()
    gate = threading.Barrier(3)

    def work(i: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(10)  # opens only when three are here at once
        with lock:
            running -= 1
        return i * i

    assert conc.map_async(work, range(9), concurrency=3) == [i * i for i in range(9)]
    assert most == 3


def test_context_variables_are_carried() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    variable.set(5)

    assert conc.map_async(lambda i: variable.get() + i, [1, 2]) == [6, 7]


def test_calls_in_threads_reach_the_current_pool(pool: sky.ComputePool) -> None:
    double = sky.compute(lambda x: 2 * x)

    assert conc.map_async(lambda x: double(double(x) >> sky) >> sky, range(6), concurrency=3) == [
        4 * x for x in range(6)
    ]


def test_the_first_exception_ends_the_rest() -> None:
    began: list[int] = []

    def work(i: int) -> None:
        began.append(i)
        if i == 1:
            raise KeyError(i)

    with pytest.raises(KeyError):
        conc.for_each_async(work, range(1000), concurrency=1)

    assert began == [0, 1]


def test_indexed_calls_get_their_index() -> None:
    assert conc.map_async_indexed(lambda i, x: f"{i}{x}", "ab") == ["0a", "1b"]
    assert conc.map_async_indexed(lambda i, x: x, "ab", with_index=True) == [(0, "a"), (1, "b")]


def test_nothing_to_do_is_done_at_once() -> None:
    assert conc.map_async(print, []) == []
    conc.for_each_async(print, [])


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_concurrency_must_be_a_count(value: Any) -> None:
    with pytest.raises(sky.SpecError, match="concurrency="):
        conc.map_async(print, [1], concurrency=value)
