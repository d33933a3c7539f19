"""Threads for calls that wait for a pool: ordered helpers that carry the current pool along.

They block until all is done. Made for many `>>` at once, from one thread per call::

    results = conc.map_async(lambda x: step2(step1(x) >> sky) >> sky, items, concurrency=8)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Any, Literal, TypeVar, overload

from skyward.errors import invalid

T = TypeVar("T")
R = TypeVar("R")

_MOST_THREADS = 32
"""Threads when `concurrency` is None. Chosen, not measured: they wait most of the time."""


def map_async(fn: Callable[[T], R], items: Iterable[T], concurrency: int | None = None) -> list[R]:
    """Return ``[fn(item) for item in items]``, up to `concurrency` of them at once, each in a thread.

    Every thread sees the caller's context variables, the current pool among them. The first exception ends the
    rest: what has not begun is dropped, what runs is waited for, and it is raised.

    Raises
    ------
    SpecError
        `concurrency` is not an integer >= 1.
    """
    return _run([(fn, (item,)) for item in items], concurrency)


def for_each_async(fn: Callable[[T], object], items: Iterable[T], concurrency: int | None = None) -> None:
    """Call `fn` with each item, as `map_async` does, and forget what it returns."""
    map_async(fn, items, concurrency)


@overload
def map_async_indexed(
    fn: Callable[[int, T], R], items: Iterable[T], concurrency: int | None = None, *, with_index: Literal[False] = ...
) -> list[R]: ...
@overload
def map_async_indexed(
    fn: Callable[[int, T], R], items: Iterable[T], concurrency: int | None = None, *, with_index: Literal[True]
) -> list[tuple[int, R]]: ...
def map_async_indexed(
    fn: Callable[[int, T], Any], items: Iterable[T], concurrency: int | None = None, *, with_index: bool = False
) -> list[Any]:
    """Return ``[fn(i, item) for i, item in enumerate(items)]``, as `map_async` does.

    With `with_index` each result comes as ``(i, result)``.
    """
    results = _run([(fn, (i, item)) for i, item in enumerate(items)], concurrency)
    return list(enumerate(results)) if with_index else results


def _run(calls: list[tuple[Callable[..., R], tuple[Any, ...]]], concurrency: int | None) -> list[R]:
    if concurrency is not None and (
        isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1
    ):
        accepted = "an integer >= 1, or None"
        raise invalid("concurrency", concurrency, accepted)
    if not calls:
        return []
    executor = ThreadPoolExecutor(
        min(concurrency or _MOST_THREADS, len(calls)), thread_name_prefix="skyward-conc"
    )
    failure = threading.Event()

    def call(fn: Callable[..., R], args: tuple[Any, ...]) -> R:
        if failure.is_set():
            raise CancelledError  # not heard by anybody: the failure is what is raised
        try:
            return fn(*args)
        except BaseException:
            failure.set()
            raise

    try:
        # A context can be entered by one thread at a time, so each call has its own copy.
        futures: list[Future[R]] = [executor.submit(copy_context().run, call, fn, args) for fn, args in calls]
        wait(futures, return_when=FIRST_EXCEPTION)
        failed = next(_failures(futures), None)
        if failed is not None:
            executor.shutdown(cancel_futures=True)
            raise failed
        return [f.result() for f in futures]
    finally:
        # After Ctrl-C the caller goes on at once; what runs ends by itself.
        executor.shutdown(wait=False, cancel_futures=True)


def _failures(futures: list[Future[R]]) -> Iterator[BaseException]:
    for future in futures:
        if future.done() and not future.cancelled():
            exc = future.exception()
            if exc is not None and not isinstance(exc, CancelledError):
                yield exc
