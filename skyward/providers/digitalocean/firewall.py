"""A pool's firewall at DigitalOcean: SSH from the caller, all traffic between the pool's droplets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from skyward.providers.digitalocean.api import call, explained, pages
from skyward.providers.digitalocean.client import POOL_TAG, Client, name_of

_ANYWHERE = {"addresses": ["0.0.0.0/0", "::/0"]}


def open_firewall(client: Client, pool_id: str) -> None:
    """Let the caller's present address in too."""
    with explained(f"let this computer in to pool {pool_id}"):
        for raw in firewalls(client.do, pool_id):
            let_in(client.do, raw, client.sources())


def firewalls(do: Any, pool_id: str) -> list[dict[str, Any]]:
    return [raw for raw in pages(do.firewalls.list, "firewalls") if raw["name"] == name_of(pool_id)]


def let_in(do: Any, firewall: Mapping[str, Any], sources: Sequence[str]) -> Mapping[str, Any]:
    """Return a firewall that lets `sources` log in too."""
    ssh = next(rule for rule in firewall["inbound_rules"] if rule["ports"] == "22")
    new = [source for source in sources if source not in ssh["sources"]["addresses"]]
    if new:
        ssh["sources"]["addresses"] += new
        what = {key: firewall[key] for key in ("name", "droplet_ids", "tags", "inbound_rules", "outbound_rules")}
        call(do.firewalls.update, firewall["id"], what)
    return firewall


def rules_of(pool_id: str, sources: Sequence[str]) -> dict[str, Any]:
    """Return the pool's firewall: all traffic among its droplets and out of them, SSH from `sources`, nothing else."""
    tag = f"{POOL_TAG}{pool_id}"
    every = [{"protocol": "tcp", "ports": "0"}, {"protocol": "udp", "ports": "0"}, {"protocol": "icmp", "ports": "0"}]
    return {
        "name": name_of(pool_id),
        "tags": [tag],
        "inbound_rules": [
            {"protocol": "tcp", "ports": "22", "sources": {"addresses": list(sources)}},
            *({**traffic, "sources": {"tags": [tag]}} for traffic in every),
        ],
        "outbound_rules": [{**traffic, "destinations": _ANYWHERE} for traffic in every],
    }
