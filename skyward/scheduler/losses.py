"""A plugin for the scheduler: how often a task that was lost with its worker runs again, for each task."""

from __future__ import annotations

from typing import Any

from distributed import SchedulerPlugin

LOSSES = "skyward_losses"
"""Annotation of a task: how many workers it may lose before it fails. Other tasks may lose as many as Dask allows."""


class LossesPlugin(SchedulerPlugin):  # type: ignore[misc]
    name = LOSSES

    def update_graph(self, scheduler: Any, *, annotations: Any, **_: Any) -> None:
        # Dask counts losses in `suspicious` and compares it with one number for all tasks.
        for key, losses in annotations.get(LOSSES, {}).items():
            scheduler.tasks[key].suspicious = scheduler.allowed_failures - losses
