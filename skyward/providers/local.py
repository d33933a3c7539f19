"""This machine as a provider: nodes are groups of worker processes. Knows nothing of Dask."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

import psutil

from skyward.errors import NoMatchingInstanceError, SpecError
from skyward.spec import PoolSpec
from skyward.validation import Problems


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

    def check(self, spec: PoolSpec) -> None:
        """Refuse what this machine can't be made into.

        Raises
        ------
        SpecError
            An option asks for other machines than this one, or for more than it has.
        """
        problems = Problems()
        here = platform.machine().lower()
        architecture = {"amd64": "x86_64", "aarch64": "arm64"}.get(here, here)
        cores = os.cpu_count() or 1
        memory = psutil.virtual_memory().total // 10**6
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if spec.machine is not None:
            problems.note("machine", spec.machine, "None with provider='local': the machine is this one")
        if spec.architecture not in (None, architecture):
            problems.note("architecture", spec.architecture, f"{architecture!r} with provider='local', or None")
        if spec.cpu is not None and spec.cpu > cores:
            problems.note("cpu", spec.cpu, f"up to {cores} with provider='local': this machine has no more")
        if spec.memory is not None and spec.memory > memory:
            problems.note("memory", spec.memory, f"up to {memory} MB with provider='local': this machine has no more")
        if spec.volume:
            problems.note("volume", spec.volume, "() with provider='local': use paths of this machine")
        if spec.image.apt:
            problems.note("image.apt", spec.image.apt, "() with provider='local': install what is missing yourself")
        if spec.image.python is not None and f"{spec.image.python}.".find(f"{python}.") != 0:
            problems.note("image.python", spec.image.python, f"{python!r} with provider='local', or None")
        problems.raise_if_any()

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
