"""The processes that a pool has started on a machine, whatever they have become: found, and killed.

A process can leave its group and session, and clear its environment. On Linux it can't leave the tree below the agent:
an orphan becomes a child of its nearest ancestor that has asked for that, see PR_SET_CHILD_SUBREAPER in prctl(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterator

import psutil

from skyward.scripts.steps import POOL

LEAVE = "skyward-leave"
"""Names the process that sends what was written to volumes when the agent ends alone."""
SEPARATE = ("skyward.node.agent", "skyward.cleanup.guardian", LEAVE)
"""What stands in the command lines of processes that end by themselves: `LEAVE`, and those of pools that calls open."""
TRACKER = "resource_tracker"
"""multiprocessing's: it ends when all others have, and removes their semaphores first."""
_KILL_S = 5.0
"""Seconds in which killed processes end, unless they wait for a device. Chosen, not measured."""
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Let orphans among the descendants of this process become its children. Does nothing where there is no prctl."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants(pid: int) -> None:
    """Kill all that descends from a process, which lives on, until nothing is left of them."""
    deadline = time.monotonic() + _KILL_S
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error):
            found = list(_descendants(psutil.Process(pid)))
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, timeout=0.1)
            if found:
                continue
        return


def _descendants(root: psutil.Process) -> Iterator[psutil.Process]:
    for child in root.children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            command = " ".join(child.cmdline())
            if TRACKER in command or any(module in command for module in SEPARATE):
                continue
            yield from _descendants(child)
            if child.status() != psutil.STATUS_ZOMBIE:
                yield child


def processes_of(pool_id: str, *, group: int | None = None) -> Iterator[psutil.Process]:
    """Yield the processes that have the pool's id in their environment, or are of a process group; not this one."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # gone meanwhile, or another user's
            is_ours = os.getpgid(process.pid) == group or process.environ().get(POOL) == pool_id
            if is_ours and process.pid != os.getpid() and TRACKER not in " ".join(process.cmdline()):
                yield process
