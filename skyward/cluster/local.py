"""Build the cluster of a local pool: slots, environment, GPUs and threads of each simulated node."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import dask.system

from skyward.cluster.cluster import AgentCluster
from skyward.cluster.node import AgentConfig, NodeSpec
from skyward.cluster.overlay import overlay
from skyward.cluster.security import make_credentials
from skyward.providers.local import Local
from skyward.runtime import thread_environment
from skyward.spec import PoolSpec


def cores_per_slot(spec: PoolSpec) -> int:
    """Return how many of this machine's cores each slot of the pool may use; at least 1."""
    cores: int = dask.system.CPU_COUNT
    return max(1, cores // (spec.nodes * spec.concurrency))


def local_cluster(provider: Local, spec: PoolSpec, pool_id: str, share: Path) -> AgentCluster:
    """Return the cluster, not yet started. What the pool asks for and this machine lacks is found here."""
    count = spec.accelerator.count if spec.accelerator else 0
    for node in range(spec.nodes):
        provider.devices(node, spec.nodes, count)
    site = overlay(spec.image.pip, spec.image.pip_extra_index_url)

    def node_spec(node: int) -> NodeSpec:
        devices = provider.devices(node % spec.nodes, spec.nodes, count)
        return NodeSpec(
            node,
            tuple(_slot_environment(devices, i, spec.concurrency) for i in range(spec.concurrency)),
            tuple(_resources(i, spec.concurrency, count) for i in range(spec.concurrency)),
        )

    credentials = make_credentials(pool_id, lifetime_s=spec.timeout)
    config = AgentConfig(
        pool_id=pool_id,
        folder=tempfile.mkdtemp(prefix=f"skyward-{pool_id}-"),
        ttl_s=spec.timeout,
        ca=credentials.ca,
        certificate=credentials.certificate,
        key=credentials.key,
        nodes=tuple(node_spec(n) for n in range(spec.nodes)),
        remove=(str(share),),
    )
    return AgentCluster(
        config,
        security=credentials.security(),
        environment=_environment(spec, site),
        node_spec=node_spec,
    )


def _environment(spec: PoolSpec, site: Path | None) -> dict[str, str]:
    """Return what all workers of the pool see: the caller's variables, thread limits, then the user's own."""
    path = [str(site)] if site else []
    path += [p for p in sys.path if p]
    roots = [Path(__file__).parent.parent.parent]
    roots.append(roots[0] / "backends")  # in a source checkout the joblib backend lies beside the package
    path += [str(r) for r in roots if r.is_dir()]
    return {
        **os.environ,
        # Tasks see the caller's import path: on this machine there is no reason why they should not.
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        **thread_environment(cores_per_slot(spec)),
        "SKYWARD_NODE_CORES": str(max(1, dask.system.CPU_COUNT // spec.nodes)),
        **spec.image.env,
        **_mapping(spec.env),
    }


def _mapping(env: Mapping[str, str] | None) -> Mapping[str, str]:
    return env or {}


def _slot_environment(devices: tuple[str, ...], slot: int, slots: int) -> dict[str, str]:
    """Divide a node's GPUs evenly among its slots; slots that outnumber them share."""
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
