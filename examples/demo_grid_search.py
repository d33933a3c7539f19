"""A grid search on handwritten digits, once in this process and once on a pool: same results, more processes.

Runs on this machine. With ``provider=sky.AWS()`` it would run on machines that exist only for the search.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import skyward as sky


class Brighten(TransformerMixin, BaseEstimator):
    """A transformer of this script's own: it travels to the workers with the search."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def fit(self, X: Any, y: Any = None) -> Brighten:
        return self

    def transform(self, X: Any) -> Any:
        return np.power(X / 16.0, self.power)


def score_and_pid(estimator: Any, X: Any, y: Any) -> dict[str, float]:
    """Score as usual, and tell which process did it."""
    return {"accuracy": estimator.score(X, y), "pid": os.getpid()}


def search(n_jobs: int) -> GridSearchCV:
    grid = {"brighten__power": [0.5, 1.0], "svc__C": [1, 10], "svc__gamma": [0.001, 0.01, 0.03]}
    model = make_pipeline(Brighten(), StandardScaler(), SVC())
    return GridSearchCV(model, grid, scoring=score_and_pid, refit="accuracy", cv=4, n_jobs=n_jobs)


def scores(fitted: GridSearchCV) -> dict[str, Any]:
    return {k: v for k, v in fitted.cv_results_.items() if k.startswith("split") and k.endswith("accuracy")}


def workers(fitted: GridSearchCV) -> set[int]:
    found = [v for k, v in fitted.cv_results_.items() if k.startswith("split") and k.endswith("pid")]
    return {int(pid) for pids in found for pid in pids}


def main() -> None:
    X, y = load_digits(return_X_y=True)

    began = time.perf_counter()
    here = search(n_jobs=1).fit(X, y)
    print(f"in this process: {time.perf_counter() - began:4.1f} s, best {here.best_params_}")

    with sky.integrations.ScikitLearnPool(provider="local", nodes=2, concurrency=2) as pool:
        print(f"dashboard:       {pool.dashboard_link}")
        began = time.perf_counter()
        there = search(n_jobs=-1).fit(X, y)
        print(f"on the pool:     {time.perf_counter() - began:4.1f} s, best {there.best_params_}")

    same = all(np.array_equal(value, scores(there)[key]) for key, value in scores(here).items())
    print(f"same best_params_:        {'yes' if here.best_params_ == there.best_params_ else 'NO'}")
    print(f"same cv_results_ scores:  {'yes' if same else 'NO'}, {12 * 4} fits each")
    print(f"worker processes:         {len(workers(there) - {os.getpid()})}")
    if not same or here.best_params_ != there.best_params_:
        raise SystemExit("the results differ, and they must not")


if __name__ == "__main__":
    main()
