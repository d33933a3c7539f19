"""What `@sky.compute` makes of a function. Imports as little as `skyward.compute.pending`."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextvars import copy_context
from types import FrameType, MethodType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from skyward.compute.pending import NotCalled, PendingCompute, PendingGenerator
from skyward.errors import invalid

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_RUNNERS = frozenset({"dask", "distributed", "joblib", "skyward_joblib", "skyward.worker.runtime", __name__})
"""Libraries and modules that call a function in order to run it, which may be inside a partial or a bound method."""
_FORWARDERS = frozenset({"functools", "numpy", "pandas", "toolz"})
"""Libraries that call a function on behalf of those or of the user, as `pandas.Series.map` does."""


class ComputeFunction(NotCalled, Generic[P, R_co]):
    """A function whose calls are values to be sent to a pool. Made by `compute`.

    Dask and joblib run it as any other function: to them, a call returns its result.
    """

    __name__: str
    __qualname__: str

    def __init__(
        self,
        fn: Callable[P, Any],
        *,
        retries: int = 0,
        timeout: float | None = None,
        makes: type[PendingCompute[Any]] = PendingCompute,
    ) -> None:
        self.fn = fn
        self.retries = retries
        self.timeout = timeout
        self.makes = makes
        functools.update_wrapper(self, fn)
        if not hasattr(self, "__name__"):  # a partial, or an object with __call__
            self.__name__ = getattr(getattr(fn, "func", None), "__name__", type(fn).__name__)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> PendingCompute[R_co]:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and (runs := _runs(frame.f_globals.get("__name__"))) is not False:
            if runs:
                return self.local(*args, **kwargs)  # type: ignore[return-value]
            frame = frame.f_back
        return self.makes(self.fn, args, kwargs, self.retries, self.timeout)

    def local(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run the function here and now, as a worker would: an async function is awaited.

        Of a generator function, return an iterator, also if it is async.
        """
        value: Any = self.fn(*args, **kwargs)
        if inspect.iscoroutine(value):
            value = run_coroutine(value)
        elif inspect.isasyncgen(value):
            value = _iterate(value)
        result: R_co = value
        return result

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        fn = MethodType(self.fn, instance)
        return ComputeFunction(fn, retries=self.retries, timeout=self.timeout, makes=self.makes)

    def __repr__(self) -> str:
        return f"<ComputeFunction {self.__name__}{_signature(self.fn)}>"


@functools.cache
def _runs(module: str | None) -> bool | None:
    """Tell whether `module` runs the functions that it calls. None: it calls them for the code that called it."""
    library = (module or "").partition(".")[0]
    return None if library in _FORWARDERS else library in _RUNNERS or module in _RUNNERS


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


def _iterate(values: AsyncGenerator[R, Any]) -> Iterator[R]:
    """Yield the values of an async generator, from a thread that runs its event loop: one may run here."""
    from concurrent.futures import ThreadPoolExecutor

    from skyward.worker.value_stream import iterate

    end = object()
    context, iterator = copy_context(), iterate(values)
    with ThreadPoolExecutor(1) as thread:
        try:
            while (value := thread.submit(lambda: context.run(next, iterator, end)).result()) is not end:
                yield cast("R", value)
        finally:
            thread.submit(context.run, iterator.close).result()


class _Decorator(Protocol):
    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> ComputeFunction[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, Generator[R, Any, Any]], /) -> ComputeFunction[P, Iterator[R]]: ...
    @overload
    def __call__(self, fn: Callable[P, AsyncIterator[R]], /) -> ComputeFunction[P, Iterator[R]]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> ComputeFunction[P, R]: ...


@overload
def compute(fn: Callable[P, Coroutine[Any, Any, R]], /) -> ComputeFunction[P, R]: ...
@overload
def compute(fn: Callable[P, Generator[R, Any, Any]], /) -> ComputeFunction[P, Iterator[R]]: ...
@overload
def compute(fn: Callable[P, AsyncIterator[R]], /) -> ComputeFunction[P, Iterator[R]]: ...
@overload
def compute(fn: Callable[P, R], /) -> ComputeFunction[P, R]: ...
@overload
def compute(*, retries: int = 0, timeout: float | None = None) -> _Decorator: ...
def compute(fn: Any = None, /, *, retries: int = 0, timeout: float | None = None) -> Any:
    """Make a function whose calls are values: ``train(0.1)`` makes a call, ``train(0.1) >> pool`` runs it on the pool.

    Works with async functions too; they are awaited on the worker. A call of a generator function, which may be async,
    gives an iterator: the values arrive while the function runs, at most 8 values or 64 MiB ahead. Closing the iterator
    raises `GeneratorExit` in the function.

    Parameters
    ----------
    retries
        How often a call is run again after it raised an exception, but not after its `timeout`. Not for generator
        functions.
    timeout
        Seconds of run time after which a call is interrupted and `TimeoutError` is raised; None: no limit. The time in
        which a generator waits for its consumer does not count.

    Raises
    ------
    TypeError
        `fn` is not callable.
    SpecError
        An option can't work.

    Examples
    --------
    >>> from collections.abc import Iterator
    >>> import skyward as sky
    >>> @sky.compute
    ... def double(x: int) -> int:
    ...     return 2 * x
    >>> double(21)
    <PendingCompute double(...)>
    >>> double.local(21)
    42
    >>> @sky.compute
    ... def count(n: int) -> Iterator[int]:
    ...     yield from range(n)
    >>> list(count.local(3))
    [0, 1, 2]
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
    makes: type[PendingCompute[Any]] = PendingGenerator if is_generator_function(fn) else PendingCompute
    if retries and makes is PendingGenerator:
        raise invalid("retries", retries, "0 for a generator function, whose values are used before it fails")
    return ComputeFunction(fn, retries=retries, timeout=timeout, makes=makes)


def is_generator_function(fn: Callable[..., Any]) -> bool:
    """Tell whether calls of `fn` give a generator or an async generator."""
    return any(inspect.isgeneratorfunction(f) or inspect.isasyncgenfunction(f) for f in (fn, type(fn).__call__))


lazy = compute
"""The same as `compute`."""
