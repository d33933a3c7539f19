"""Events: who hears of them, in which order, and what a failing callback does."""

from __future__ import annotations

import logging
import pickle
import threading

import pytest

import skyward as sky
from skyward.events import emitter


def test_events_are_values() -> None:
    line = sky.LogLine(node=1, instance_id="i", line="hello", timestamp=0.5)

    assert line == pickle.loads(pickle.dumps(line))
    with pytest.raises(AttributeError):
        line.node = 2  # type: ignore[misc]


def test_an_installed_callback_hears_inside_its_block_only() -> None:
    seen: list[sky.SkywardEvent] = []

    with sky.use_callback(seen.append):
        sky.emit(sky.PoolStarted())
    sky.emit(sky.PoolStopping())

    assert seen == [sky.PoolStarted()]


def test_what_a_callback_returns_is_emitted_too() -> None:
    seen: list[sky.SkywardEvent] = []

    def answer(event: sky.SkywardEvent) -> list[sky.SkywardEvent] | sky.SkywardEvent | None:
        seen.append(event)
        if isinstance(event, sky.PoolStarted):
            return [sky.ProvisioningCompleted(), sky.ClusterSetupCompleted()]
        if isinstance(event, sky.ClusterSetupCompleted):
            return sky.Error(message="x")
        return None

    emitter(answer).emit(sky.PoolStarted())

    assert [type(e).__name__ for e in seen] == [
        "PoolStarted", "ProvisioningCompleted", "ClusterSetupCompleted", "Error"
    ]  # fmt: skip


def test_a_circle_of_answers_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    count = 0

    def again(event: sky.SkywardEvent) -> sky.SkywardEvent:
        nonlocal count
        count += 1
        return event

    emitter(again).emit(sky.PoolStarted())

    assert count < 1000
    assert "without end" in caplog.text


def test_a_callback_that_raises_is_logged_once_and_silences_nobody(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[sky.SkywardEvent] = []

    def fail(event: sky.SkywardEvent) -> None:
        raise RuntimeError("callback is broken")

    send = emitter(sky.compose(fail, seen.append))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            send.emit(sky.PoolStarted())

    assert len(seen) == 3
    assert caplog.text.count("RuntimeError: callback is broken") == 1


def test_events_of_many_threads_come_one_at_a_time() -> None:
    inside = threading.Lock()
    seen: list[sky.SkywardEvent] = []

    def callback(event: sky.SkywardEvent) -> None:
        assert inside.acquire(blocking=False)
        seen.append(event)
        inside.release()

    send = emitter(callback)
    threads = [
        threading.Thread(target=lambda: [send.emit(sky.TaskProgress(done=i)) for i in range(200)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(seen) == 1600


def test_a_callback_may_emit_from_within() -> None:
    seen: list[sky.SkywardEvent] = []

    def callback(event: sky.SkywardEvent) -> None:
        seen.append(event)
        if isinstance(event, sky.PoolStarted):
            send.emit(sky.PoolStopping())

    send = emitter(callback)
    send.emit(sky.PoolStarted())

    assert seen == [sky.PoolStarted(), sky.PoolStopping()]
