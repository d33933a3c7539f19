"""Every file in examples/ runs as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=170)

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.slow
def test_the_demo_tells_of_equal_results_processes_and_dashboard(tmp_path: Path) -> None:
    demo = next(p for p in EXAMPLES if p.stem == "demo_grid_search")

    out = subprocess.run(
        [sys.executable, demo], cwd=tmp_path, capture_output=True, text=True, timeout=170, check=True
    ).stdout

    assert "same best_params_:        yes" in out
    assert "same cv_results_ scores:  yes" in out
    assert "worker processes:         4" in out
    assert "http://127.0.0.1:" in out
