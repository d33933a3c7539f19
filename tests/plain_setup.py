"""A set-up as those of `skyward.integrations.setup`, without a framework."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from skyward.worker.context import World
from skyward.worker.variables import variables


@contextlib.contextmanager
def session(world: World) -> Iterator[None]:
    with variables(world.environment()):
        yield
