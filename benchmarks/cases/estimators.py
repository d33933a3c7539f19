"""What scikit-learn does in parallel, with estimators and data as people have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sklearn.datasets import load_digits, make_classification
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.svm import SVC

from benchmarks.case import Case, Pick, Row, each, faster, timed
from benchmarks.peers import JOBLIB


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    digits, digit = load_digits(return_X_y=True)
    data, label = make_classification(pick(5_000, 500), 40, n_informative=15, random_state=0)

    def small_fits() -> None:
        grid = {"C": [2.0**k for k in range(pick(10, 2))], "gamma": [1e-4 * 2**k for k in range(10)]}
        GridSearchCV(SVC(), grid, cv=5, n_jobs=-1).fit(digits[:300], digit[:300])

    def large_fits() -> None:
        GridSearchCV(SVC(), {"C": [1, 10, 100]}, cv=2, n_jobs=-1).fit(data, label)

    def forest() -> None:
        RandomForestClassifier(pick(200, 20), n_jobs=-1, random_state=0).fit(data, label)

    def validate() -> None:
        model = GradientBoostingClassifier(n_estimators=20, random_state=0)
        cross_validate(model, data, label, cv=10, n_jobs=-1)

    targets = (faster("loky", 1), faster("Dask", 1))
    for title, work, judged in (
        (f"GridSearchCV, {pick(500, 100)} small fits", small_fits, targets),
        ("GridSearchCV, 6 large fits", large_fits, targets),
        (f"RandomForest, {pick(200, 20)} trees", forest, targets),
        ("cross_validate, 10 fits", validate, ()),
    ):
        yield Row(title, each(peers, _on(work)), targets=judged)


def _on(work: Callable[[], None]) -> Callable[[Any], float]:
    def run(peer: Any) -> float:
        with peer.joblib():
            return timed(work)[0]

    return run


PEERS = {name: start for name, start in JOBLIB.items() if name != "Ray"}  # whose backend starts anew for each call
CASE = Case("estimators", rows, PEERS)
