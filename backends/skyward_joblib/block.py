"""The block of a pool: while it is open, joblib uses the pool by default, in all threads of this process.

joblib's `parallel_config` is for one thread. Threads in which it was not used, such as those of optuna's `n_jobs`, of
`asyncio.to_thread` or of a server's requests, take joblib's default, and that is changed here. The object that stands
for "not given" in joblib's configuration has it (joblib 1.5 and 1.6).
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any

from joblib import parallel
from joblib._parallel_backends import FallbackToBackend, ParallelBackendBase

import skyward as sky
from skyward import forks
from skyward_joblib.backend import SkywardBackend

_NOT_GIVEN = parallel.default_parallel_config["backend"]
_open: list[Block] = []
_lock = threading.Lock()
_here: ContextVar[Block | None] = ContextVar("skyward_joblib_block", default=None)


class Block:
    """Lets joblib use `backend` by default until `end`. Blocks may end in any order, and in other threads.

    In the thread that opens it, it is a `parallel_config`. Elsewhere the innermost block of the context counts, and
    where the context has none, the innermost one of the process.
    """

    def __init__(self, backend: SkywardBackend) -> None:
        self.backend = backend
        self.is_open: bool = True
        self._around = _innermost_here()
        with _lock:
            _open.append(self)
            _set_default(BlockBackend(None, None))
        _here.set(self)
        outer = getattr(parallel._backend, "config", parallel.default_parallel_config)["backend"]
        self._config = parallel.parallel_config(backend=BlockBackend(self, None if outer is _NOT_GIVEN else outer))

    def end(self) -> None:
        if not self.is_open:
            return
        self.is_open = False
        with _lock:
            _open.remove(self)
            if not _open:
                _set_default(None)
        if _here.get() is self:
            _here.set(self._around)
        if getattr(parallel._backend, "config", None) is self._config.parallel_config:
            self._config.unregister()

    def is_around(self, other: Block) -> bool:
        around = other._around
        return around is not None and (around is self or self.is_around(around))


class BlockBackend(SkywardBackend):
    """What joblib finds as its default: it hands each `Parallel` to the backend of the block that counts then.

    `block` is the one that the thread has opened, and `outer` the backend that it had before: it counts when the block
    was ended in another thread.
    """

    def __init__(self, block: Block | None, outer: ParallelBackendBase | None) -> None:
        super().__init__(nesting_level=0)
        self._block = block
        self._outer = outer

    def _found(self) -> ParallelBackendBase:
        if self._block is not None and self._block.is_open:
            return self._block.backend
        if self._outer is not None:
            return self._outer
        block = _innermost_here() or _innermost()
        return parallel.BACKENDS[parallel.DEFAULT_BACKEND](nesting_level=0) if block is None else block.backend

    @property
    def default_n_jobs(self) -> int:  # type: ignore[override]
        number: int = self._found().default_n_jobs
        return number

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        number: int = self._found().effective_n_jobs(n_jobs)
        return number

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        raise FallbackToBackend(self._found())


def _innermost_here() -> Block | None:
    """Return the innermost open block that the context is in."""
    block = _here.get()
    while block is not None and not block.is_open:
        block = block._around
    return block


def _innermost() -> Block | None:
    """Return the innermost block that is open in the process, if there is one.

    Raises
    ------
    NoActivePoolError
        There are several, of different pools, and none is around another.
    """
    with _lock:
        found = [block for block in _open if not any(map(block.is_around, _open))]
    if len({id(block.backend.target) for block in found}) > 1:
        raise sky.NoActivePoolError(
            f"{len(found)} pools are open for joblib, and this thread belongs to none of them. Say which one it uses:\n"
            "    with sky.integrations.joblib_backend(pool):\n"
            "        Parallel()(delayed(f)(x) for x in data)"
        )
    return found[-1] if found else None


def _set_default(backend: BlockBackend | None) -> None:
    object.__setattr__(_NOT_GIVEN, "default_value", backend)  # it is frozen


@forks.in_child
def _forget() -> None:
    """End all blocks of a forked process: its parent's pools are out of its reach."""
    global _lock
    _lock = threading.Lock()
    for block in _open:
        block.is_open = False
    _open.clear()
    _set_default(None)
