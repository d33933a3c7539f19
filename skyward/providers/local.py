"""This machine as a provider: nodes are groups of worker processes. Knows nothing of Dask."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache

from skyward.errors import NoMatchingInstanceError, SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Run the pool's nodes as processes on this machine. The default provider.

    Parameters
    ----------
    gpus
        GPUs that each node declares, whether they exist or not: for trying out GPU code paths without one.
        None: those that the NVIDIA driver shows, shared out among the nodes.
    """

    gpus: int | None = None

    def __post_init__(self) -> None:
        gpus = self.gpus
        if gpus is not None and (isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 0):
            accepted = "a whole number from 0, or None for the GPUs of this machine"
            raise SpecError(f"gpus={gpus!r}: accepted is {accepted}", option="gpus", value=gpus, accepted=accepted)

    @property
    def name(self) -> str:
        return "local"

    def devices(self, node: int, nodes: int, wanted: int) -> tuple[str, ...]:
        """Return the GPU indices of `node`, `wanted` of them.

        Raises
        ------
        NoMatchingInstanceError
            This machine has too few, and none are declared.
        """
        if self.gpus is not None:
            if wanted > self.gpus:
                raise _too_few(wanted, 1, self.gpus, "declared per node")
            return tuple(str(i) for i in range(wanted))
        present = count_gpus()
        if wanted * nodes > present:
            raise _too_few(wanted, nodes, present, "on this machine")
        return tuple(str(i) for i in range(node * wanted, (node + 1) * wanted))


def _too_few(wanted: int, nodes: int, there: int, where: str) -> NoMatchingInstanceError:
    return NoMatchingInstanceError(
        f"accelerator: {wanted} × {nodes} GPUs are asked for, {there} {'is' if there == 1 else 'are'} {where}. "
        f"Ask for fewer, or try the code path without GPUs through provider=sky.Local(gpus={wanted})."
    )


@cache
def count_gpus() -> int:
    """Return how many GPUs the NVIDIA driver shows; 0 without a driver."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
