"""Pauses, deadlines and creates whose answer is lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from skyward.providers import retry


def test_a_look_comes_at_once_and_one_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: now))

    assert len(list(retry.looks(0.0, sleep))) == 1
    assert slept == []
    looks = len(list(retry.looks(10.0, sleep)))
    assert sum(slept) == pytest.approx(10.0)
    assert looks == len(slept) + 1


def _create_once(answers: list[Any], made: list[str]) -> str:
    """Create with an API that answers so: an error instead of an answer, before or after it has made something."""

    def create() -> str:
        answer, is_made = answers.pop(0)
        if is_made:
            made.append("it")
        if answer is not None:
            raise answer
        return "it"

    return retry.create_once(
        SimpleNamespace(creating=lambda: None, pause=lambda _: None),
        create,
        lambda: made[0] if made else None,
        is_unclear=lambda exc: isinstance(exc, ConnectionError),
        look_s=lambda exc: None if isinstance(exc, PermissionError) else 0.0,
        pauses_s=(0.1, 0.1),
    )


def test_what_was_made_although_the_answer_was_lost_is_made_once() -> None:
    made: list[str] = []

    assert _create_once([(ConnectionError(), True)], made) == "it"
    assert made == ["it"]


def test_what_was_not_made_is_asked_for_again_and_not_forever() -> None:
    made: list[str] = []

    assert _create_once([(ConnectionError(), False), (None, True)], made) == "it"
    assert made == ["it"]
    with pytest.raises(ConnectionError):
        _create_once([(ConnectionError(), False), (ConnectionError(), False)], [])


@pytest.mark.parametrize("refusal", [PermissionError(), FileExistsError()])
def test_a_refusal_is_raised_unless_it_is_there_already(refusal: Exception) -> None:
    with pytest.raises(type(refusal)):
        _create_once([(refusal, False)], [])


def test_a_call_is_repeated_only_while_its_error_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = [ConnectionError(), ConnectionError(), ValueError()]
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)

    def call() -> None:
        raise errors.pop(0)

    with pytest.raises(ValueError):
        retry.patiently(call, lambda exc: isinstance(exc, ConnectionError), (0.5, 1.0, 2.0))
    assert errors == []
