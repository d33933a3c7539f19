"""A pool as a `concurrent.futures.Executor`."""

from __future__ import annotations

import concurrent.futures
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, ParamSpec, Self, TypeVar, Unpack, overload

from skyward import forks
from skyward.compute import ComputeFunction, compute, one_value
from skyward.pool import ComputePool, PoolOptions, bring_up
from skyward.providers import ProviderLike

P = ParamSpec("P")
R = TypeVar("R")


class Executor(concurrent.futures.Executor):
    """Runs functions on its own pool, with the interface of `concurrent.futures`.

    Takes the options of `ComputePool`. The machines are started by ``with`` or by the first `submit`. They are
    destroyed by `shutdown`, at the end of the block, or at the latest when the executor or the process ends. Futures
    support `cancel` (a running call is interrupted), callbacks, `as_completed` and `wait`.

    Examples
    --------
    >>> import skyward as sky
    >>> with sky.Executor("local", concurrency=2, display="quiet") as executor:
    ...     executor.submit(pow, 2, 10).result()
    1024
    """

    def __init__(self, provider: ProviderLike = None, **options: Unpack[PoolOptions]) -> None:
        self.pool: ComputePool = ComputePool(provider, **options)
        self._lock = threading.Lock()
        self._started = False
        self._shut = False
        self._pending: set[Future[Any]] = set()
        # An executor that is forgotten, or alive when the interpreter exits, must not keep its machines.
        self._end = weakref.finalize(self, self.pool.close)
        forks.tell(self)

    def forked(self) -> None:
        """Wait for nothing in a child that was forked: the futures are the parent's."""
        self._lock = threading.Lock()
        self._pending = set()

    def _start(self) -> None:
        with self._lock:
            if self._shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if not self._started:
                bring_up(self.pool)
                self._started = True

    def __repr__(self) -> str:
        return f"<Executor on {self.pool!r}>"

    def __enter__(self) -> Self:
        self._start()
        return self

    @property
    def total_slots(self) -> int:
        """How many calls can run at once; starts the machines if they are not up."""
        self._start()
        return self.pool.total_slots

    @overload
    def submit(self, fn: ComputeFunction[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]: ...
    @overload
    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]: ...
    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn(*args, **kwargs)`` on a worker and return its future."""
        function: ComputeFunction[..., Any] = fn if isinstance(fn, ComputeFunction) else compute(fn)
        call = one_value(function(*args, **kwargs))
        self._start()
        future: Future[Any] = self.pool.submit(call)
        with self._lock:
            self._pending.add(future)
        future.add_done_callback(self._pending.discard)  # atomic; and no reference that keeps the executor alive
        return future

    @overload
    def map(
        self,
        fn: ComputeFunction[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = ...,
        chunksize: int = ...,
    ) -> Iterator[R]: ...
    @overload
    def map(
        self, fn: Callable[..., R], *iterables: Iterable[Any], timeout: float | None = ..., chunksize: int = ...
    ) -> Iterator[R]: ...
    def map(
        self, fn: Any, *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[Any]:
        """Return an iterator over ``fn(*args)`` for the items of `iterables`, like `map`, in order.

        All calls are submitted at once, as by the standard executors. `chunksize` has no effect: the engine chooses the
        size of chunks.

        Raises
        ------
        TimeoutError
            From the iterator: a result was not available `timeout` seconds after this call.
        ValueError
            `chunksize` is less than 1.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        deadline = None if timeout is None else time.monotonic() + timeout
        futures = [self.submit(fn, *args) for args in zip(*iterables, strict=False)]
        return _results(futures, deadline)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls, and destroy the machines when all submitted calls have ended.

        With ``wait=False`` it returns at once and a thread does the rest; with `cancel_futures` unfinished calls are
        cancelled.
        """
        with self._lock:
            self._shut = True
            pending = list(self._pending)
        if cancel_futures:
            for future in pending:
                future.cancel()
        if not self._started:
            self._end.detach()
            return
        if wait:
            self._finish(pending)
        else:
            threading.Thread(target=self._finish, args=[pending], name="skyward-executor-end").start()

    def _finish(self, pending: list[Future[Any]]) -> None:
        try:
            concurrent.futures.wait(pending)
        finally:
            self._end()


def _results(futures: list[Future[R]], deadline: float | None) -> Iterator[R]:
    try:
        futures.reverse()
        while futures:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            value = futures[-1].result(left)
            del futures[-1]  # not before: one that is not there in time is to be cancelled too
            yield value
    finally:
        for future in futures:
            future.cancel()
