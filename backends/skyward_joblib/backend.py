"""The backend: joblib's batches become calls of a skyward engine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, NoReturn

from joblib._parallel_backends import FallbackToBackend, ParallelBackendBase, SequentialBackend
from joblib.parallel import BatchedCalls, parallel_config

import skyward as sky
from skyward import user_errors
from skyward.engine import Call
from skyward.worker.variables import variables
from skyward_joblib.arrays import access
from skyward_joblib.resolve import engine_for

if TYPE_CHECKING:
    from skyward.engine import Engine, FutureGroup

Task = tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]


class SkywardBackend(ParallelBackendBase):  # type: ignore[misc]
    """Runs `joblib.Parallel` on a pool.

    Parameters
    ----------
    pool
        An active `skyward.ComputePool`. None: the client's, else the pool that is active where the work is started,
        else the current Dask client.
    client
        A `distributed.Client` whose cluster is to be joined.
    inner_max_num_threads
        Threads that numeric libraries may use inside a task; None: the cores of a slot.
    """

    nesting_level: int | None
    default_n_jobs = -1
    supports_retrieve_callback = True
    supports_inner_max_num_threads = True

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        *,
        pool: Any = None,
        client: Any = None,
        **backend_kwargs: Any,
    ) -> None:
        if backend_kwargs:
            _refuse(backend_kwargs)
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self._pool = pool
        self._client = client
        self._engine: Engine | None = None
        self._group: FutureGroup | None = None
        self._asked = 1
        self._started_with = 1
        self._in_flight = self._tasks_in_flight = 0
        self._batches = BatchSizes()
        self.parallel: Any = None

    def __reduce__(self) -> Any:
        # On a worker there is no pool to reach: what arrives there runs its work in place.
        return SkywardBackend, (self.nesting_level, self.inner_max_num_threads)

    @property
    def target(self) -> Any:
        """The pool or Dask client that was named."""
        return self._client if self._pool is None else self._pool

    # --- how much at once -----------------------------------------------------------------------------------

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs == 1 or sky.instance_info() is not None:
            return 1  # inside a task: the pool's slots are for tasks, and one that waits for others could wait for ever
        engine = engine_for(self._pool, self._client)
        if n_jobs is None:
            n_jobs = self.default_n_jobs
        return _count(n_jobs, engine)

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        *,
        max_nbytes: int | None = 1 << 20,
        mmap_mode: str | None = "r",
        pool: Any = None,
        client: Any = None,
        **options: Any,
    ) -> int:
        if unknown := options.keys() - _IGNORED_OPTIONS:
            _refuse(unknown)
        if (pool, client) not in ((None, None), (self._pool, self._client)):
            self._fall_back(parallel, pool, client)
        effective = self.effective_n_jobs(n_jobs)
        if effective == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        engine = engine_for(self._pool, self._client)
        how = access(max_nbytes, mmap_mode, engine)
        with _taking:
            if is_free := self.parallel in (None, parallel):
                self.parallel = parallel
        if not is_free:
            self._fall_back(parallel, self._pool, self._client)
        self.nesting_level = self.nesting_level or 0
        self._asked = n_jobs
        self._started_with = effective
        self._in_flight = self._tasks_in_flight = 0
        self._engine = engine
        # A count below zero grows with the pool, so only a count that was named is a limit.
        self._group = engine.group(limit=n_jobs if n_jobs > 0 else None, access=how)
        self._group.may_grow = self._may_grow
        return effective

    def _fall_back(self, parallel: Any, pool: Any, client: Any) -> NoReturn:
        """Let `parallel` have its own backend: this one serves another, in another thread or read as a generator."""
        own = type(self)(self.nesting_level, self.inner_max_num_threads, pool=pool, client=client)
        own.parallel = parallel
        raise FallbackToBackend(own)

    def _may_grow(self) -> bool:
        return getattr(self.parallel, "_original_iterator", None) is not None

    def terminate(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = self._engine = None
        self._batches = BatchSizes()
        self.parallel = None  # from here on it may serve another

    # --- work -----------------------------------------------------------------------------------------------

    def submit(self, func: Any, callback: Callable[[Any], None] | None = None) -> Any:
        engine, group = self._engine, self._group
        assert engine is not None
        assert group is not None
        tasks = len(func) if isinstance(func, BatchedCalls) else 1
        self._in_flight += 1
        self._tasks_in_flight += tasks
        alone = not self._batches.is_short(tasks)
        try:
            future = engine.submit(_call(func, self.inner_max_num_threads, alone=alone), group=group)
        except BaseException as exc:
            if user_errors.ends_program(exc):
                raise
            # Work that can't be pickled, or a pool that has ended. joblib may call this in a thread where an exception
            # is lost, so it gets a failed task instead.
            future = concurrent.futures.Future()
            future.set_exception(exc)
        if callback is not None:
            # It takes further tasks from the caller's iterable, which may itself use a pool: that of this context.
            context = contextvars.copy_context()
            future.add_done_callback(lambda done: context.run(callback, done))
        return future

    def retrieve_result_callback(self, out: concurrent.futures.Future[Any]) -> Any:
        self._in_flight -= 1
        if (error := out.exception()) is not None:
            raise _open(error)
        values, seconds = out.result()
        self._tasks_in_flight -= len(values)
        self._batches.observe(len(values), seconds)
        return values

    def compute_batch_size(self) -> int:
        return self._batches.size

    def batch_completed(self, batch_size: int, duration: float) -> None:
        """Send more, where one batch for each that is done, as joblib does by itself, leaves slots with nothing to do.

        That is so while there are more slots than when the call began, and with batches that take no longer than
        their way there: the last tasks of short ones, which joblib cuts into many.
        """
        engine, parallel = self._engine, self.parallel
        if engine is None or parallel is None:
            return
        now = _count(self._asked, engine)
        has_grown = now > self._started_with
        with parallel._lock:
            if has_grown:
                parallel._cached_effective_n_jobs = now
            while parallel._original_iterator is not None and not parallel._aborting:
                is_idle = has_grown and self._in_flight < 2 * now
                is_short = not parallel._ready_batches.empty() and self._batches.is_short(self._tasks_in_flight / now)
                if not is_idle and not is_short:
                    break
                parallel.dispatch_next()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Drop what waits and interrupt what runs, on the cluster. The backend stays ready either way."""
        if self._group is not None and self._engine is not None:
            self._group.cancel()
            self._group.close()
            self._group = self._engine.group(limit=self._group.limit, access=self._group.access)
            self._group.may_grow = self._may_grow
        self._in_flight = self._tasks_in_flight = 0


class BatchSizes:
    """How many tasks a batch should hold, from the run time that workers measured."""

    TARGET_S = 0.15
    """Seconds of work per batch: far more than its overhead, little enough to share out evenly."""
    GROWTH = 8
    """At most so many times the last size: the first tasks may not be like the others."""
    SHORT_S = 0.02
    """Seconds of work that are no more than a few ways to a worker and back."""

    def __init__(self) -> None:
        self.size: int = 1
        self._seconds = self._tasks = 0.0  # the last batches' count most, and among them the large ones'

    def observe(self, tasks: int, seconds: float) -> None:
        self._seconds = 0.5 * self._seconds + seconds
        self._tasks = 0.5 * self._tasks + tasks
        ideal = int(self.TARGET_S * self._tasks / max(self._seconds, 1e-6))
        self.size = max(1, min(ideal, self.GROWTH * self.size))

    def is_short(self, tasks: float) -> bool:
        """Tell whether so many tasks are known to take less than `SHORT_S`."""
        return self._tasks > 0 and tasks * self._seconds < self.SHORT_S * self._tasks


_taking = threading.Lock()  # held while a backend begins to serve a `Parallel`

_IGNORED_OPTIONS = {"prefer", "require", "verbose", "temp_folder", "context"}
"""Options that joblib hands to each backend and sees to itself, or that mean nothing on a pool: see its docs."""


def _refuse(names: Iterable[str]) -> NoReturn:
    raise TypeError(f"the skyward backend takes pool= or client=, not {', '.join(sorted(names))}")


def _count(n_jobs: int, engine: Engine) -> int:
    """Return how many jobs `n_jobs` means: below zero it is counted back from all slots, as joblib does.

    On a joined cluster, which may grow, that is at least 2: joblib runs a single job in the caller.
    """
    return n_jobs if n_jobs > 0 else max(2 if engine.is_joined else 1, engine.slots + 1 + n_jobs)


def _call(func: Any, threads: int | None, *, alone: bool) -> Call:
    if not isinstance(func, BatchedCalls):
        return Call(_run_other, (func, threads), alone=alone, name=_name(func))
    # The parts rather than the whole: it would carry joblib's cache of pickled functions along.
    tasks, nested = [_unbound(*task) for task in func.items], (func._backend, func._n_jobs)
    first = tasks[0][0] if tasks else _run
    facts = {"alone": alone, "name": _name(first), "tasks": len(tasks), "owner": _owner(func.items)}
    if all(task[0] is first for task in tasks):
        # One function for all: the engine pickles it once for all batches, and workers keep it.
        calls = [(args, kwargs) for _, args, kwargs in tasks]
        return Call(_same(first), (calls, nested, threads), **facts)
    return Call(_run, (tasks, nested, threads), **facts)


def _owner(tasks: Sequence[Task]) -> Any:
    """Return the object of the first task's function, if that is a bound method."""
    first = tasks[0][0] if tasks else None
    return first.__self__ if isinstance(first, MethodType) else None


def _unbound(fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Task:
    """Return a task whose function is no bound method: each access makes a new one, and its object is an argument."""
    return (fn.__func__, (fn.__self__, *args), kwargs) if isinstance(fn, MethodType) else (fn, args, kwargs)


def _open(error: BaseException) -> BaseException:
    """Return an exception whose traceback can be set, as joblib does: that of a frozen dataclass can't."""
    try:
        error.__traceback__ = None
    except Exception:  # whatever its __setattr__ raises
        kind = type(error)
        members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        opened = type(kind.__name__, (kind,), {**members, "__setattr__": BaseException.__setattr__})
        BaseException.__setattr__(error, "__class__", opened)
    return error


def _name(fn: Any) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__name__", None) or type(fn).__name__


_last_same = threading.local()


def _same(fn: Callable[..., Any]) -> functools.partial[tuple[list[Any], float]]:
    """Return the same object again for the same function, so that the engine recognises it."""
    last: functools.partial[Any] | None = getattr(_last_same, "value", None)
    if last is None or last.args[0] is not fn:
        last = _last_same.value = functools.partial(_run_same, fn)
        last.__name__ = last.__qualname__ = _name(fn)  # type: ignore[attr-defined]  # for messages
    return last


def _run_same(
    fn: Callable[..., Any], calls: Sequence[tuple[Any, Any]], nested: Any, threads: int | None
) -> tuple[list[Any], float]:
    """Run one function with each of several arguments."""
    began = time.perf_counter()
    with _inside(nested, threads):
        values = [fn(*args, **kwargs) for args, kwargs in calls]
    return values, time.perf_counter() - began


def _run(tasks: Sequence[Task], nested: Any, threads: int | None) -> tuple[list[Any], float]:
    began = time.perf_counter()
    with _inside(nested, threads):
        values = [fn(*args, **kwargs) for fn, args, kwargs in tasks]
    return values, time.perf_counter() - began


def _run_other(func: Callable[[], Any], threads: int | None) -> tuple[Any, float]:
    began = time.perf_counter()
    with _limit_threads(threads):
        values = func()
    return values, time.perf_counter() - began


def _inside(nested: tuple[Any, int | None], threads: int | None) -> contextlib.ExitStack:
    """Be in a task: nested work goes to `nested`, numeric libraries use so many threads."""
    backend, n_jobs = nested
    stack = _limit_threads(threads)
    stack.enter_context(parallel_config(backend=backend, n_jobs=n_jobs))
    return stack


def _limit_threads(threads: int | None) -> contextlib.ExitStack:
    # No generator as a context manager: it would set the traceback of a task's exception, which a frozen one refuses.
    stack = contextlib.ExitStack()
    if threads is not None:
        import threadpoolctl

        # The variables are for libraries that are loaded later, and for processes that the task starts.
        environment = variables(dict.fromkeys(ParallelBackendBase.MAX_NUM_THREADS_VARS, str(threads)))
        environment.__enter__()
        stack.callback(environment.__exit__, None, None, None)
        stack.enter_context(threadpoolctl.threadpool_limits(limits=threads))
    return stack
