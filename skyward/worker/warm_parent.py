"""The process that workers are forked from: it imports the modules of `Image(preload=...)`, once for all its slots."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from skyward.transfer import sources

VARIABLE = "SKYWARD_PRELOAD"
"""Names the modules. They stay out of command lines, by which processes are told apart."""

_CUDA = "/dev/nvidia-uvm"
"""What a process has open once it has initialised CUDA."""

_error = ""
_warnings: list[str] = []


def load() -> None:
    """Import the modules, in this process. A failure is kept for `outcome`, and its traceback is printed."""
    global _error
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # standard input is the agent's: the caller's commands
    os.close(null)
    sources.preloaded_at = time.time()
    for name in os.environ.pop(VARIABLE, "").split():
        try:
            __import__(name)  # its tracebacks are without importlib's frames
        except BaseException as exc:  # SystemExit too: this process is needed for `outcome`
            traceback.print_exc()
            _error = f"Image(preload=...): {name} can't be imported: {type(exc).__name__}: {exc}"
        if not _error and _has_cuda():
            _error = (
                f"Image(preload=...): importing {name} initialises CUDA, which doesn't work in processes that are "
                "forked afterwards. Leave it out of preload=."
            )
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a module may have replaced or closed them
            sys.stdout.flush()  # into the agent's log, before workers inherit it
            sys.stderr.flush()
        if _error:
            return
        if not _warnings and _leaves_threads():
            _warnings.append(
                f"Image(preload=...): importing {name} starts threads, which the worker processes don't have. If "
                "calls hang, leave it out of preload=."
            )
    gc.freeze()  # a collection in a worker would write to, and so copy, the memory of all these objects


def outcome() -> tuple[str, list[str]]:
    """Return the error that keeps workers from starting, or an empty text, and warnings. Waits for the imports."""
    from distributed.utils import get_mp_context

    context = get_mp_context()
    ours, theirs = context.Pipe(duplex=False)
    try:
        with theirs:
            process = context.Process(target=_tell, args=(theirs,))
            process.start()
        found: tuple[str, list[str]] = ours.recv()
        process.join()
    except (EOFError, OSError):
        return "Image(preload=...): one of these modules ended the process that imports them", []
    finally:
        ours.close()
    return found


def _tell(pipe: Any) -> None:
    pipe.send((_error, _warnings))


def _has_cuda() -> bool:
    for link in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # that of the listing itself
            if str(link.readlink()) == _CUDA:
                return True
    return False


def _leaves_threads() -> bool:
    """Tell whether there are threads that outlast a fork. OpenBLAS ends its own before, and starts others as needed."""
    tasks = Path("/proc/self/task")
    if len(list(tasks.glob("*"))) > 1:
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
    return len(list(tasks.glob("*"))) > 1
