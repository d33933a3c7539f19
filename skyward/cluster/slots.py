"""The slots of a node: their environment, accelerators and Dask resources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from skyward.accelerators.devices import environments, resources
from skyward.accelerators.model import Accelerator
from skyward.node.config import NodeSpec


def node_spec(
    node: int,
    slots: int,
    accelerator: Accelerator | None = None,
    devices: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> NodeSpec:
    """Return the specification of a node with so many slots.

    Parameters
    ----------
    devices
        Names of the node's accelerators, or of their partitions, to be divided evenly; empty: not known yet.
    environment
        Variables of the pool.
    """
    shares = environments(accelerator, devices, slots, environment or {}) if accelerator and devices else ({},) * slots
    mine = resources(accelerator, slots) if accelerator else {}
    return NodeSpec(node, shares, tuple({"NODE": 1.0, **mine} if slot == 0 else {**mine} for slot in range(slots)))
