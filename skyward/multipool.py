"""Several pools at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from skyward.pool import ComputePool, bring_up


class MultiPool:
    """Several pools, started and destroyed in parallel: ``with sky.MultiPool(a, b) as (a, b):``.

    No pool becomes the current one: name the pool, as in ``>> a``.
    """

    def __init__(self, *pools: ComputePool) -> None:
        if not pools:
            raise TypeError("MultiPool needs at least one pool")
        if len({id(p) for p in pools}) < len(pools):
            raise TypeError("MultiPool was given the same pool twice")
        self.pools = pools

    def __repr__(self) -> str:
        return f"MultiPool({', '.join(map(repr, self.pools))})"

    def __enter__(self) -> tuple[ComputePool, ...]:
        """Bring all up.

        Raises
        ------
        ExceptionGroup
            Some failed; the others are destroyed. Its exceptions are the causes, in the order of the pools.
        """
        failures = _in_parallel(bring_up, self.pools)
        if failures:
            failures += _in_parallel(ComputePool.close, self.pools)
            _raise(f"{len(failures)} of {len(self.pools)} pools could not be started; all were destroyed", failures)
        return self.pools

    def __exit__(self, *exc_info: object) -> None:
        if failures := _in_parallel(ComputePool.close, self.pools):
            _raise("pools could not be destroyed properly", failures)


def _in_parallel(
    action: Callable[[ComputePool], None], pools: Sequence[ComputePool]
) -> list[BaseException]:
    with ThreadPoolExecutor(len(pools), thread_name_prefix="skyward-multipool") as threads:
        futures = [threads.submit(action, p) for p in pools]
        try:
            return [e for f in futures if (e := f.exception()) is not None]
        except BaseException:  # Ctrl-C: what is being started would outlive us
            _in_parallel(ComputePool.close, pools)
            wait(futures)
            _in_parallel(ComputePool.close, pools)  # those whose start had not begun before
            raise


def _raise(message: str, failures: list[BaseException]) -> None:
    raise BaseExceptionGroup(message, failures)
