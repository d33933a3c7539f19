"""The soak's report, and the network and baked environment that it shares with the other tests on machines."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.machines.conftest import baked, can_boot, site
from tests.soak.outcome import Outcome, table

__all__ = ["baked", "can_boot", "site"]

SEED = os.environ.get("SOAK_SEED") or str(random.SystemRandom().randrange(10**6))
_outcomes = pytest.StashKey[list[Outcome]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash.setdefault(_outcomes, [])


@pytest.fixture(scope="session")
def seed() -> str:
    return SEED


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> list[Outcome]:
    """Where each run's outcome is put, for the table at the end."""
    return request.config.stash.setdefault(_outcomes, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes = config.stash.get(_outcomes, [])
    if not outcomes:
        return
    terminalreporter.section(f"soak, SOAK_SEED={SEED}")
    terminalreporter.line(table(outcomes))
    if path := os.environ.get("SOAK_REPORT"):
        Path(path).write_text(f"{table(outcomes)}\n")
