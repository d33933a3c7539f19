"""Whatever the user's code raises, and wherever: the call has an outcome, and the next call works."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import skyward as sky
from tests import hostile
from tests.hostile import FrozenError, Trap, VersionWarning
from tests.waiting import wait_until

TIMEOUT_S = 60


@sky.compute
def double(x: int) -> int:
    return 2 * x


@sky.compute
def wait_for_file(path: Path) -> None:
    wait_until(path.exists)


# --- anything, anywhere -------------------------------------------------------------------------------------


def _in_callback(pool: sky.ComputePool, name: str) -> None:
    called = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "added")
        future = pool.submit(wait_for_file(path))  # callbacks of a future that is done are called here and now
        future.add_done_callback(lambda _: hostile.raise_one(name))
        future.add_done_callback(lambda _: called.set())
        path.touch()
        assert called.wait(TIMEOUT_S)


def _in_event_handler(pool: sky.ComputePool, name: str) -> None:
    heard: list[Any] = []

    def hear(event: sky.TaskProgress) -> None:
        if not heard:
            heard.append(event)
            hostile.raise_one(name)

    pool.on(sky.TaskProgress, hear)
    assert sky.gather(*(double(i) for i in range(4))) >> pool == (0, 2, 4, 6)
    pool.engine.tell_progress()


def _in_show_warning(pool: sky.ComputePool, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *_: hostile.raise_one(name)  # type: ignore[assignment]
        pool.submit(sky.compute(hostile.warn)(name)).result(timeout=TIMEOUT_S)


def _with_errors_for_warnings(pool: sky.ComputePool, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.submit(sky.compute(hostile.warn)(name)).result(timeout=TIMEOUT_S)


PLACES: dict[str, Callable[[sky.ComputePool, str], Any]] = {
    "call": lambda pool, name: sky.compute(hostile.raise_one)(name) >> pool,
    "submitted call": lambda pool, name: pool.submit(sky.compute(hostile.raise_one)(name)).result(timeout=TIMEOUT_S),
    "batch": lambda pool, name: sky.gather(double(1), sky.compute(hostile.raise_one)(name), double(2)) >> pool,
    "broadcast": lambda pool, name: sky.compute(hostile.raise_one)(name) @ pool,
    "map": lambda pool, name: list(pool.map(hostile.raise_one, [name])),
    "iterable": lambda pool, name: list(
        sky.gather(hostile.iterate([double(1), double(2)], name), stream=True) >> pool
    ),
    "argument's pickling": lambda pool, name: pool.submit(sky.compute(hostile.take)(Trap(name, "pickle"))),
    "argument's unpickling": lambda pool, name: sky.compute(hostile.take)(Trap(name, "unpickle")) >> pool,
    "result's pickling": lambda pool, name: sky.compute(hostile.make_trap)(name, "pickle") >> pool,
    "result's unpickling": lambda pool, name: sky.compute(hostile.make_trap)(name, "unpickle") >> pool,
    "submitted result's unpickling": lambda pool, name: pool.submit(
        sky.compute(hostile.make_trap)(name, "unpickle")
    ).result(timeout=TIMEOUT_S),
    "result's end": lambda pool, name: sky.compute(hostile.make_trap)(name, "delete") >> pool,
    "callback": _in_callback,
    "event handler": _in_event_handler,
    "warning": lambda pool, name: pool.submit(sky.compute(hostile.warn)(name)).result(timeout=TIMEOUT_S),
    "showing of a warning": _in_show_warning,
    "warning that is an error": _with_errors_for_warnings,
}


@pytest.mark.filterwarnings("ignore", "ignore::hypothesis.errors.HypothesisDeprecationWarning")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(list(PLACES)), name=st.sampled_from(list(hostile.EXCEPTIONS)))
def test_after_any_exception_anywhere_the_next_call_works(pool: sky.ComputePool, place: str, name: str) -> None:
    with contextlib.suppress(BaseException):
        PLACES[place](pool, name)

    assert pool.submit(double(2)).result(timeout=TIMEOUT_S) == 4
    assert double(3) >> pool == 6


# --- what arrives -------------------------------------------------------------------------------------------


def test_a_frozen_dataclass_arrives_as_itself(any_pool: sky.ComputePool) -> None:
    with pytest.raises(FrozenError) as info:
        sky.compute(hostile.raise_one)("frozen") >> any_pool

    assert info.value == FrozenError(3)
    assert type(info.value) is FrozenError
    assert "in raise_one" in str(info.value.__cause__)
    assert any(note.startswith("raised on") for note in info.value.__notes__)


def test_a_future_has_a_frozen_dataclass_as_its_exception(pool: sky.ComputePool) -> None:
    future = pool.submit(sky.compute(hostile.raise_one)("frozen"))

    assert future.exception(timeout=TIMEOUT_S) == FrozenError(3)


def test_stop_iteration_arrives_as_itself(pool: sky.ComputePool) -> None:
    with pytest.raises(StopIteration):
        sky.compute(hostile.raise_one)("StopIteration") >> pool


@pytest.mark.parametrize("name", ["unpicklable", "exits when pickled", "pickles as a number", "speechless"])
def test_an_exception_that_cannot_travel_is_told_with_its_traceback(pool: sky.ComputePool, name: str) -> None:
    kind = type(hostile.EXCEPTIONS[name]())
    with pytest.raises(BaseException) as info:
        sky.compute(hostile.raise_one)(name) >> pool

    assert isinstance(info.value, kind) or kind.__name__ in str(info.value)
    assert "in raise_one" in str(info.value.__cause__)


def test_a_warning_whose_category_needs_arguments_arrives_as_itself(any_pool: sky.ComputePool) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert sky.compute(hostile.warn)("warning") >> any_pool == 1

    found = [w.message for w in shown if isinstance(w.message, VersionWarning)]
    assert [(w.old, w.new) for w in found] == [("1", "2"), ("1.2", "1.9")]


def test_a_warning_that_cannot_travel_arrives_as_text(pool: sky.ComputePool) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        sky.compute(hostile.warn)("warning") >> pool

    assert "tests.hostile.LockedWarning: warns with a lock" in [str(w.message) for w in shown]


def test_every_callback_is_called_when_one_of_them_exits(pool: sky.ComputePool) -> None:
    _in_callback(pool, "SystemExit")


def test_a_result_that_exits_when_it_is_unpickled_fails_its_call(pool: sky.ComputePool) -> None:
    with pytest.raises(sky.SerializationError, match="can't be unpickled here"):
        sky.compute(hostile.make_trap)("SystemExit", "unpickle") >> pool
