"""Machine types on offer, and machines as users see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """A type of machine that a provider offers.

    `memory_gb` is the number that the provider lists; with AWS and DigitalOcean it is in GiB. Prices are in USD per
    hour; None: unknown, or not offered.
    """

    name: str
    vcpu: int
    memory_gb: float
    accelerator: str | None = None
    accelerator_count: int = 0
    accelerator_memory_gb: float = 0
    price_on_demand: float | None = None
    price_spot: float | None = None
    billing_increment_minutes: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A machine of a pool."""

    id: str
    provider: str
    spot: bool = False
    private_ip: str | None = None
    public_ip: str | None = None
    node: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_head(self) -> bool:
        """Whether this is node 0, which has the scheduler until it is lost."""
        return self.node == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitedInstance(Instance):
    """A machine that is gone, and why."""

    reason: str = ""
