"""Dask's nanny, with what worker processes of our own need beyond it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distributed import Nanny


class SlotNanny(Nanny):  # type: ignore[misc]
    """Keeps a worker process in a slot, and calls `on_exit` with the address of each one that has ended."""

    def __init__(self, *args: Any, on_exit: Callable[[str | None], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self._on_exit = on_exit

    def _on_worker_exit_sync(self, exitcode: int) -> None:
        self._on_exit(self.worker_address)  # before the next process reads the pipes
        super()._on_worker_exit_sync(exitcode)
