"""Events: who hears of them, in which order, and what a failing callback does."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import threading
from typing import Any, get_args

import pytest

import skyward as sky
from skyward import events
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
    assert caplog.text.count("endlessly") == 1


def test_a_circle_that_doubles_is_cut_too(caplog: pytest.LogCaptureFixture) -> None:
    count = 0

    def twice(event: sky.SkywardEvent) -> list[sky.SkywardEvent]:
        nonlocal count
        count += 1
        return [event, event]

    emitter(twice).emit(sky.PoolStarted())

    assert count < 1000
    assert caplog.text.count("endlessly") == 1


@pytest.mark.parametrize("answer", [5, True, "text", [1, "2"], {"a": 1}])
def test_what_a_callback_returns_by_chance_is_ignored(answer: Any) -> None:
    seen: list[sky.SkywardEvent] = []

    def write(event: sky.SkywardEvent) -> Any:
        seen.append(event)
        return answer

    emitter(write).emit(sky.PoolStarted())

    assert seen == [sky.PoolStarted()]


def test_a_callback_that_raises_is_logged_once_and_silences_nobody(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[sky.SkywardEvent] = []

    def fail(event: sky.SkywardEvent) -> None:
        raise RuntimeError("callback is broken")

    send = emitter(sky.compose(sky.compose(fail, seen.append)))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            send.emit(sky.PoolStarted())

    assert len(seen) == 3
    assert caplog.text.count("RuntimeError: callback is broken") == 1


def test_an_installed_callback_that_raises_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: sky.SkywardEvent) -> None:
        raise RuntimeError("callback is broken")

    with sky.use_callback(fail):
        for _ in range(3):
            sky.emit(sky.PoolStarted())

    assert caplog.text.count("RuntimeError: callback is broken") == 1


def test_events_are_delivered_after_an_interrupt() -> None:
    seen: list[sky.SkywardEvent] = []

    def interrupted(event: sky.SkywardEvent) -> None:
        if isinstance(event, sky.PoolStarted):
            raise KeyboardInterrupt
        seen.append(event)

    send = emitter(interrupted)
    with pytest.raises(KeyboardInterrupt):
        send.emit(sky.PoolStarted())
    send.emit(sky.PoolStopping())

    assert seen == [sky.PoolStopping()]


def test_a_pool_s_emitter_reaches_what_was_installed_when_it_was_made() -> None:
    own: list[sky.SkywardEvent] = []
    installed: list[sky.SkywardEvent] = []
    later: list[sky.SkywardEvent] = []

    with sky.use_callback(installed.append):
        send = emitter(own.append)
    send.add(later.append)
    send.emit(sky.PoolStarted())

    assert own == installed == later == [sky.PoolStarted()]


def test_a_composed_callback_returns_the_answers_of_all() -> None:
    both = sky.compose(lambda e: sky.PoolStarted(), lambda e: [sky.PoolStopping()], lambda e: None)

    assert both(sky.InfraCreating()) == [sky.PoolStarted(), sky.PoolStopping()]


def test_the_union_has_every_event() -> None:
    defined = {v for n, v in vars(events).items() if dataclasses.is_dataclass(v) and v.__module__ == events.__name__}

    assert set(get_args(sky.SkywardEvent)) == defined


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
