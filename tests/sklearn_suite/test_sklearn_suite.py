"""scikit-learn's own tests of what has `n_jobs`, run with skyward as joblib's default backend.

What asserts on the process that it runs in is listed, with its reason, in `skyward_for_sklearn.NOT_FOR_US`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.foreign_suite import run_foreign_suite

PLUGIN = Path(__file__).with_name("skyward_for_sklearn.py")

MODULES = [
    "sklearn.utils.tests.test_parallel",
    "sklearn.model_selection.tests.test_search",
    "sklearn.model_selection.tests.test_validation",
    "sklearn.ensemble.tests.test_forest",
    "sklearn.ensemble.tests.test_bagging",
    "sklearn.ensemble.tests.test_voting",
    "sklearn.tests.test_multiclass",
    "sklearn.tests.test_multioutput",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scikit_learns_own_tests_pass(tmp_path: Path) -> None:
    output = run_foreign_suite(*MODULES, plugin=PLUGIN, cwd=tmp_path)

    sent = re.search(r"(\d+) batches went to the pool", output)
    passed = re.search(r"(\d+) passed", output)
    assert sent is not None
    assert passed is not None
    assert int(sent[1]) > 1000
    assert int(passed[1]) > 700
