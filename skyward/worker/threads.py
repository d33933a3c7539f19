"""How many threads numeric libraries use: the cores of a slot, or of the node for a call that is alone there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from skyward.transfer.wire import Participant
from skyward.worker.variables import variables

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "LOKY_MAX_CPU_COUNT",  # what joblib.cpu_count() goes by, and with it LightGBM and scikit-learn
)


def thread_environment(cores: int) -> dict[str, str]:
    """Return the environment variables that limit numeric libraries to `cores` threads.

    ``PYTHON_CPU_COUNT`` is not one of them: `os.cpu_count` tells what the machine has.
    """
    return dict.fromkeys(_THREAD_VARIABLES, str(cores))


def node_cores(part: Participant | None) -> int:
    """Return how many cores the node has, for a participant that is alone there; 0 for all others."""
    return int(os.environ.get("SKYWARD_NODE_CORES", "0")) if part and part.workers_per_node == 1 else 0


@contextlib.contextmanager
def whole_node(part: Participant | None) -> Iterator[None]:
    """Give a task that is alone on its node, one of a broadcast, all the node's cores."""
    cores = node_cores(part)
    if not cores:
        yield
        return
    import threadpoolctl

    with variables(thread_environment(cores)), threadpoolctl.threadpool_limits(limits=cores):
        yield
