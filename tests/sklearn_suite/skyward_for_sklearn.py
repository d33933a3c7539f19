"""A pytest plugin: scikit-learn's own tests, with skyward as joblib's default backend.

No `n_jobs` means all slots here, so that far more of them go to the pool than those that ask for two jobs.
"""

from __future__ import annotations

import contextlib
from typing import Any

import joblib.parallel
import pytest
from skyward_joblib import SkywardBackend

import skyward as sky

_REGISTRY = "asserts on a list that estimators append to when they are fitted, and they are fitted in other processes"
_ORDER = "asserts on the first fold's error, and of several that fail at once another may be the first to arrive"
_PRINTED = "asserts on what is printed in this process, and it is printed in others"

NOT_FOR_US = {
    "test_grid_search_cv_splits_consistency": "its search holds a generator, and is sent to workers with each task",
    "test_searchcv_raise_warning_with_non_finite_score": "its scorer counts its calls in this process",
    "test_search_cv_verbose_3": _PRINTED,
    "test_voting_verbose": _PRINTED,
    "test_multi_metric_search_forwards_metadata": _REGISTRY,
    "test_search_callbacks_receive_search_instance": "asserts that a callback gets the search itself, not its equal",
    "test_search_callbacks_with_partial_fit_failures": "sends a class of a function's body with plain pickle",
    "test_cross_val_predict_decision_function_shape": _ORDER,
    "test_learning_curve_params": _ORDER,
    "test_cross_val_score_score_func": "its scorer appends to a list in this process",
    "test_validation_functions_routing": _REGISTRY,
    "test_learning_curve_exploit_incremental_learning_routing": _REGISTRY,
    "test_metadata_routing_for_voting_estimators": _REGISTRY,
    "test_metadata_routing_with_dynamic_method_selection": _REGISTRY,
}

_stack = contextlib.ExitStack()
_submitted = 0


class CountingBackend(SkywardBackend):
    """Counts what goes to the pool, so that the tests can't pass without it."""

    def submit(self, func: Any, callback: Any = None) -> Any:
        global _submitted
        _submitted += 1
        return super().submit(func, callback)


def pytest_configure(config: pytest.Config) -> None:
    joblib.parallel.register_parallel_backend("skyward", CountingBackend, make_default=True)
    _stack.enter_context(sky.ComputePool(provider="local", nodes=1, concurrency=2, display="quiet"))


def pytest_unconfigure(config: pytest.Config) -> None:
    _stack.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    excluded = [i for i in items if i.name.partition("[")[0] in NOT_FOR_US]
    config.hook.pytest_deselected(items=excluded)
    items[:] = [i for i in items if i not in excluded]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{_submitted} batches went to the pool")
