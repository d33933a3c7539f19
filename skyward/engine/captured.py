"""What a function takes along when it is pickled, to see without pickling it whether that is still the same."""

from __future__ import annotations

import functools
import sys
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from skyward.engine.own_modules import goes_by_value
from skyward.transfer.functions import CONSTANTS, parts_of
from skyward.transfer.pickling import count_wrappers


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
        if kind in CONSTANTS or id(value) in seen:
            continue
        seen.add(id(value))
        if kind is FunctionType:
            found += parts_of(value, with_globals=_is_by_value(value))
        elif kind is tuple:
            found += value
        elif kind is functools.partial:
            found += (value.func, *value.args, *value.keywords, *value.keywords.values(), *vars(value).values())
        elif kind is MethodType:
            found += (value.__func__, value.__self__)
        elif kind is BuiltinFunctionType:
            found.append(value.__self__)  # its module, or the object that it is a method of
        elif isinstance(value, type):
            if _is_by_value(value):
                found += value.__bases__
                attributes += vars(value).values()
        elif isinstance(value, ModuleType):
            if _is_module_by_value(value.__name__):
                attributes += vars(value).values()
        else:
            return None
    return found + attributes


def _is_by_value(code: FunctionType | type) -> bool:
    """Tell whether a function or class travels by value, and with it the globals or attributes that it has."""
    if _is_module_by_value(code.__module__) or "<locals>" in code.__qualname__:
        return True
    return isinstance(code, FunctionType) and count_wrappers(code) is None


@functools.lru_cache(maxsize=1024)
def _is_module_by_value(module: str | None) -> bool:
    return module is None or module == "__main__" or module not in sys.modules or goes_by_value(module, ship=True)
