"""SIGTERM while a pool is active: in the process that has it, in one forked from it, and with a handler of its own."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator

import pytest

from skyward.cleanup.signals import unwind_on_termination


@pytest.fixture(autouse=True)
def _nobody_listens() -> Iterator[None]:
    """As in a fresh process: another test's pool may be active in this one."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_forked_process_dies_of_sigterm_as_usual() -> None:
    undo = unwind_on_termination()
    try:
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60])
        process.start()
        process.terminate()
        process.join(30)
    finally:
        undo()

    assert process.exitcode == -signal.SIGTERM


def test_sigterm_unwinds_and_is_as_before_afterwards() -> None:
    undo = unwind_on_termination()
    try:
        with pytest.raises(SystemExit) as info:
            signal.raise_signal(signal.SIGTERM)
    finally:
        undo()

    assert info.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_programs_own_handler_stays() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        undo = unwind_on_termination()
        signal.raise_signal(signal.SIGTERM)
        undo()
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert heard == [signal.SIGTERM] * 2
