"""An account at DigitalOcean, and the names and tags of what a pool has there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skyward.providers.caller import caller_ranges

POOL_TAG, OWNER_TAG, EXPIRES_TAG = "skyward:pool:", "skyward:owner:", "skyward:expires:"
_PRIVATE = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """The SDK's client, where it sends to, and how machines are reached."""

    do: Any
    url: str
    private_ip: bool = False
    cidrs: tuple[str, ...] = ()

    def sources(self) -> list[str]:
        """Return the addresses that may log in."""
        # Private addresses are those of the droplet's own VPC: no other network reaches it.
        private = _PRIVATE if self.private_ip else ()
        return caller_ranges("DigitalOcean", self.url, (".digitalocean.com",), self.cidrs, private=private)


def name_of(pool_id: str) -> str:
    return f"skyward-{pool_id}"
