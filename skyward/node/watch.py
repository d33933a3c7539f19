"""The watch on a machine: it ends the machine's part of a pool when no heartbeat has come for too long.

Once there is an agent, threads of it keep the watch, so that a busy event loop of the agent can't delay it; before,
a shell does (`cluster.machine_commands.watch_command`). The caller's end is in `heartbeat`.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

SOCKET = "beats.sock"
"""Socket of the agent's watch, in the pool's folder: it sends back whatever it gets."""
BEAT = "beat"
"""File in the pool's folder that is a heartbeat while there is no agent yet."""


class Watch:
    """Hears heartbeats at a socket in `folder`, and calls `end` when `limit_s` seconds have passed without one."""

    def __init__(self, folder: Path, limit_s: float, end: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._end = end
        self._heard_at = time.monotonic()
        self._is_over = False
        self._lock = threading.Lock()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(folder / SOCKET))
        self._server.listen()
        for work in (self._accept, self._count):
            threading.Thread(target=work, name="heartbeat-watch", daemon=True).start()

    def heard(self) -> bool:
        """Note a heartbeat, which may have come another way. Return whether it came in time."""
        with self._lock:
            self._heard_at = time.monotonic()
            return not self._is_over

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
                threading.Thread(target=self._answer, args=[connection], name="heartbeat-answer", daemon=True).start()
            except (OSError, RuntimeError):  # no file or thread left at present: the caller tries again
                logger.exception("a connection for heartbeats was refused")
                time.sleep(1)

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while (beat := connection.recv(64)) and self.heard():
                connection.sendall(beat)

    def _count(self) -> None:
        while not self._has_ended():
            time.sleep(min(1.0, self._limit_s / 10))
        logger.error("no heartbeat from the caller for %g s", self._limit_s)
        self._end()

    def _has_ended(self) -> bool:
        """Return whether no heartbeat came in time. From then on none is answered: the end takes a while."""
        with self._lock:
            self._is_over = time.monotonic() - self._heard_at >= self._limit_s
            return self._is_over
