"""What several test modules share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

import skyward as sky

hypothesis.settings.register_profile("skyward", derandomize=True, deadline=None)
hypothesis.settings.load_profile("skyward")


@pytest.fixture(scope="session")
def pool() -> Iterator[sky.ComputePool]:
    """Two nodes of two slots, started once per test process; leave it as you found it."""
    with sky.ComputePool(provider="local", nodes=2, concurrency=2, display="quiet") as pool:
        yield pool
