"""What Dask's dashboard shows."""

from __future__ import annotations

from typing import Any

from dask.utils import key_split


def names_shown(client: Any) -> set[str]:
    """Return the names of the tasks in the task stream, those that have ended."""
    return {key_split(task["key"]) for task in client.get_task_stream()}
