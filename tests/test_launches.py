"""Launches that are under way: who else launches for the same pool, and what is left of it afterwards."""

from __future__ import annotations

import pytest

from skyward.providers import launches
from skyward.providers.launches import under_way


def test_launches_of_one_pool_know_of_each_other() -> None:
    with under_way("pool", "here") as first, under_way("pool", "here") as second, under_way("other", "here") as other:
        assert first is second
        assert (first.count, other.count) == (2, 1)


def test_nothing_is_kept_of_launches_that_have_ended() -> None:
    with pytest.raises(ValueError), under_way("pool", "here"), under_way("pool", "here"):
        raise ValueError

    assert launches._launches == {}
