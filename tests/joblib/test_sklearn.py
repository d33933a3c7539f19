"""scikit-learn on a pool gives what it gives in one process, to the last bit."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
from joblib import parallel_config
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_diabetes, load_iris
from sklearn.ensemble import BaggingClassifier, RandomForestClassifier, RandomForestRegressor, VotingClassifier
from sklearn.exceptions import FitFailedWarning
from sklearn.experimental import enable_halving_search_cv  # noqa: F401 - makes HalvingGridSearchCV importable
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    cross_val_predict,
    cross_validate,
    learning_curve,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.parallel import Parallel, delayed

import skyward as sky

X, y = load_iris(return_X_y=True)
XR, yr = load_diabetes(return_X_y=True)
TARGETS = np.column_stack([yr, yr**2 / 100])


@pytest.fixture(autouse=True)
def on_pool(pool: sky.ComputePool) -> Iterator[None]:
    with sky.integrations.sklearn_backend(pool):
        yield


def results(search: Any) -> dict[str, Any]:
    return {k: np.asarray(v) for k, v in search.cv_results_.items() if "time" not in k and not k.startswith("param")}


def grid_search(n_jobs: int) -> Any:
    return results(GridSearchCV(SVC(), {"C": [1, 10], "gamma": [0.01, 0.1]}, n_jobs=n_jobs, cv=3).fit(X, y))


def randomized_search(n_jobs: int) -> Any:
    search = RandomizedSearchCV(SVC(), {"C": np.logspace(-2, 2, 50)}, n_iter=6, n_jobs=n_jobs, cv=3, random_state=0)
    return results(search.fit(X, y))


def halving_search(n_jobs: int) -> Any:
    search = HalvingGridSearchCV(SVC(), {"C": [0.1, 1, 10]}, n_jobs=n_jobs, cv=3, random_state=0)
    return results(search.fit(X, y))


def validation(n_jobs: int) -> Any:
    found = cross_validate(
        RandomForestClassifier(8, random_state=0), X, y, cv=4, n_jobs=n_jobs, return_train_score=True
    )
    return {k: v for k, v in found.items() if "time" not in k}


def predictions(n_jobs: int) -> Any:
    model = LogisticRegression(max_iter=500)
    return {"p": cross_val_predict(model, X, y, cv=4, n_jobs=n_jobs, method="predict_proba")}


def curve(n_jobs: int) -> Any:
    sizes, train, test = learning_curve(GaussianNB(), X, y, cv=3, n_jobs=n_jobs, shuffle=True, random_state=0)
    return {"sizes": sizes, "train": train, "test": test}


def importance(n_jobs: int) -> Any:
    model = DecisionTreeClassifier(random_state=0).fit(X, y)
    found = permutation_importance(model, X, y, n_repeats=5, n_jobs=n_jobs, random_state=0)
    return {"importances": found.importances}


def forest(n_jobs: int) -> Any:
    model = RandomForestClassifier(60, n_jobs=n_jobs, random_state=0, oob_score=True).fit(X, y)
    return {"p": model.predict_proba(X), "oob": model.oob_decision_function_, "imp": model.feature_importances_}


def forest_regressor(n_jobs: int) -> Any:
    return {"p": RandomForestRegressor(10, n_jobs=n_jobs, random_state=0).fit(XR, yr).predict(XR)}


def bagging(n_jobs: int) -> Any:
    model = BaggingClassifier(DecisionTreeClassifier(), 8, n_jobs=n_jobs, random_state=0).fit(X, y)
    return {"p": model.predict_proba(X)}


def voting(n_jobs: int) -> Any:
    members = [("svc", SVC()), ("nb", GaussianNB()), ("tree", DecisionTreeClassifier(random_state=0))]
    model = VotingClassifier(members, n_jobs=n_jobs).fit(X, y)
    return {"p": model.predict(X), "t": model.transform(X)}


def one_vs_rest(n_jobs: int) -> Any:
    model = OneVsRestClassifier(SVC(), n_jobs=n_jobs).fit(X, y)
    return {"p": model.decision_function(X)}


def multi_output(n_jobs: int) -> Any:
    return {"p": MultiOutputRegressor(Ridge(), n_jobs=n_jobs).fit(XR, TARGETS).predict(XR)}


def nested(n_jobs: int) -> Any:
    inner = RandomForestClassifier(6, n_jobs=2, random_state=0)
    return results(GridSearchCV(inner, {"max_depth": [2, 4]}, n_jobs=n_jobs, cv=3).fit(X, y))


@pytest.mark.parametrize(
    "run",
    [
        grid_search, randomized_search, halving_search, validation, predictions, curve, importance, forest,
        forest_regressor, bagging, voting, one_vs_rest, multi_output, nested,
    ],
)  # fmt: skip
def test_results_are_those_of_a_serial_run(run: Any, pool: sky.ComputePool) -> None:
    with parallel_config("sequential"):
        expected = run(1)
    sent = 0
    engine = pool.engine
    submit = engine.submit

    def count(*args: Any, **options: Any) -> Any:
        nonlocal sent
        sent += 1
        return submit(*args, **options)

    engine.submit = count  # type: ignore[method-assign]
    try:
        found = run(-1)
    finally:
        engine.submit = submit  # type: ignore[method-assign]

    assert sent > 0
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


def test_sklearns_configuration_is_carried_to_the_workers() -> None:
    def assume_finite() -> bool:
        return bool(sklearn.get_config()["assume_finite"])

    with sklearn.config_context(assume_finite=True):
        inside = Parallel()(delayed(assume_finite)() for _ in range(4))
    outside = Parallel()(delayed(assume_finite)() for _ in range(4))

    assert inside == [True] * 4
    assert outside == [False] * 4


class Fragile(ClassifierMixin, BaseEstimator):
    """Fails for one value of its parameter."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def fit(self, X: Any, y: Any) -> Fragile:
        if self.value == 1:
            raise ValueError("value 1 does not work")
        self.classes_ = np.unique(y)
        return self

    def predict(self, X: Any) -> Any:
        return np.zeros(len(X), dtype=int)


def test_fits_that_fail_are_warned_of_here_as_without_a_pool() -> None:
    search = GridSearchCV(Fragile(), {"value": [0, 1]}, cv=2, n_jobs=-1)

    with (
        pytest.warns(FitFailedWarning, match="2 fits failed out of a total of 4"),
        pytest.warns(UserWarning, match="non-finite"),
    ):
        search.fit(X, y)

    assert np.isnan(search.cv_results_["mean_test_score"][1])


def test_a_pipeline_with_a_transformer_of_the_script_runs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import numpy as np
            from sklearn.base import BaseEstimator, TransformerMixin
            from sklearn.datasets import load_iris
            from sklearn.model_selection import GridSearchCV
            from sklearn.pipeline import Pipeline
            from sklearn.svm import SVC
            import skyward as sky

            class Power(TransformerMixin, BaseEstimator):
                def __init__(self, power=1.0): self.power = power
                def fit(self, X, y=None): return self
                def transform(self, X): return np.power(X, self.power)

            X, y = load_iris(return_X_y=True)
            pipe = Pipeline([("power", Power()), ("svc", SVC())])
            grid = {"power__power": [0.5, 1.0, 2.0], "svc__C": [1, 10]}
            serial = GridSearchCV(pipe, grid, cv=3).fit(X, y)
            with sky.integrations.ScikitLearnPool("local", concurrency=2, display="quiet"):
                pooled = GridSearchCV(pipe, grid, cv=3, n_jobs=-1).fit(X, y)
            assert serial.best_params_ == pooled.best_params_
            a, b = serial.cv_results_["mean_test_score"], pooled.cv_results_["mean_test_score"]
            assert (a == b).all(), (a, b)
            assert isinstance(pooled.best_estimator_.named_steps["power"], Power)
            print("same")
            """
        )
    )

    ran = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=150)

    assert ran.stdout == "same\n", ran.stdout + ran.stderr
