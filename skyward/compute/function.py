"""What `@sky.compute` makes of a function. Imports as little as `skyward.compute.pending`."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from types import FrameType, MethodType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from skyward.compute.pending import NotCalled, PendingCompute
from skyward.errors import invalid

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_RUNNERS = frozenset({"dask", "distributed", "joblib", "skyward_joblib", "skyward.worker.runtime", __name__})
"""Libraries and modules that call a function in order to run it, which may be inside a partial or a bound method."""
_BETWEEN = frozenset({"functools", "numpy", "pandas", "toolz"})
"""Libraries that call a function on behalf of those or of the user, as `pandas.Series.map` does."""


class ComputeFunction(NotCalled, Generic[P, R_co]):
    """A function whose calls are values to be sent to a pool. Made by `compute`.

    Dask and joblib run it as any other function: to them, a call returns its result.
    """

    __name__: str
    __qualname__: str

    def __init__(self, fn: Callable[P, Any], *, retries: int = 0, timeout: float | None = None) -> None:
        self.fn = fn
        self.retries = retries
        self.timeout = timeout
        functools.update_wrapper(self, fn)
        if not hasattr(self, "__name__"):  # a partial, or an object with __call__
            self.__name__ = getattr(getattr(fn, "func", None), "__name__", type(fn).__name__)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> PendingCompute[R_co]:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and (runs := _runs(frame.f_globals.get("__name__"))) is not False:
            if runs:
                return self.local(*args, **kwargs)  # type: ignore[return-value]
            frame = frame.f_back
        return PendingCompute(self.fn, args, kwargs, self.retries, self.timeout)

    def local(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run the function here and now, as a worker would: an async function is awaited."""
        value: Any = self.fn(*args, **kwargs)
        if inspect.iscoroutine(value):
            value = run_coroutine(value)
        result: R_co = value
        return result

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return ComputeFunction(MethodType(self.fn, instance), retries=self.retries, timeout=self.timeout)

    def __repr__(self) -> str:
        return f"<ComputeFunction {self.__name__}{_signature(self.fn)}>"


@functools.cache
def _runs(module: str | None) -> bool | None:
    """Tell whether the code of `module` calls a function in order to run it; None: on behalf of its own caller."""
    library = (module or "").partition(".")[0]
    return None if library in _BETWEEN else library in _RUNNERS or module in _RUNNERS


def _signature(fn: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(fn))
    except (TypeError, ValueError):  # some builtins have none
        return "(...)"


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end, also where a loop runs already, and return its value."""
    import asyncio  # here, because it is most of what `import skyward` would take

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # Not by `asyncio.run`, after which the thread has no event loop.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(coroutine)
    # Called from a coroutine: a loop can't run inside another, so this one gets its own thread.
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(coroutine))
        except BaseException as exc:  # handed to the thread that waits
            failure.append(exc)

    thread = threading.Thread(target=copy_context().run, args=(run,))
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


class _Decorator(Protocol):
    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> ComputeFunction[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> ComputeFunction[P, R]: ...


@overload
def compute(fn: Callable[P, Coroutine[Any, Any, R]], /) -> ComputeFunction[P, R]: ...
@overload
def compute(fn: Callable[P, R], /) -> ComputeFunction[P, R]: ...
@overload
def compute(*, retries: int = 0, timeout: float | None = None) -> _Decorator: ...
def compute(fn: Any = None, /, *, retries: int = 0, timeout: float | None = None) -> Any:
    """Make a function whose calls are values: ``train(0.1)`` makes a call, ``train(0.1) >> pool`` runs it on the pool.

    Works with async functions too; they are awaited on the worker.

    Parameters
    ----------
    retries
        How often a call is run again after it raised an exception.
    timeout
        Seconds of run time after which a call is interrupted and `TimeoutError` is raised; None: no limit.

    Raises
    ------
    TypeError
        `fn` is a generator function, whose values can't be sent one by one, or is not callable.
    SpecError
        An option can't work.

    Examples
    --------
    >>> import skyward as sky
    >>> @sky.compute
    ... def double(x: int) -> int:
    ...     return 2 * x
    >>> double(21)
    <PendingCompute double(...)>
    >>> double.local(21)
    42
    """
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise invalid("retries", retries, "an integer >= 0")
    if timeout is not None and not (
        isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and 0 < timeout < math.inf
    ):
        raise invalid("timeout", timeout, "seconds greater than 0, or None for no limit")
    if fn is None:
        return functools.partial(compute, retries=retries, timeout=timeout)
    if isinstance(fn, ComputeFunction):
        fn = fn.fn
    if not callable(fn):
        raise TypeError(f"@sky.compute wraps a function, not a {type(fn).__name__}")
    refuse_generator(fn)
    return ComputeFunction(fn, retries=retries, timeout=timeout)


def refuse_generator(fn: Callable[..., Any]) -> None:
    """Raise `TypeError` for a generator function: its values can't travel one by one."""
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        name = getattr(fn, "__name__", "fn")
        raise TypeError(
            f"{name}() is a generator function, and a generator can't travel from a worker: return a list, or make "
            "one call per value and stream those: `sky.gather(calls, stream=True) >> pool`"
        )


lazy = compute
"""The same as `compute`."""
