"""Values that a call needs from other calls: what stands for one in a pickle, and where the worker finds it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

STAND_INS: dict[type, Callable[[Any, list[Any]], Any]] = {}
"""For types whose instances stand for values: adds what is needed to a list, and returns what is pickled instead."""

_local = threading.local()


@contextlib.contextmanager
def given(values: Sequence[Any]) -> Iterator[None]:
    """Let pickles that this thread loads inside the block find `values`, in the order in which they were needed."""
    _local.values = values
    try:
        yield
    finally:
        _local.values = ()


def need_value(needed: Any, needs: list[Any]) -> Any:
    """Return what is pickled in the place of a value."""
    needs.append(needed)
    return _value, (len(needs) - 1,)


def need_values(needed: Sequence[Any], needs: list[Any]) -> Any:
    """Return what is pickled in the place of a tuple of values."""
    needs += needed
    return _values, tuple(range(len(needs) - len(needed), len(needs)))


def _value(index: int) -> Any:
    return _local.values[index]


def _values(*indices: int) -> tuple[Any, ...]:
    return tuple(_local.values[i] for i in indices)
