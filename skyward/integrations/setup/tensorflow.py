"""`TF_CONFIG` for the time of a call: TensorFlow reads it when a strategy is made."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from skyward.integrations.setup.loading import load
from skyward.worker.context import World
from skyward.worker.variables import variables


@contextlib.contextmanager
def session(world: World) -> Iterator[None]:
    with variables({**world.environment(), **_config(world)}):
        load("tensorflow")
        yield


def _config(world: World) -> dict[str, str]:
    if world.size == 1:
        return {}
    workers = [peer.address for peer in world.peers]
    return {"TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": world.rank}})}
