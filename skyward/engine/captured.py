"""What a function takes along when it is pickled, to see without pickling it whether that is still the same."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, EllipsisType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

from skyward.pickling import is_project_module

_CONSTANTS = frozenset({int, float, complex, bool, str, bytes, NoneType, EllipsisType, CodeType})


def captured(fn: Any) -> list[Any] | None:
    """Return the objects that `fn` refers to: while they are the same objects, it is pickled to the same bytes.

    None if one of them can change in place: a list, an array, any instance of a class.

    Classes and modules of the caller's are taken with their attributes, but what these hold is not looked at: that is
    code, and pickling all of it for each call would cost too much.
    """
    found = [fn]
    attributes: list[Any] = []
    seen: set[int] = set()
    for value in found:  # which grows
        kind = type(value)
        if kind in _CONSTANTS or id(value) in seen:
            continue
        seen.add(id(value))
        if kind is FunctionType:
            found += _of_function(value)
        elif kind is tuple:
            found += value
        elif kind is functools.partial:
            found += (value.func, *value.args, *value.keywords, *value.keywords.values(), *vars(value).values())
        elif kind is MethodType:
            found += (value.__func__, value.__self__)
        elif kind is BuiltinFunctionType:
            found.append(value.__self__)  # its module, or the object that it is a method of
        elif isinstance(value, type):
            if _is_by_value(value.__module__):
                found += value.__bases__
                attributes += vars(value).values()
        elif isinstance(value, ModuleType):
            if _is_by_value(value.__name__):
                attributes += vars(value).values()
        else:
            return None
    return found + attributes


def _of_function(fn: FunctionType) -> Iterator[Any]:
    yield fn.__code__
    yield from fn.__defaults__ or ()
    for pair in (fn.__kwdefaults__ or {}).items():
        yield from pair
    yield from fn.__dict__.values()
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing is assigned yet
            yield None
    if _is_by_value(fn.__module__):
        yield from (fn.__globals__[name] for name in _names(fn.__code__) if name in fn.__globals__)


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> tuple[str, ...]:
    """Return the names that code looks up, and the functions inside it."""
    inner = (name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


@functools.lru_cache(maxsize=1024)
def _is_by_value(module: str | None) -> bool:
    """Tell whether functions of a module travel by value, and with them the globals that they use."""
    return module == "__main__" or module not in sys.modules or is_project_module(module)
