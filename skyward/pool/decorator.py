"""The decorator ``sky.pool``: a pool around each run of a function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack, overload

from skyward.pool.compute_pool import ComputePool

if TYPE_CHECKING:
    from skyward.pool.options import PoolOptions
    from skyward.providers import ProviderLike

P = ParamSpec("P")
R = TypeVar("R")


class _PoolDecorator:
    """What ``sky.pool(...)`` returns: wraps a function so that a pool is there around each run of its body."""

    def __init__(self, provider: ProviderLike, options: PoolOptions) -> None:
        self._make = functools.partial(ComputePool, provider, **options)
        self._make()  # bad options are found where they are written, not at the first call

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]: ...
    def __call__(self, fn: Callable[P, Any]) -> Callable[P, Any]:
        if inspect.iscoroutinefunction(fn):

            @functools.wraps(fn)
            async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                async with self._make():
                    return await fn(*args, **kwargs)

            return run_async

        @functools.wraps(fn)
        def run(*args: P.args, **kwargs: P.kwargs) -> Any:
            with self._make():
                return fn(*args, **kwargs)

        return run


def pool(provider: ProviderLike = None, **options: Unpack[PoolOptions]) -> _PoolDecorator:
    """Return a decorator that provisions a pool around each call of the function.

    Takes the options of `ComputePool`. Inside the function, ``sky`` is the pool: ``train(0.1) >> sky``.

    Examples
    --------
    >>> import skyward as sky
    >>> @sky.compute
    ... def double(x: int) -> int:
    ...     return 2 * x
    >>> @sky.pool("local", display="quiet")
    ... def main() -> int:
    ...     return double(21) >> sky
    >>> main()
    42
    """
    if inspect.isroutine(provider):
        raise TypeError("@sky.pool needs parentheses: @sky.pool() or @sky.pool(provider=..., nodes=...)")
    return _PoolDecorator(provider, options)
