"""What the caller knows of its heartbeats. Those of pools are in machines/test_heartbeat.py."""

from __future__ import annotations

import pytest

from skyward.cluster import heartbeat
from skyward.cluster.heartbeat import Heartbeat
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
