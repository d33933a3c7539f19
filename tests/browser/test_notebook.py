"""A pool in a notebook that is really run, as a browser shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.chromium import Browser
from tests.notebook import Notebook
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

CELLS = [
    """
import time
import skyward as sky
from tqdm import tqdm

@sky.compute
def train(i):
    if i == 0:
        print("training begins")
    time.sleep(0.1)
    return i

pool = sky.ComputePool("local", nodes=2, env={"API_TOKEN": "hunter" + "2"})
pool.__enter__()
pool
""",
    "sum(sky.gather(*(train(i) for i in range(60))) >> pool)",
    "sum(tqdm(sky.gather(*(train(i) for i in range(30)), stream=True) >> pool, total=30))",
    """
@sky.compute
def fail():
    raise ValueError("no convergence")

fail() >> pool
""",
    "pool.__exit__(None, None, None)\npool",
]


def test_a_notebook_shows_pool_progress_and_summary_and_leaves_bars_whole(
    browser: Browser, tmp_path: Path
) -> None:
    notebook = Notebook(CELLS, tmp_path)
    try:
        wait_until(lambda: "<progress" in notebook.has_put_out(0, "text/html"))
        during = notebook.page("during")
        notebook.wait()
        after = notebook.page("after")
    finally:
        notebook.close()
    browser.open(during.as_uri())
    text, links = browser.text, browser.links()
    browser.open(after.as_uri())
    ended = browser.text

    assert "2 nodes × 1 slot on local · up in" in text
    assert re.search(r"\d+ of 60 calls", text)
    assert "ComputePool · active · 2 nodes × 1 slot on local · dashboard" in text
    assert re.search(r"node machine state address\n0 local-\w{8}-0 ready 127.0.0.1\n1 local-\w{8}-1 ready", text)
    assert re.fullmatch(r"http://127.0.0.1:\d+/status", links["dashboard"])
    assert "2 nodes × 1 slot on local · ended after" in ended
    assert "91 calls, 1 failed" in ended
    assert "ComputePool · not active" in ended
    assert notebook.has_put_out(1, "text/plain") == "1770"
    assert notebook.has_put_out(1, "stdout") == "[node 0] training begins\n"
    assert notebook.has_put_out(3, "error").startswith("ValueError: no convergence")
    (bar,) = notebook.has_put_out(2, "stderr").splitlines()  # and nothing of ours beside it
    assert bar.startswith("100%|")
    assert "".join(notebook.has_put_out(cell, "stderr") for cell in (0, 1, 3, 4)) == ""
    for page in (text, ended):
        assert "hunter2" not in page
        assert "\x1b" not in page
        assert not re.search(r"\[[\d;]+m", page)  # what is left of a colour
    assert browser.complaints() == []
