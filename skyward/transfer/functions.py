"""What functions hold, and which of them several calls may share without seeing each other's traces."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, EllipsisType, FunctionType, ModuleType, NoneType, NotImplementedType
from typing import Any

CONSTANTS = frozenset(
    {int, float, complex, bool, str, bytes, range, NoneType, EllipsisType, NotImplementedType, CodeType}
)
"""Types whose instances can't change."""
_HIDDEN_ASSIGNMENTS = frozenset(
    {"globals", "vars", "eval", "exec", "setattr", "delattr"}
    | {"__dict__", "__globals__", "__closure__", "__defaults__", "__kwdefaults__"}
)
"""Names by which code may change a function without an assignment to be seen."""


def is_constant(fn: Any) -> bool:
    """Tell whether no call of `fn` can leave anything behind in it, so that all calls may share one copy.

    True for whatever is pickled by name, and for a function whose defaults, closure, attributes and globals are
    constants, modules or such functions, unless it assigns to a global, or to a variable or function around it. False
    for all else: lists, instances, classes that travel by value, bound methods.
    """
    found = [fn]
    seen: set[int] = set()
    assigns = refers = False
    for value in found:  # which grows
        kind = type(value)
        refers |= kind is FunctionType and value is not fn
        if kind in CONSTANTS or id(value) in seen or is_by_name(value):
            continue
        seen.add(id(value))
        if kind is FunctionType:
            if _leaves_traces(value.__code__):
                return False
            assigns |= _assigns_attributes(value.__code__)
            parts = list(parts_of(value))
            refers |= any(part is value for part in parts)
            found += parts
        elif kind is tuple or kind is frozenset:
            found += value
        elif kind is functools.partial:
            found += (value.func, *value.args, *value.keywords.values(), *vars(value).values())
        else:
            return False
    return not (assigns and refers)  # a function may keep something in an attribute


def is_by_name(value: Any) -> bool:
    """Tell whether `value` is pickled as a name, under which it is found here."""
    if isinstance(value, ModuleType):
        return sys.modules.get(value.__name__) is value
    if not isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        return False
    found: Any = sys.modules.get(value.__module__ or "")
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def parts_of(fn: FunctionType, *, with_globals: bool = True) -> Iterator[Any]:
    """Yield what a function refers to: code, defaults, attributes, closure and the globals that it uses."""
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
    if with_globals:
        yield from (fn.__globals__[name] for name in names_in(fn.__code__) if name in fn.__globals__)


@functools.lru_cache(maxsize=1024)
def names_in(code: CodeType) -> tuple[str, ...]:
    """Return the names that code looks up, and the functions inside it."""
    return tuple(dict.fromkeys(name for part in _with_inner(code) for name in part.co_names))


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _with_inner(const)


def _leaves_traces(code: CodeType) -> bool:
    """Tell whether code assigns to globals or to variables around it, or may do so unseen."""
    return not _HIDDEN_ASSIGNMENTS.isdisjoint(names_in(code)) or any(
        step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
        or (step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in code.co_freevars)
        for part in _with_inner(code)
        for step in dis.get_instructions(part)
    )


def _assigns_attributes(code: CodeType) -> bool:
    return any(
        step.opname in ("STORE_ATTR", "DELETE_ATTR")
        for part in _with_inner(code)
        for step in dis.get_instructions(part)
    )
