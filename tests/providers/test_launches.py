"""Launches that are under way: who else launches for the same pool, and what is left of it afterwards."""

from __future__ import annotations

import threading

import pytest

from skyward.errors import PoolError, ProviderError
from skyward.providers import launches
from skyward.providers.launches import Gate, side_by_side, under_way, undone_by


def test_launches_of_one_pool_know_of_each_other() -> None:
    with under_way("pool", "here") as first, under_way("pool", "here") as second, under_way("other", "here") as other:
        assert first is second
        assert (first.count, other.count) == (2, 1)


def test_nothing_is_kept_of_launches_that_have_ended() -> None:
    with pytest.raises(ValueError), under_way("pool", "here"), under_way("pool", "here"):
        raise ValueError

    assert launches._launches == {}


def test_a_closed_gate_lets_nothing_through_and_ends_pauses() -> None:
    gate, ended = Gate(), threading.Event()

    def pause() -> None:
        with pytest.raises(PoolError, match="the pool has ended"), gate:
            gate.pause(3600)
        ended.set()

    threading.Thread(target=pause).start()
    while not gate._inside:
        pass
    assert not gate.wait(0)

    gate.close()

    assert gate.wait(30)
    assert ended.wait(30)
    with pytest.raises(PoolError), gate:
        pass
    with pytest.raises(PoolError):
        gate.check()


def test_after_a_failure_no_further_item_is_begun() -> None:
    begun: list[int] = []

    def do(item: int) -> int:
        begun.append(item)
        return 10 // item

    assert side_by_side(do, [1, 5, 2], at_once=2) == [10, 2, 5]
    begun.clear()
    with pytest.raises(ZeroDivisionError):
        side_by_side(do, [1, 0, 2, 5], at_once=1)
    assert begun == [1, 0]


def test_what_a_failed_launch_leaves_is_noted_in_its_error(caplog: pytest.LogCaptureFixture) -> None:
    def undo() -> None:
        raise ProviderError("2 machines may run")

    with pytest.raises(KeyError) as failed, undone_by(undo):
        raise KeyError("no capacity")

    assert failed.value.__notes__ == ["left for the end of the pool: 2 machines may run"]
    assert "after a failed launch: 2 machines may run" in caplog.text
