"""A detached process that ends a pool when its owner is gone, killed with no chance to clean up, or its time is over.

Run as ``python -m skyward.cleanup.guardian POOL_ID``. Its standard input is a pipe from the owner: the line ``done``
means that there is nothing left to do, and an end without it that the owner is gone. Until then it only waits, so
what it needs to act is imported when it acts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from skyward import paths
from skyward.cleanup import journal
from skyward.cleanup.journal import Entry

logger = logging.getLogger(__name__)

HEADROOM_S = 60.0
"""Seconds beyond the pool's time-out after which the guardian acts: later than the owner and the agents do."""
GIVE_UP_S = 3600.0
"""Seconds beyond the time-out after which it gives up: machines have ended the pool themselves by then."""
LOG = "guardian.log"
_LOOK_S = 30.0  # `select` does not count the time that a computer sleeps
_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_PAUSE_S = 60.0
_LIST_AGAIN_S = 60.0
"""Seconds after which what was launched last is listed, and between looks while a launch may be under way."""
_DISMISSED_WITHIN_S = 2.0
_DONE = b"done\n"


class Guardian:
    """The owner's end: hold it as long as the pool lives."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._owner = os.getpid()
        self._lock = threading.Lock()

    @classmethod
    def start(cls, pool_id: str) -> Guardian:
        """Start a guardian for a pool that has its entry in the journal. Does not wait until it is up.

        Raises
        ------
        OSError
            The process can't be started.
        """
        from skyward.cluster.agents import _forget_after_fork

        folder = paths.data_folder()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),  # noqa: PTH100 - '' is the cwd
            "SKYWARD_DATA_DIR": str(folder),
        }
        # Inside a task of another pool: it is not one of that pool's processes, it cleans up after their end.
        environment.pop("SKYWARD_POOL", None)
        with os.fdopen(os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "skyward.cleanup.guardian", pool_id],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                bufsize=0,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        _forget_after_fork(process)
        return cls(process)

    def dismiss(self) -> None:
        """Let it end without doing anything: the pool's end is confirmed. Never raises; may be called twice."""
        if not self._send_last(_DONE):
            return
        try:
            self._process.wait(_DISMISSED_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def hand_over(self) -> None:
        """Let it end the pool, now and by itself: the owner could not. Returns at once; may be called twice."""
        if self._send_last(b""):
            threading.Thread(target=self._process.wait, name="skyward-guardian", daemon=True).start()

    def _send_last(self, word: bytes) -> bool:
        """Send a last `word` and close the pipe; tell whether it was still open."""
        if os.getpid() != self._owner:
            return False  # a forked child: the pipe is not open here
        with self._lock:
            pipe, self._process.stdin = self._process.stdin, None
        if pipe is None:
            return False
        try:
            pipe.write(word)
        except OSError:
            logger.warning("the guardian has ended before its pool; its log is %s", paths.data_folder() / LOG)
        finally:
            with contextlib.suppress(OSError):
                pipe.close()
        return True


# --- the process --------------------------------------------------------------------------------------------


class _Owner:
    """What standard input tells of the owner."""

    def __init__(self) -> None:
        self.done = False
        self.gone = False
        self._said = b""

    def listen(self, seconds: float) -> None:
        """Wait until the owner says something, or is gone, or for so long."""
        if self.gone:
            time.sleep(seconds)
            return
        readable, _, _ = select.select([0], [], [], seconds)
        if readable:
            said = os.read(0, 64)
            self._said += said
            self.done = _DONE in self._said
            self.gone = not said


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the owner, and its end is when we are needed
    (pool_id,) = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {pool_id} %(message)s")
    try:
        entry = journal.read(pool_id)
    except (OSError, ValueError):
        logger.exception("the journal can't be read: nothing is guarded; `skyward ps` finds the pool by its tags")
        return 1
    if entry is None:
        logger.error("not in the journal: nothing to guard")
        return 1
    owner = _Owner()
    while (left := entry.expires + HEADROOM_S - time.time()) > 0:
        owner.listen(min(left, _LOOK_S))
        if owner.done:
            return 0
        if owner.gone:
            break
        entry = _latest(entry) or entry
    logger.info("%s: ending the pool", "its owner is gone" if owner.gone else "it has expired")
    return _end(entry, owner)


def _end(entry: Entry, owner: _Owner) -> int:
    from skyward.cleanup.end import end_pool

    ended_at = 0.0
    for pause in _pauses():
        latest = _latest(entry)
        if latest is None:
            logger.info("another process has ended it")
            return 0
        entry = latest
        if not (entry.machines or entry.places):
            journal.close(entry.pool_id)
            logger.info("nothing was started")
            return 0
        try:
            left = end_pool(entry)
        except Exception:  # network or code: the log has it, and the next try may succeed
            logger.exception("failed")
            left = ["see above"]
        if not left:
            now = time.time()
            ended_at = ended_at or now
            until = entry.launching_until
            if entry.places and entry.state != "stopping":  # what was launched last may not be listed yet
                until = max(until, ended_at + _LIST_AGAIN_S)
            if now >= until:
                journal.close(entry.pool_id)
                logger.info("ended")
                return 0
            pause = min(_LIST_AGAIN_S, until - now)
            logger.info("ended; a cloud may still make machines: looking again in %.0f s", pause)
        else:
            logger.info("may still run on %s", "; ".join(left))
        if time.time() > entry.expires + GIVE_UP_S:
            logger.info("given up; it stays in `skyward ps`")
            return 1
        owner.listen(pause)
        if owner.done:
            return 0
    raise AssertionError


def _latest(entry: Entry) -> Entry | None:
    """Return the entry as it is now, or as it was when it can't be read."""
    try:
        return journal.read(entry.pool_id)
    except (OSError, ValueError):
        logger.exception("the journal can't be read")
        return entry


def _pauses() -> Iterator[float]:
    yield from _PAUSES_S
    while True:
        yield _PAUSE_S


if __name__ == "__main__":
    sys.exit(main())
