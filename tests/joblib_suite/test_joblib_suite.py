"""joblib's own tests of `Parallel`, run with skyward as the default backend.

What can't apply to a distributed backend is listed, with its reason, in `skyward_for_joblib.NOT_FOR_US`.
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_joblibs_own_tests_pass(tmp_path: Path) -> None:
    paths = [str(HERE), str(ROOT), str(ROOT / "backends")]
    command = [sys.executable, "-m", "pytest", "--pyargs", "joblib.test.test_parallel", "-p", "skyward_for_joblib"]

    ran = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-q", "--timeout=120", "--tb=short"],
        cwd=tmp_path,  # away from this project's pytest settings
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )

    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-5_000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None
    assert int(passed[1]) > 250
