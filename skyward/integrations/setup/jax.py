"""A `jax.distributed` cluster for the time of a call. Imports jax when it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from skyward.integrations.setup.loading import load
from skyward.worker.context import World
from skyward.worker.variables import variables


@contextlib.contextmanager
def session(world: World) -> Iterator[None]:
    """Join the cluster. The process, which is this job's own, leaves it by ending."""
    with variables(world.environment()):
        jax = load("jax")
        if world.size > 1:
            # Of no consequence where there are accelerators: it says how CPUs talk to each other.
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            first = world.peers[0]
            jax.distributed.initialize(
                coordinator_address=first.address,
                num_processes=world.size,
                process_id=world.rank,
            )
        yield
