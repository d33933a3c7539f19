"""This machine as a provider: nodes are groups of worker processes. Knows nothing of Dask."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, replace
from functools import cache

import psutil

from skyward.accelerators.devices import Reading, declared, fitting, missing, names, read
from skyward.accelerators.model import Accelerator
from skyward.errors import NoMatchingInstanceError, invalid
from skyward.spec.pool import PoolSpec
from skyward.spec.validation import Problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Run the pool's nodes as processes on this machine. The default provider.

    Parameters
    ----------
    gpus
        Number of GPUs that each node declares, even if they don't exist: to try out GPU code without a GPU.
        None: the GPUs of this machine, divided among the nodes.
    """

    gpus: int | None = None

    def __post_init__(self) -> None:
        gpus = self.gpus
        if gpus is not None and (isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 0):
            accepted = "an integer >= 0, or None for the GPUs of this machine"
            raise invalid("gpus", gpus, accepted)

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
            problems.note("machine", spec.machine, "None with provider='local', which uses this machine")
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
        wanted = spec.accelerator
        if wanted is not None and self.gpus is not None and wanted.count > self.gpus:
            what = f"up to {self.gpus} per node, as many as provider=sky.Local(gpus={self.gpus}) declares"
            problems.note("accelerator", str(wanted), what)
        problems.raise_if_any()

    def devices(self, node: int, nodes: int, wanted: Accelerator | None) -> tuple[str, ...]:
        """Return the names of the accelerators, or of their partitions, that are for `node`.

        Raises
        ------
        NoMatchingInstanceError
            This machine does not have them for all nodes, and none are declared.
        """
        if wanted is None:
            return ()
        if self.gpus is not None:
            return declared(wanted)
        reading = _read(wanted.vendor)
        if why := missing(replace(wanted, count=wanted.count * nodes), reading):
            raise NoMatchingInstanceError(
                f"accelerator={str(wanted)!r} for {nodes} nodes on this machine: {why}. Ask for fewer, or "
                f"simulate them with provider=sky.Local(gpus={wanted.count})."
            )
        mine = fitting(wanted, reading.devices)[node * wanted.count : (node + 1) * wanted.count]
        return names(wanted, mine)


@cache
def _read(vendor: str) -> Reading:
    return read(vendor)
