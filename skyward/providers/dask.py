"""A Dask cluster that runs already, as a provider: joined, used, and left as it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skyward.errors import SpecError, invalid
from skyward.spec.pool import PoolSpec
from skyward.spec.validation import Problems


@dataclass(frozen=True, slots=True)
class Dask:
    """Join a running Dask cluster: its hosts are the nodes, its worker threads the slots.

    Parameters
    ----------
    target
        A scheduler's address such as ``"tcp://10.0.0.5:8786"``, a `distributed.Client`, or a cluster object such as
        `distributed.LocalCluster`. The workers need the same Python minor version and skyward installed.
        Leaving the pool destroys nothing.
    security
        A `distributed.Security` for an address with TLS; taken from the client or cluster otherwise.
    """

    target: Any
    security: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.target, str):
            ok = "://" in self.target or ":" in self.target
        else:
            ok = hasattr(self.target, "scheduler_address") or hasattr(self.target, "scheduler")
        if not ok:
            accepted = "a scheduler address such as 'tcp://host:8786', a distributed.Client or a Dask cluster object"
            raise _error(self.target, accepted)

    @property
    def name(self) -> str:
        return "dask"

    def check(self, spec: PoolSpec) -> None:
        """Refuse what would have to be done to machines that are not ours.

        Raises
        ------
        SpecError
            An option says how the workers should be.
        """
        problems = Problems()
        theirs = "with sky.Dask: the cluster is used as it is"
        usual = PoolSpec()
        for option in ("nodes", "concurrency", "machine", "accelerator", "architecture", "cpu", "memory", "volume"):
            if getattr(spec, option) != getattr(usual, option):
                problems.note(option, getattr(spec, option), f"{getattr(usual, option)!r} {theirs}")
        if spec.env:
            problems.note("env", sorted(spec.env), f"None {theirs}")
        if spec.image.preload:
            accepted = f"() {theirs}; start its workers with `dask worker --preload` instead"
            problems.note("image.preload", spec.image.preload, accepted)
        for field_ in ("python", "apt", "env", "include"):
            if value := getattr(spec.image, field_):
                problems.note(f"image.{field_}", sorted(value), f"nothing {theirs}")
        problems.raise_if_any()

    def address(self) -> str:
        """Return the scheduler's address."""
        if isinstance(self.target, str):
            return self.target if "://" in self.target else f"tcp://{self.target}"
        if hasattr(self.target, "scheduler_address"):
            return str(self.target.scheduler_address)
        scheduler = self.target.scheduler
        if scheduler is None:
            raise _error(self.target, "a client that is still connected")
        return str(scheduler.address)

    def credentials(self) -> Any:
        """Return the `distributed.Security` to connect with, or None."""
        return self.security or getattr(self.target, "security", None)


def _error(target: Any, accepted: str) -> SpecError:
    return invalid("target", target, accepted, shown=f"sky.Dask({target!r})")
