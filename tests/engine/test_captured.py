"""What functions take along: seen without pickling them, where that can be seen."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest

from skyward.engine.calls import Call
from skyward.engine.captured import captured
from skyward.engine.packer import Packer
from skyward.engine.sources import Sources
from skyward.engine.store import Store

level = 1


class Scale:
    factor = 1

    def __init__(self, factor: int) -> None:
        self.own = factor

    def __call__(self, x: int) -> int:
        return self.own * x

    def times(self, x: int) -> int:
        return self.own * x

    @classmethod
    def common(cls, x: int) -> int:
        return cls.factor * x


def leveled(x: int) -> int:
    return level * x


def through_another(x: int) -> int:
    return leveled(x)


def through_a_class(x: int) -> int:
    return Scale.common(x)


def by_default(x: int, factor: int = 1, *, more: int = 0) -> int:
    return factor * x + more


def closure() -> tuple[Callable[[int], int], Callable[[int], None]]:
    factor = 1

    def fn(x: int) -> int:
        return factor * x

    def change(to: int) -> None:
        nonlocal factor
        factor = to

    return fn, change


def closure_of_list() -> tuple[Callable[[int], int], Callable[[int], None]]:
    factors = [1]
    return lambda x: factors[0] * x, lambda to: factors.__setitem__(0, to)


def instance() -> tuple[Callable[[int], int], Callable[[int], None]]:
    scale = Scale(1)
    return scale, lambda to: setattr(scale, "own", to)


def bound_method() -> tuple[Callable[[int], int], Callable[[int], None]]:
    scale = Scale(1)
    return scale.times, lambda to: setattr(scale, "own", to)


def partial_of_method() -> tuple[Callable[[], int], Callable[[int], None]]:
    scale = Scale(1)
    return functools.partial(scale.times, 3), lambda to: setattr(scale, "own", to)


def of_module(fn: Callable[[int], int]) -> Callable[[], tuple[Any, Any]]:
    return lambda: (fn, lambda to: globals().__setitem__("level", to))


def of_class() -> tuple[Callable[[int], int], Callable[[int], None]]:
    return through_a_class, lambda to: setattr(Scale, "factor", to)


def of_defaults() -> tuple[Callable[[int], int], Callable[[int], None]]:
    return by_default, lambda to: setattr(by_default, "__defaults__", (to,))


def of_keyword_defaults() -> tuple[Callable[[int], int], Callable[[int], None]]:
    return by_default, lambda to: setattr(by_default, "__kwdefaults__", {"more": to})


CHANGES = [
    closure,
    closure_of_list,
    instance,
    bound_method,
    partial_of_method,
    of_module(leveled),
    of_module(through_another),
    of_class,
    of_defaults,
    of_keyword_defaults,
]


def _sent(packer: Packer, fn: Any) -> tuple[str, bytes]:
    """Return what tells two calls apart: the object of a bound method is one of the arguments."""
    item = packer.pack(Call(fn))
    return item.function.digest, item.arguments


@pytest.mark.parametrize("make", CHANGES)
def test_a_function_whose_state_changes_between_two_calls_is_sent_again(make: Any) -> None:
    fn, change = make()
    packer = Packer(store := Store(), Sources(store, ship=True))
    change(1)
    first, same = (_sent(packer, fn) for _ in range(2))
    change(2)
    second = _sent(packer, fn)
    change(1)
    third = _sent(packer, fn)

    assert first == same == third != second


@pytest.mark.parametrize(
    "fn", [leveled, through_another, through_a_class, math.sqrt, functools.partial(by_default, factor=2), Scale.common]
)
def test_a_function_of_constants_is_not_pickled_again(fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packer = Packer(store := Store(), Sources(store, ship=True))
    ref = packer.pack(Call(fn)).function
    monkeypatch.setattr("skyward.engine.packer.captured", lambda fn: captured(fn) or pytest.fail("it can change"))

    assert packer.pack(Call(fn)).function is ref


def test_calls_that_are_all_there_share_one_look_at_their_function() -> None:
    fn, change = bound_method()
    packer = Packer(store := Store(), Sources(store, ship=True), unchanged=True)
    first = packer.pack(Call(fn)).function
    change(2)

    assert packer.pack(Call(fn)).function is first
