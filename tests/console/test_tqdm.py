"""A bar of tqdm beside a pool's own display, on a terminal."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.console.terminal import Terminal
from tests.waiting import wait_until

PROGRAM = """
import time
import skyward as sky
from tqdm import tqdm

@sky.compute
def train(i: int) -> int:
    if i % 20 == 0:
        print("training", i)
    time.sleep(0.05)
    return i

with sky.ComputePool("local") as pool:
    results = sky.gather(*(train(i) for i in range(60)), stream=True) >> pool
    print(sum(tqdm(results, total=60)))
"""


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_a_bar_over_results_stays_one_line_that_nothing_of_ours_is_in(terminal: Terminal) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=terminal.stream, stderr=terminal.stream) as process:
        wait_until(lambda: (terminal.written, process.poll())[1] is not None)  # a terminal that nobody reads is full
    lines = [line for line in terminal.lines if line]

    assert process.returncode == 0
    assert [line for line in lines if "training" in line] == [f"[node 0] training {i}" for i in (0, 20, 40)]
    (bar,) = [line for line in lines if "%|" in line]
    assert re.fullmatch(r"100%\|█+\| 60/60 \[.*it/s\]", bar)
    first, *_, result, last = lines
    assert first.startswith("skyward: 1 node × 1 slot on local up")
    assert result == "1770"
    assert last.startswith("skyward: ended after")
    assert len(lines) == 7
