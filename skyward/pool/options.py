"""The options of a pool: their types, for those that hand them on, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from skyward import events
    from skyward.accelerators.model import Accelerator
    from skyward.providers import ProviderLike, Resolved
    from skyward.spec.allocation import Allocation
    from skyward.spec.image import Image
    from skyward.spec.log import LogConfig
    from skyward.spec.pool import PoolSpec
    from skyward.spec.volume import Volume


class PoolOptions(TypedDict, total=False):
    """The keyword options of `ComputePool`, for those that hand them on."""

    selection: Any
    image: Image | None
    nodes: int
    machine: str | None
    accelerator: str | Accelerator | None
    architecture: Literal["x86_64", "arm64"] | None
    cpu: int | None
    memory: str | int | None
    volume: Volume | Sequence[Volume]
    allocation: str | float | Allocation
    timeout: float
    env: Mapping[str, str] | None
    concurrency: int
    display: Literal["auto", "log", "spinner", "quiet"]
    on_event: events.Callback | None
    collect_metrics: bool
    logging: LogConfig | None
    max_price: float | None
    max_cost: float | None
    idle_timeout: float | None
    boot_timeout: float | None
    heartbeat_timeout: float
    retries: int


def read_options(provider: ProviderLike, **options: Any) -> tuple[Resolved, PoolSpec]:
    """Return where machines come from, and all other options, checked. What was not given is as configured.

    Raises
    ------
    SpecError
        An option can't work; the message lists every such option. Or a file of the configuration can't be read.
    """
    from skyward.config import load
    from skyward.providers import resolve
    from skyward.spec.image import Image
    from skyward.spec.pool import PoolSpec

    settings = load()
    filled, configured = settings.fill(options)
    if filled["image"] is None:
        filled["image"] = Image()
    if provider is None:
        provider = settings.get("provider")
        configured.add("provider")
    with settings.explaining(configured | {"region"}):
        resolved = resolve(provider, settings.get("region"))
    with settings.explaining(configured):
        spec = PoolSpec(**filled)
        for one in resolved if isinstance(resolved, tuple) else (resolved,):
            one.check(spec)
    return resolved, spec
