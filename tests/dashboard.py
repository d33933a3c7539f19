"""What Dask's dashboard shows: as the scheduler knows it, and as a browser does."""

from __future__ import annotations

from typing import Any

from dask.utils import key_split

from tests.chromium import Browser
from tests.waiting import wait_until


def names_shown(client: Any) -> set[str]:
    """Return the names of the tasks in the task stream, those that have ended."""
    return {key_split(task["key"]) for task in client.get_task_stream()}


def drawn(browser: Browser) -> list[dict[str, Any]]:
    """Return the bars of the task stream in the page: name, colour, duration in ms, and y, which is the slot's."""
    columns = ("name", "color", "duration", "y", "worker")
    bars = [
        dict(zip(columns, bar, strict=True))
        for table in browser.data("worker_thread")
        for bar in zip(*(table[column] for column in columns), strict=True)
    ]
    return [bar for bar in bars if bar["worker"] != "foo"]  # which Dask begins with, to have anything


def wait_until_drawn(browser: Browser, names: set[str]) -> None:
    """Return when the task stream in the page has bars of all these names."""
    wait_until(lambda: names <= {bar["name"] for bar in drawn(browser)})
