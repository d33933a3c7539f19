"""Every file in examples/ runs as it is; those that need frameworks for training are in `tests/frameworks`."""

from __future__ import annotations

import re
from pathlib import Path

import joblib
import pytest

from tests.examples import EXAMPLES, NEEDS, run

DEMO = next(p for p in EXAMPLES if p.stem == "demo_grid_search")


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem not in NEEDS and p != DEMO], ids=lambda p: p.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    run(path, tmp_path)


@pytest.mark.slow
def test_the_demo_shows_equal_results_times_and_processes(tmp_path: Path) -> None:
    out = run(DEMO, tmp_path, "--quick")

    assert "http://127.0.0.1:" in out
    assert re.search(r"^one process +\d+\.\d +1\.00$", out, re.MULTILINE)
    slots = re.search(r"^pool: search on (\d+) slots +\d+\.\d +\d+\.\d\d$", out, re.MULTILINE)
    assert slots is not None
    assert int(slots[1]) <= joblib.cpu_count()
    assert re.search(r"^pool: all +\d+\.\d +\d+\.\d\d$", out, re.MULTILINE)
    assert "same best parameters        yes: " in out
    assert "same scores of  16 fits     yes" in out
    assert f"worker processes            {slots[1]}\n" in out
