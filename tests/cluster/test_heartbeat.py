"""What the two ends of heartbeats know. Those of pools are in machines/test_heartbeat.py."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from pathlib import Path

import pytest

from skyward.cluster import heartbeat
from skyward.cluster.heartbeat import Heartbeat
from skyward.cluster.tasks import end_tasks
from skyward.node.watch import SOCKET, Watch
from skyward.providers.base import Login


def test_a_beat_sent_after_the_limit_ends_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(heartbeat, "_now", lambda: now)
    beat = Heartbeat(Login(host="host"), "/tmp/folder", 10.0, 5.0, lambda: None)

    now = 9.0
    beat.note_beat()
    in_time = beat.silence_s
    now = 20.0
    beat.note_beat()

    assert (in_time, beat.silence_s) == (0.0, 11.0)


def test_a_watch_that_ends_answers_no_more_heartbeats(tmp_path: Path) -> None:
    """The end takes a while; an answer in it would tell the caller that the machine has heard in time."""
    ending, ended = threading.Event(), threading.Event()

    def end() -> None:
        ending.set()
        ended.wait(60)

    Watch(tmp_path, 1.0, end)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(60)
        caller.connect(str(tmp_path / SOCKET))
        caller.sendall(b"\n")
        in_time = caller.recv(64)
        assert ending.wait(60)
        caller.sendall(b"\n")
        late = caller.recv(64)
    ended.set()

    assert (in_time, late) == (b"\n", b"")


def test_a_task_that_loses_a_cancellation_is_ended() -> None:
    cancelled = 0

    async def loses_one() -> None:
        nonlocal cancelled
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)
        cancelled += 1
        await asyncio.sleep(1000)

    async def end() -> bool:
        task = asyncio.create_task(loses_one())
        await asyncio.sleep(0)
        await end_tasks([task])
        return task.cancelled()

    assert asyncio.run(end())
    assert cancelled == 1
