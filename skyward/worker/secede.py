"""Calls that leave the thread pool of their Dask worker, as `distributed.secede` and `worker_client` do."""

from __future__ import annotations

import sys
import threading


def has_seceded() -> bool:
    """Tell whether this thread has left its worker's thread pool, and put right a return that was interrupted."""
    module = sys.modules.get("distributed.threadpoolexecutor")
    if module is None or getattr(module.thread_state, "proceed", True):
        return False
    me, executor = threading.current_thread(), module.thread_state.executor
    with executor._rejoin_lock:
        # Otherwise another thread would leave the pool for this one, which no longer waits for that.
        executor._rejoin_list[:] = [(thread, event) for thread, event in executor._rejoin_list if thread is not me]
        module.thread_state.proceed = has_returned = me in executor._threads
    return not has_returned
