"""A `torch.distributed` process group for the time of a call. Imports torch when it is asked for."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from skyward.errors import SpecError
from skyward.integrations.setup.loading import load
from skyward.worker.context import World
from skyward.worker.variables import variables


@contextlib.contextmanager
def session(world: World, backend: str | None) -> Iterator[None]:
    """Begin the default process group, and end it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(variables({**_interface(world), **world.environment()}))
        torch = load("torch")
        dist = load("torch.distributed")
        has_gpu = torch.cuda.is_available()
        chosen = backend or ("nccl" if has_gpu else "gloo")
        if chosen == "nccl" and not (has_gpu and dist.is_nccl_available()):
            accepted = "'gloo', or None to choose automatically"
            raise SpecError(
                f"backend='nccl': torch {torch.__version__} sees no GPU on rank {world.rank}; expected {accepted}. "
                "For GPUs: accelerator=... of the pool, and a torch that was built for them",
                option="backend",
                value="nccl",
                accepted=accepted,
            )
        if has_gpu:
            device = device_of(world, torch.cuda.device_count())
            stack.enter_context(variables({"LOCAL_RANK": str(device)}))
            torch.cuda.set_device(device)
        dist.init_process_group(chosen, rank=world.rank, world_size=world.size)
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def device_of(world: World, gpus: int) -> int:
    """Return the number of a rank's GPU among the `gpus` that its process sees.

    A slot sees its own GPUs only, so the first is its own, unless all ranks of the node see all. Libraries take
    `LOCAL_RANK` for this number, so that is what it is set to.
    """
    return world.local_rank if gpus >= world.local_size else 0


def _interface(world: World) -> dict[str, str]:
    """Return variables that keep gloo and NCCL on the network by which participants reach each other.

    gloo otherwise takes the address that the host's name has, which is often one that only the host itself knows.
    """
    import psutil

    mine = world.peers[world.rank].host
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family in (socket.AF_INET, socket.AF_INET6) and address.address.partition("%")[0] == mine:
                return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}
