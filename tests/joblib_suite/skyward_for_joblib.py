"""A pytest plugin: joblib's own tests, with skyward as the default backend and wherever they name loky.

Tests that joblib makes for each of several backends are made for this one only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import joblib.parallel
import joblib.testing
import pytest
from skyward_joblib import SkywardBackend

import skyward as sky

NOT_FOR_US = {
    "test_effective_n_jobs_None": (
        "no n_jobs means 1 there; here it means all slots, as with joblib's own backend for Dask: a pool was asked for"
    ),
    "test_nested_backend_in_sequential": "the same: it expects that no n_jobs means 1",
    "test_error_capture": "looks at the executor inside loky's backend",
    "test_dispatch_multiprocessing": "shares a multiprocessing.Manager, which only child processes may talk to",
    "test_initializer_parallel": "the same, and `initializer` is an option of loky's executor; ours refuses it",
    "test_initializer_context": "`initializer` is an option of loky's executor; ours refuses it by name",
    "test_parallel_with_interactively_defined_functions": (
        "starts a process of its own, in which no pool is active; tests/joblib has the same on a pool"
    ),
    "test_parallel_with_unpicklable_functions_in_args": "the same",
    "test_auto_memmap_on_arrays_from_generator": (
        "asserts that large arrays are np.memmap; ours are plain arrays over read-only shared memory"
    ),
    "test_memmapping_leaks": "looks at joblib's folder of memmaps, which is not used",
    "test_backend_batch_statistics_reset": "looks at private figures of joblib's own batching",
    "test_backend_hinting_and_constraints": "asserts that the default backend is loky, by its class",
    "test_threadpool_limitation_in_child_loky[-2]": "divides the cores of this machine, not those of the pool's nodes",
    "test_threadpool_limitation_in_child_override": (
        "sets environment variables after the workers have started; a pool takes them as env="
    ),
}

_stack = contextlib.ExitStack()
_OTHERS = ("multiprocessing", "threading", "sequential")
_parametrize = joblib.testing.parametrize


def _parametrize_for_us(names: Any, values: Iterable[Any], **options: Any) -> Any:
    values = list(values)
    if "loky" in values:
        values = [v for v in values if v not in ("loky", *_OTHERS)]
        values += [] if "skyward" in values else ["skyward"]
    return _parametrize(names, values, **options)


def pytest_configure(config: pytest.Config) -> None:
    # Before the tests are imported: they make their lists of backends then.
    joblib.parallel.register_parallel_backend("skyward", SkywardBackend, make_default=True)
    joblib.testing.parametrize = _parametrize_for_us
    _stack.enter_context(sky.ComputePool(provider="local", nodes=2, concurrency=2, display="quiet"))


def pytest_unconfigure(config: pytest.Config) -> None:
    _stack.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    excluded = [i for i in items if _reason(i)]
    names = {name for i in excluded for name in (i.name, i.name.partition("[")[0])}
    stale = sorted(set(NOT_FOR_US) - names)
    if stale:
        raise pytest.UsageError(f"joblib has no such tests any more: {', '.join(stale)}")
    config.hook.pytest_deselected(items=excluded)
    items[:] = [i for i in items if not _reason(i)]


def _reason(item: pytest.Item) -> str | None:
    return NOT_FOR_US.get(item.name) or NOT_FOR_US.get(item.name.partition("[")[0])
