"""Build the cluster of a local pool: slots, environment, GPUs and threads of each simulated node."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.system

from skyward import events
from skyward.cluster.agents import LocalAgent, instance_id
from skyward.cluster.overlay import missing, missing_wheels, overlay
from skyward.cluster.slots import node_spec
from skyward.node.config import AgentConfig, NodeSpec
from skyward.node.tls import make_credentials
from skyward.providers.local import Local
from skyward.spec.pool import PoolSpec
from skyward.worker import buffer_files
from skyward.worker.threads import thread_environment

if TYPE_CHECKING:
    from skyward.cluster.cluster import AgentCluster


def local_cluster(
    provider: Local, spec: PoolSpec, pool_id: str, share: Sequence[Path], emit: Callable[[Any], None]
) -> AgentCluster:
    """Return the cluster, whose agent begins to start. What the pool asks for and this machine lacks is found here."""
    slots, environment = spec.slots_per_node, spec.environment
    devices = [provider.devices(node, spec.nodes, spec.accelerator) for node in range(spec.nodes)]
    names = [instance_id(pool_id, node) for node in range(spec.nodes)]
    for node, name in enumerate(names):
        emit(events.InstanceProvisioned(instance_id=name, node=node, spot=False, provider=provider.name))
    emit(events.ProvisioningCompleted())
    is_complete = not missing(spec.image.pip) and not missing_wheels(spec.image.wheels)
    for name in names:  # they share one environment
        emit(events.BootstrapStarting(instance_id=name))
        if not is_complete:
            emit(events.BootstrapProgress(instance_id=name, step="packages"))
    site = overlay(spec.image.pip, spec.image.indexes, spec.image.wheels)
    for name in names:
        emit(events.BootstrapCompleted(instance_id=name))

    def make_node(node: int) -> NodeSpec:
        return node_spec(node, slots, spec.accelerator, devices[node % spec.nodes], environment)

    cores = max(1, dask.system.CPU_COUNT // spec.nodes)
    credentials = make_credentials(pool_id, lifetime_s=spec.timeout)
    config = AgentConfig(
        pool_id=pool_id,
        folder=tempfile.mkdtemp(prefix=f"skyward-{pool_id}-"),
        ttl_s=spec.timeout,
        ca=credentials.ca,
        certificate=credentials.certificate,
        key=credentials.key,
        metrics=spec.collect_metrics,
        preload=tuple(spec.image.preload),
        nodes=tuple(make_node(n) for n in range(spec.nodes)),
        environment={
            **thread_environment(max(1, cores // slots)),
            "SKYWARD_NODE_CORES": str(cores),
            buffer_files.VARIABLE: str(share[0]),
            **environment,
        },
        remove=tuple(map(str, share)),
    )
    agent = LocalAgent(config, _environment(pool_id, site))
    try:
        agent.spawn()
        # It takes as long to import as the agent takes to start.
        from skyward.cluster.cluster import AgentCluster

        cluster = AgentCluster(
            pool_id,
            [agent],
            security=credentials.security(),
            slots_per_node=slots,
            timeout_s=spec.timeout,
            retries=spec.retries,
            node_spec=make_node,
        )
        cluster.folder = config.folder
        return cluster
    except BaseException:
        agent.kill()
        raise


def _environment(pool_id: str, site: Path | None) -> dict[str, str]:
    """Return the caller's variables, with its import path: on this machine tasks may well see all that it sees."""
    path = [str(site)] if site else []
    path += [os.path.abspath(p) for p in sys.path]  # noqa: PTH100 - '' is the cwd
    roots = [Path(__file__).parent.parent.parent]
    roots.append(roots[0] / "backends")  # in a source checkout the joblib backend lies beside the package
    path += [str(r) for r in roots if r.is_dir()]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), "SKYWARD_POOL": pool_id}
