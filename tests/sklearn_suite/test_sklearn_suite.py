"""scikit-learn's own tests of what has `n_jobs`, run with skyward as joblib's default backend.

What asserts on the process that it runs in is listed, with its reason, in `skyward_for_sklearn.NOT_FOR_US`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

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
    paths = [str(HERE), str(ROOT), str(ROOT / "backends")]
    command = [sys.executable, "-m", "pytest", "--pyargs", *MODULES, "-p", "skyward_for_sklearn"]

    ran = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-q", "--timeout=120", "--tb=short"],
        cwd=tmp_path,  # away from this project's pytest settings
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )

    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-5_000:]
    sent = re.search(r"(\d+) batches went to the pool", ran.stdout)
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert sent is not None
    assert passed is not None
    assert int(sent[1]) > 1000
    assert int(passed[1]) > 700
