"""How each provider turns the time of a machine into money."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_HOUR_S = 3600.0
_CLOCK_S = 1e-6  # what seconds since the epoch can't tell apart, as floating-point numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Billing:
    """How a provider turns a machine's seconds into money.

    Attributes
    ----------
    increment_s
        What is begun of so many seconds is paid in full.
    minimum_s, minimum_usd
        What a machine costs at least: so many seconds, and so much.
    free_if_reclaimed_s
        A spot machine that the provider takes back within so many seconds costs nothing.
    prepaid_minutes
        What is paid ahead at a time. What a machine that has ended did not use of it is given back.
    """

    increment_s: float = 1.0
    minimum_s: float = 0.0
    minimum_usd: float = 0.0
    free_if_reclaimed_s: float = 0.0
    prepaid_minutes: int = 0

    def cost(self, seconds: float, price: float) -> float:
        """Return what a machine costs that ran so long, at a `price` in USD per hour."""
        increments = math.ceil((seconds - _CLOCK_S) / self.increment_s)
        billed_s = max(increments * self.increment_s, self.minimum_s)
        return max(billed_s * price / _HOUR_S, self.minimum_usd)

    def metadata(self) -> dict[str, Any]:
        """Return what `InstanceSpec.metadata` says of it."""
        facts = {
            "minimum_seconds": self.minimum_s, "minimum_usd": self.minimum_usd, "prepaid_minutes": self.prepaid_minutes,
        }  # fmt: skip
        return {name: value for name, value in facts.items() if value}


BILLING = {
    # "Announcing Amazon EC2 per second billing", aws.amazon.com/about-aws/whats-new, 2017-10-02; "Billing for
    # interrupted Spot Instances", Amazon EC2 User Guide, as of 2026: Linux other than SUSE.
    "aws": Billing(minimum_s=60, free_if_reclaimed_s=_HOUR_S),
    # "Droplet Pricing", docs.digitalocean.com/products/droplets/details/pricing, of 2026-05-29: so since 2026-01-01.
    "digitalocean": Billing(minimum_s=60, minimum_usd=0.01),
    # "Pricing and Billing", docs.verda.com/welcome-to-verda/pricing-and-billing, as quoted in 2026-09.
    "verda": Billing(prepaid_minutes=10),
}
"""By the name of the provider; others are taken to bill each second begun."""
