"""The examples of training on several nodes run as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples import EXAMPLES, NEEDS, run


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem in NEEDS], ids=lambda p: p.stem)
def test_an_example_trains_on_both_nodes(path: Path, tmp_path: Path) -> None:
    for package in NEEDS[path.stem]:
        pytest.importorskip(package, reason=f"{package} is not installed: no wheel for this Python, or not asked for")

    out = run(path, tmp_path)

    figures = [float(f) for f in re.findall(r"(\d\.\d+)$", out, re.MULTILINE)]
    assert len(figures) == 2, out
    assert all(f > 0.9 for f in figures) or all(f < 0.3 for f in figures), out  # an accuracy, or a loss
