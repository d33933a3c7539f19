"""A grid search of scikit-learn on every slot of a pool: only the `with` line is new."""

from __future__ import annotations

from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import skyward as sky


def main() -> None:
    x, y = load_digits(return_X_y=True)
    search = GridSearchCV(SVC(), {"C": [1, 10, 100], "gamma": [0.0005, 0.001, 0.002]}, cv=3, n_jobs=-1)
    with sky.integrations.ScikitLearnPool(nodes=2, concurrency=2):
        search.fit(x, y)
    print(f"best: {search.best_params_}, accuracy {search.best_score_:.3f}")


if __name__ == "__main__":
    main()
