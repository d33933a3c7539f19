"""The slots of a node: their environment, GPUs and Dask resources."""

from __future__ import annotations

from collections.abc import Sequence

from skyward.cluster.config import NodeSpec


def node_spec(node: int, slots: int, devices: Sequence[str] = ()) -> NodeSpec:
    """Return the specification of a node whose GPUs, by index or UUID, are divided evenly among its slots."""
    return NodeSpec(
        node,
        tuple(_environment(devices, i, slots) for i in range(slots)),
        tuple(_resources(i, slots, len(devices)) for i in range(slots)),
    )


def _environment(devices: Sequence[str], slot: int, slots: int) -> dict[str, str]:
    """Slots that outnumber the GPUs share them."""
    if not devices:
        return {}
    count = len(devices)
    first = slot * count // slots
    mine = devices[first : max(first + 1, (slot + 1) * count // slots)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def _resources(slot: int, slots: int, gpus: int) -> dict[str, float]:
    resources: dict[str, float] = {"NODE": 1.0} if slot == 0 else {}
    if gpus:
        resources["GPU"] = gpus / slots
    return resources
