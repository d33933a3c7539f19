"""The limit of open file descriptors: a process raises it when it needs more of them, as far as it may."""

from __future__ import annotations

import contextlib
import os
import resource

CALLER_PER_SLOT = 3
AGENT_PER_SLOT = 12
"""Descriptors of the caller for each slot that it reaches directly, and of the agent for each slot that it runs.

Measured 2026-11-29 with local pools of 4 and 8 slots under load: 2 in the caller, 10 in the agent, 2 in the Dask
scheduler, 1 in the parent of the workers. A worker has 25.
"""
SCHEDULER = 65_536
"""What the Dask scheduler asks for, which doesn't know how many slots will join. It runs nothing else."""
_SPARE = 128
"""Descriptors for all else. Measured on that day: 15 in the caller, 13 in the agent, 20 in the scheduler."""
_MACOS = 10_240
"""What macOS always accepts, OPEN_MAX in its sys/syslimits.h; the hard limit there may be infinity, which it is not."""


def raise_limit(more: int) -> str:
    """Raise this process's soft limit if it doesn't leave room for so many more descriptors.

    Returns
    -------
    str
        What is wrong if the hard limit doesn't allow that, and what to do; otherwise nothing. The soft limit is then as
        high as it can be.
    """
    wanted = len(os.listdir("/dev/fd")) + more + _SPARE  # noqa: PTH208 - names alone
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), min(wanted, _MACOS)):
        if _is_less(soft, limit) and not _is_less(hard, limit):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                soft = limit
    if not _is_less(soft, wanted):
        return ""
    return (
        f"may open {soft:,} files, but needs about {wanted:,} for its slots. Use fewer slots, or raise the hard limit: "
        f"`nofile` in /etc/security/limits.conf, or as root `ulimit -n {wanted}` before the program is started."
    )


def _is_less(limit: int, other: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < other
