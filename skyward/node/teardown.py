"""The end of an agent: its files are removed, all that it has started is killed, and it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time

from skyward.node import descendants
from skyward.node.config import AgentConfig
from skyward.scripts.dead_man import POWER_OFF
from skyward.scripts.volumes import UNMOUNT_ALONE

is_ending: threading.Event = threading.Event()
"""Set when the agent ends: then it tells nothing of the processes that end with it."""


def end(config: AgentConfig, *, alone: bool = False) -> None:
    """Remove all files, kill all that this agent has started, and itself: it leads its own process group.

    `alone`: without a request, as the caller is gone. A machine that exists only for the pool then sends what was
    written to its volumes and is switched off.
    """
    is_ending.set()
    for folder in (config.folder, *config.remove):
        shutil.rmtree(folder, ignore_errors=True)
    if alone and config.power_off:
        _kill_all(config.pool_id)  # what is still open can't be sent
        # None of those that are killed with the pool: it goes on when this process ends.
        unmarked = {name: value for name, value in os.environ.items() if name != "SKYWARD_POOL"}
        command = ["sh", "-c", f"{UNMOUNT_ALONE}; {POWER_OFF}", descendants.LEAVE]
        with contextlib.suppress(OSError):
            subprocess.run(command, stdin=subprocess.DEVNULL, env=unmarked, start_new_session=True)
    _kill_all(config.pool_id)
    os._exit(1)


def _kill_all(pool_id: str) -> None:
    """Kill what we have started: it is below us, has the pool's id with it, or is of the process group that we lead."""
    import psutil

    descendants.kill_descendants(os.getpid())
    group = os.getpgrp() if os.getpgrp() == os.getpid() else None
    for process in descendants.processes_of(pool_id, group=group):
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            process.kill()


def end_after(seconds: float, config: AgentConfig) -> None:
    """End the agent in so many seconds, whatever its caller does."""

    def wait() -> None:
        time.sleep(seconds)
        end(config, alone=True)

    threading.Thread(target=wait, name="dead-man", daemon=True).start()
