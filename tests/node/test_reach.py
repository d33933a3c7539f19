"""What failures say of their causes."""

from __future__ import annotations

import pytest

from skyward.node.reach import reason


def fail() -> None:
    try:
        try:
            raise OSError("no route to host")
        except OSError as exc:
            raise TimeoutError from exc
    except TimeoutError:
        raise RuntimeError("Nanny failed to start.")  # noqa: B904 - as Dask does


def test_the_innermost_cause_of_a_failure_is_told() -> None:
    with pytest.raises(RuntimeError) as caught:
        fail()

    assert reason(caught.value) == "RuntimeError: Nanny failed to start., because of OSError: no route to host"


def test_a_failure_without_another_cause_is_told_once() -> None:
    assert reason(ValueError("wrong")) == "ValueError: wrong"
    assert reason(TimeoutError()) == "TimeoutError"
