"""The tags of what a pool has on AWS, and filters that find it by them."""

from __future__ import annotations

from typing import Any

from skyward.providers.base import LaunchOrder

POOL, OWNER, EXPIRES, TOKEN = "skyward:pool", "skyward:owner", "skyward:expires", "skyward:token"


def tags_of(order: LaunchOrder) -> list[dict[str, str]]:
    """Return the tags of all that is made for an order."""
    tags = {
        "Name": f"skyward-{order.pool_id}", POOL: order.pool_id, OWNER: order.owner,
        EXPIRES: str(round(order.expires)), TOKEN: order.token,
    }  # fmt: skip
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def of_pool(pool_id: str) -> list[dict[str, Any]]:
    """Return the filter that finds what is a pool's."""
    return [{"Name": f"tag:{POOL}", "Values": [pool_id]}]


def of_order(order: LaunchOrder) -> list[dict[str, Any]]:
    """Return the filter that finds what was made for one order."""
    return [{"Name": f"tag:{TOKEN}", "Values": [order.token]}, *of_pool(order.pool_id)]
