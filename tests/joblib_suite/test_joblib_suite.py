"""joblib's own tests of `Parallel`, run with skyward as the default backend.

What can't apply to a distributed backend is listed, with its reason, in `skyward_for_joblib.NOT_FOR_US`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.foreign_suite import run_foreign_suite

PLUGIN = Path(__file__).with_name("skyward_for_joblib.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_joblibs_own_tests_pass(tmp_path: Path) -> None:
    output = run_foreign_suite("joblib.test.test_parallel", plugin=PLUGIN, cwd=tmp_path)

    passed = re.search(r"(\d+) passed", output)
    assert passed is not None
    assert int(passed[1]) > 250
