"""Where calls go: to a pool, or to the current one, which ``>> sky`` means: the innermost whose block is open."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from skyward import forks
from skyward.errors import NoActivePoolError

_current: ContextVar[Any] = ContextVar("skyward_current_pool", default=None)
_entered: list[tuple[Any, Any]] = []  # every target whose block is open in this process, with the one around it
_entered_lock = threading.RLock()  # a collected executor leaves its pool, maybe in a thread that holds it


def enter(target: Any) -> None:
    """Make `target` the current one in this context; `leave` ends it."""
    with _entered_lock:
        _entered.append((target, _current.get()))
    _current.set(target)


def leave(target: Any) -> None:
    """End `enter`: the target around this one is current again, unless one inside it still is. In any order."""
    with _entered_lock:
        at = max((i for i, (t, _) in enumerate(_entered) if t is target), default=None)
        if at is None:
            return
        _, around = _entered.pop(at)
        _entered[:] = [(t, around if outer is target else outer) for t, outer in _entered]
    if _current.get() is target:
        _current.set(around)


def current_pool() -> Any:
    """Return the innermost active pool as seen from here, or None.

    A thread that was started without its parent's context sees the pool too, as long as only one can be meant.
    """
    found = _current.get()
    if found is not None:
        return found
    with _entered_lock:
        around = [outer for _, outer in _entered]
        innermost = [t for t, _ in _entered if not any(t is o for o in around)]
    return innermost[0] if len(innermost) == 1 else None


def resolve(target: Any, what: str, method: str) -> Any:
    """Return the object to run on; `what` is how the call looks in a message, `method` what the target must have."""
    if isinstance(target, ModuleType):
        if target.__name__ != "skyward":
            raise TypeError(f"module {target.__name__!r} can't run calls; only a pool or the module `skyward` can")
        found = current_pool()
        if found is None:
            raise NoActivePoolError(_no_pool(what))
        return found
    if hasattr(target, method) and not _is_dask(target):
        return target
    raise TypeError(_not_a_target(target, what, method))


def _is_dask(target: Any) -> bool:
    return any(base.__module__.partition(".")[0] == "distributed" for base in type(target).__mro__)


def _no_pool(what: str) -> str:
    with _entered_lock:
        several = len(_entered)
    if several:
        return (
            f"{several} pools are active in this process, and this thread belongs to none of them: "
            f"say which one, as in `{what} >> pool`."
        )
    return (
        "no pool is active here, so there is nothing to run on. Either open one around the call:\n"
        "    with sky.ComputePool(nodes=2) as pool:\n"
        f"        result = {what} >> pool\n"
        "or have one around a whole function:\n"
        "    @sky.pool(nodes=2)\n"
        "    def main():\n"
        f"        result = {what} >> sky"
    )


def _not_a_target(target: Any, what: str, method: str) -> str:
    if hasattr(target, "broadcast"):
        return f"`{what} >> pool.slots` is not possible: use `{what} @ pool.slots`, or `{what} >> pool` for one worker"
    if getattr(target, "__module__", "") == "skyward.pool.decorator" and callable(target):
        return f"`sky.pool` is a decorator, not a pool: write `{what} >> sky`, or name the pool that `with` gave you"
    if _is_dask(target):
        return f"to use a Dask cluster, join it: `with sky.ComputePool(sky.Dask(client)) as pool: {what} >> pool`"
    operator = "@" if method == "broadcast" else ">>"
    return (
        f"can't run `{what}` on a {type(target).__name__}; the right side of {operator} is a pool or the module `sky`"
    )


@forks.in_child
def _unlock() -> None:
    """Replace the lock, which another thread of the parent may hold."""
    global _entered_lock
    _entered_lock = threading.RLock()
