"""Clusters of agents that are not real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from skyward.cluster import replacement
from tests.fake_agent import Cloud, FakeAgent, FakeCluster


@pytest.fixture
def make() -> Iterator[Callable[..., FakeCluster]]:
    """Makes a cluster on machines of a cloud, or on hosts that stay; it ends with the test."""
    made: list[FakeCluster] = []

    def make(cloud: Cloud, agents: Sequence[FakeAgent], *, hosts: bool = False, **options: Any) -> FakeCluster:
        discard = None if hosts else cloud.discard
        made.append(FakeCluster(agents, new_agents=cloud.more, discard=discard, **options))
        return made[-1]

    yield make
    for cluster in made:
        cluster.stop()


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clusters look for replacements, and whether machines are gone, at once."""
    monkeypatch.setattr(replacement, "_BREAK_S", 0.01)
    monkeypatch.setattr(replacement, "_REPLACEMENT_PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(replacement, "_LOOK_S", 0.01)
