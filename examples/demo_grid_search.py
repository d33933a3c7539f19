"""A grid search on handwritten digits, in one process and then on a pool: the same results, in less time.

The pool is on this machine, with a slot for each core. With ``provider=sky.AWS()`` it would be on machines that exist
only for the search. ``--quick`` searches a small grid, for which starting the pool takes longer than it saves.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import joblib
import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline

import skyward as sky

QUICK = {"blur__strength": [0.0, 0.2], "forest__max_features": [4, 8]}
FULL = {
    "blur__strength": [0.0, 0.1, 0.2, 0.5],
    "forest__max_features": [4, 8],
    "forest__min_samples_leaf": [1, 2],
    "forest__criterion": ["gini", "entropy"],
}
FOLDS = 4


class Blur(TransformerMixin, BaseEstimator):
    """Add its neighbours to each pixel. A transformer of this script: it travels to the workers with the search."""

    def __init__(self, strength: float = 0.0) -> None:
        self.strength = strength

    def fit(self, X: Any, y: Any = None) -> Blur:
        return self

    def transform(self, X: Any) -> Any:
        images = X.reshape(-1, 8, 8)
        neighbours = sum(np.roll(images, step, axis) for axis in (1, 2) for step in (-1, 1))
        return (images + self.strength * neighbours).reshape(X.shape)


def score_and_pid(estimator: Any, X: Any, y: Any) -> dict[str, float]:
    """Score as usual, and report which process did it."""
    return {"accuracy": estimator.score(X, y), "pid": os.getpid()}


def search(grid: dict[str, list[Any]], n_jobs: int) -> GridSearchCV:
    model = Pipeline([("blur", Blur()), ("forest", RandomForestClassifier(50, random_state=0))])
    return GridSearchCV(model, grid, scoring=score_and_pid, refit="accuracy", cv=FOLDS, n_jobs=n_jobs)


def of_splits(fitted: GridSearchCV, metric: str) -> dict[str, Any]:
    return {k: v for k, v in fitted.cv_results_.items() if k.startswith("split") and k.endswith(metric)}


def main() -> None:
    grid = QUICK if "--quick" in sys.argv else FULL
    X, y = load_digits(return_X_y=True)
    cores = joblib.cpu_count()
    nodes = min(cores, 2)
    slots = nodes * min(cores // nodes, 4)  # a slot more than there are cores would only slow the others down
    candidates = int(np.prod([len(values) for values in grid.values()]))
    print(f"{candidates} candidates, {FOLDS} folds each, on {cores} cores. First in one process ...", flush=True)

    began = time.perf_counter()
    here = search(grid, n_jobs=1).fit(X, y)
    one_process = time.perf_counter() - began

    began = time.perf_counter()
    with sky.integrations.ScikitLearnPool(provider="local", nodes=nodes, concurrency=slots // nodes) as pool:
        up = time.perf_counter()
        print(f"Now on the pool. Its dashboard: {pool.dashboard_link}", flush=True)
        there = search(grid, n_jobs=-1).fit(X, y)
        done = time.perf_counter()
    on_pool = time.perf_counter() - began

    processes = {int(pid) for pids in of_splits(there, "pid").values() for pid in pids} - {os.getpid()}
    same_best = here.best_params_ == there.best_params_
    scores = of_splits(there, "accuracy")
    same_scores = all(np.array_equal(value, scores[key]) for key, value in of_splits(here, "accuracy").items())
    print()
    print("                            seconds   ratio")
    print(f"one process                 {one_process:7.1f}    1.00")
    print(f"pool: start and end         {on_pool - (done - up):7.1f}")
    print(f"pool: search on {slots} slots     {done - up:7.1f}    {(done - up) / one_process:.2f}")
    print(f"pool: all                   {on_pool:7.1f}    {on_pool / one_process:.2f}")
    print()
    print(f"same best parameters        {'yes' if same_best else 'NO'}: {here.best_params_}")
    print(f"same scores of {candidates * FOLDS:3} fits     {'yes' if same_scores else 'NO'}")
    print(f"worker processes            {len(processes)}")
    if not same_best or not same_scores:
        raise SystemExit("the results differ, and they must not")


if __name__ == "__main__":
    main()
