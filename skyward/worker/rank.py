"""What runs in a separate process: one part of a broadcast. `skyward.worker.ranks` starts it and talks to it.

Run as ``python -m skyward.worker.rank FD``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pickle
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from skyward.transfer import pickling
from skyward.transfer.wire import Outcomes
from skyward.worker import capture, context, interrupts, runtime


class _Values(Sequence[Any]):
    """The values that the call needs from others: unpickled when the session has begun, as its arguments are."""

    def __init__(self, data: bytes, buffers: list[bytes]) -> None:
        self._load = functools.cache(lambda: pickling.loads(data, buffers))

    def __len__(self) -> int:
        return len(self._load())

    def __getitem__(self, index: Any) -> Any:
        return self._load()[index]


def main() -> None:
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    (chunk, job, needs, ours), count = connection.recv()
    beside = [connection.recv_bytes() for _ in range(count)]
    capture.write_lines(marked=capture.VARIABLE in os.environ)
    interrupts.may_restart = True
    interrupts.wake_main_thread()
    over = threading.Event()
    threading.Thread(target=_listen, args=[connection, chunk.key, over], daemon=True).start()

    with contextlib.ExitStack() as session:

        def prepare() -> None:
            setup = importlib.import_module(chunk.isolation.setup)
            session.enter_context(setup.session(context.world(), **chunk.isolation.options))

        runtime.prepare = prepare
        values = _Values(needs, beside[ours:])
        outcomes = runtime.run_batch(replace(chunk, timeout_s=None), *beside[:ours], job=job, needs=values)
        capture.flush()
        _send(connection, outcomes)
        over.wait()  # others may still talk to us


def _send(connection: Connection[Any, Any], outcomes: Outcomes) -> None:
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(outcomes, 5, buffer_callback=buffers.append)
    connection.send((data, len(buffers)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def _listen(connection: Connection[Any, Any], key: str, over: threading.Event) -> None:
    """Do as the worker says; end with it."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            what, why = connection.recv()
            if what == "end":
                over.set()
            else:
                interrupts.interrupt([key], why)
    if not over.is_set():
        os._exit(1)


if __name__ == "__main__":
    main()
