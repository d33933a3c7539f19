"""Every file in examples/ runs as it is; those that need frameworks for training are in `tests/frameworks`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples import EXAMPLES, NEEDS, run


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem not in NEEDS], ids=lambda p: p.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    run(path, tmp_path)


@pytest.mark.slow
def test_the_demo_tells_of_equal_results_processes_and_dashboard(tmp_path: Path) -> None:
    out = run(next(p for p in EXAMPLES if p.stem == "demo_grid_search"), tmp_path)

    assert "same best_params_:        yes" in out
    assert "same cv_results_ scores:  yes" in out
    assert "worker processes:         4" in out
    assert "http://127.0.0.1:" in out
