"""All that a pool has at DigitalOcean: droplets, and beside them a firewall, an SSH key and tags.

Each bears the pool's id in its name, droplets in a tag too, so that making it twice makes one, and any computer finds
it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from typing import Any

from azure.core.exceptions import AzureError, HttpResponseError

from skyward.errors import CapacityError, ProviderError
from skyward.providers import retry
from skyward.providers.base import LaunchOrder, Login, Machine, Offer
from skyward.providers.digitalocean.api import call, create_once, explained, is_unclear, pages, unless_missing
from skyward.providers.digitalocean.client import EXPIRES_TAG, OWNER_TAG, POOL_TAG, Client, name_of
from skyward.providers.digitalocean.firewall import firewalls, let_in, rules_of
from skyward.providers.launches import Launches, side_by_side, under_way, undone_by

ALL = "skyward"
"""The tag of everything."""

_AT_ONCE = 10
"""Droplets of one create call: API reference, "Create Multiple Droplets"."""
_CREATES = 3
"""Times that droplets are asked for while answers are lost."""
_THREADS = 8
_GONE_S = 120.0  # until a deleted droplet is gone, which takes seconds
_BY_TAG_S = 30.0  # after which droplets that were deleted by tag are deleted one by one


_DROPLET = re.compile(r"skyward-(?P<pool>.+)-[a-z0-9]{8,32}-\d+")


# --- droplets -----------------------------------------------------------------------------------------------


def find(do: Any, pool_id: str | None = None) -> list[dict[str, Any]]:
    """Return the droplets of a pool, or of all pools, in any state: as long as one is there it is billed.

    They are found by tag and by name: when a tag is deleted, all of them lose it.
    """
    # Droplets with GPUs are listed apart: API reference, "List All Droplets".
    found = [*pages(do.droplets.list, "droplets"), *pages(do.droplets.list, "droplets", params={"type": "gpus"})]
    ours = [raw for raw in found if (pool := pool_of(raw)) is not None and pool_id in (None, pool)]
    return list({raw["id"]: raw for raw in ours}.values())


def pool_of(raw: Mapping[str, Any]) -> str | None:
    """Return the id of a droplet's pool, or None where it has none."""
    named = _DROPLET.fullmatch(raw["name"])
    return _tagged(raw, POOL_TAG) or (named["pool"] if named else None)


def machines(client: Client, pool_id: str | None) -> list[Machine]:
    """Return the machines of a pool, or of all pools."""
    return [_machine(raw, Login(host="", port=22, user="root"), client) for raw in find(client.do, pool_id)]


def destroy(do: Any, ids: Iterable[int]) -> None:
    """Delete droplets, side by side, and return when all of them are gone.

    Raises
    ------
    ProviderError
        Some may be left; the message names them.
    """
    errors: dict[int, ProviderError] = {}

    def end(droplet_id: int) -> None:
        try:
            with explained(f"delete droplet {droplet_id}"):
                _destroy_one(do, droplet_id)
        except ProviderError as exc:
            errors[droplet_id] = exc

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="skyward-do-delete") as threads:
        list(threads.map(end, sorted(set(ids))))
    if errors:
        first = next(iter(errors.values()))
        named = ", ".join(map(str, errors))
        raise type(first)(f"{first}. These droplets may still be there, and cost: {named}") from first


def _destroy_one(do: Any, droplet_id: int) -> None:
    for _ in retry.looks(_GONE_S):
        refusal = None
        try:
            call(do.droplets.destroy, droplet_id)
        except HttpResponseError as exc:
            if exc.status_code == 404:
                return
            if exc.status_code != 422:  # 422: something else is going on with it
                raise
            refusal = exc
        if unless_missing(do.droplets.get, droplet_id) is None:
            return
    raise refusal or ProviderError(f"DigitalOcean was told to delete droplet {droplet_id}, but it still exists")


def end(client: Client, pool_id: str) -> None:
    """Delete all that a pool has."""
    do, began = client.do, time.monotonic()
    with explained(f"end pool {pool_id}"):
        _destroy_all(do, pool_id)
        # A droplet that was created right before the first look may not have been listed by then.
        retry.sleep_until_late(began)
        _destroy_all(do, pool_id)
        _clear(do, pool_id)


def _destroy_all(do: Any, pool_id: str) -> None:
    """Delete the droplets of a pool that are listed, those with its tag in one call."""
    left = find(do, pool_id)
    if any(_tagged(raw, POOL_TAG) for raw in left):
        unless_missing(do.droplets.destroy_by_tag, tag_name=f"{POOL_TAG}{pool_id}")
        for _ in retry.looks(_BY_TAG_S):
            left = find(do, pool_id)
            if not any(_tagged(raw, POOL_TAG) for raw in left):
                break
    destroy(do, [raw["id"] for raw in left])


def _clear(do: Any, pool_id: str) -> None:
    """Delete what a pool has beside its droplets, once it has none: they would lose the tags that are deleted."""
    name = name_of(pool_id)
    for raw in firewalls(do, pool_id):
        unless_missing(do.firewalls.delete, raw["id"])
    for raw in pages(do.ssh_keys.list, "ssh_keys"):
        if raw["name"] == name:
            unless_missing(do.ssh_keys.delete, raw["id"])
    for raw in pages(do.tags.list, "tags"):
        if raw["name"] == f"{POOL_TAG}{pool_id}" or raw["name"].startswith(f"{EXPIRES_TAG}{pool_id}:"):
            unless_missing(do.tags.delete, raw["name"])


def _machine(raw: Mapping[str, Any], login: Login, client: Client) -> Machine:
    public, private = _address(raw, "public"), _address(raw, "private")
    expires = _tagged(raw, EXPIRES_TAG)
    owner = _tagged(raw, OWNER_TAG)
    hourly = raw["size"]["price_hourly"]
    return Machine(
        id=str(raw["id"]),
        provider="digitalocean",
        login=replace(login, host=(private if client.private_ip else public) or ""),
        public_ip=public,
        private_ip=private,
        instance_type=raw["size_slug"],
        region=raw["region"]["slug"],
        price=hourly,
        price_on_demand=hourly,
        launched=datetime.fromisoformat(raw["created_at"]).timestamp(),
        pool_id=pool_of(raw),
        owner=owner.replace(":", "@", 1) if owner else None,
        expires=float(expires.rpartition(":")[2]) if expires else None,
    )


def _address(raw: Mapping[str, Any], kind: str) -> str | None:
    return next((str(a["ip_address"]) for a in raw["networks"].get("v4") or () if a["type"] == kind), None)


def _is_reachable(raw: Mapping[str, Any]) -> bool:
    return bool(_address(raw, "public") and _address(raw, "private"))


def _tagged(raw: Mapping[str, Any], prefix: str) -> str | None:
    return next((str(tag)[len(prefix) :] for tag in raw["tags"] if tag.startswith(prefix)), None)


def tags_of(order: LaunchOrder) -> list[str]:
    """Return the tags of an order's droplets: letters, digits, colons, dashes and underscores.

    The time at which it expires has the pool's id, so that no tag that is deleted with a pool can be another pool's.
    """
    # Tags keep the case that they were first written in: API reference, "Tags".
    owner = re.sub(r"[^a-z0-9:_-]", "-", order.owner.lower().replace("@", ":"))
    expires = f"{EXPIRES_TAG}{order.pool_id}:{round(order.expires)}"
    return [ALL, f"{POOL_TAG}{order.pool_id}", f"{OWNER_TAG}{owner}"[:255], expires]


# --- launch -------------------------------------------------------------------------------------------------


def launch(client: Client, offer: Offer, order: LaunchOrder, image: str) -> list[Machine]:
    """Launch an order's machines, or none and nothing left of it."""
    do = client.do
    names = [f"{name_of(order.pool_id)}-{order.token}-{number}" for number in range(order.count)]
    with under_way(order.pool_id, client.url) as others:
        made: list[dict[str, Any]] = []
        doubtful: set[str] = set()

        def undo() -> None:
            with explained(f"undo the launch of {order.count} {offer.instance.name}"):
                _undo(do, order, names, made, doubtful, others)

        with undone_by(undo):
            with explained(f"launch {order.count} {offer.instance.name} in {offer.region}"):
                # The same order may have been asked for before. Credentials that are refused are so here.
                there = {raw["name"]: raw for raw in find(do, order.pool_id)}
                made += [there[name] for name in names if name in there]
                with others.lock:
                    key, ssh_cidrs = _prepare(client, order)
                order.on_prepared()
                body = {
                    "size": offer.instance.name,
                    "region": offer.region,
                    "image": image,
                    "ssh_keys": [key],
                    "user_data": order.user_data.cloud_config(),
                    "tags": tags_of(order),
                }
                _create(do, order, body, [name for name in names if name not in there], made, doubtful)
                found = _await_addresses(client, order, names, made)
            others.has_machines = True
            return [replace(_machine(raw, order.login, client), ssh_cidrs=tuple(ssh_cidrs)) for raw in found]


def _prepare(client: Client, order: LaunchOrder) -> tuple[int, list[str]]:
    """Make what droplets need, unless it exists; return the id of the key, and the ranges that the firewall admits."""
    do, name = client.do, name_of(order.pool_id)
    public = order.user_data.authorized_key

    def find_key() -> int | None:
        # An account has a key once only, under whatever name.
        keys = pages(do.ssh_keys.list, "ssh_keys")
        return next((raw["id"] for raw in keys if raw["public_key"].split()[:2] == public.split()[:2]), None)

    tag = {"name": f"{POOL_TAG}{order.pool_id}"}  # a firewall may only name tags that there are
    create_once(order, lambda: call(do.tags.create, tag), lambda: unless_missing(do.tags.get, tag["name"]))
    sources = client.sources()
    rules = rules_of(order.pool_id, sources)
    create_once(
        order,
        lambda: call(do.firewalls.create, rules),
        lambda: next((let_in(do, raw, sources) for raw in firewalls(do, order.pool_id)), None),
    )
    # Without a key of the account's DigitalOcean mails a password.
    key = {"name": name, "public_key": public}
    made = create_once(order, lambda: int(call(do.ssh_keys.create, key)["ssh_key"]["id"]), find_key)
    return made, sources


def _create(
    do: Any,
    order: LaunchOrder,
    body: Mapping[str, Any],
    names: list[str],
    made: list[dict[str, Any]],
    doubtful: set[str],
) -> None:
    """Create droplets with these names, and note them in `made`.

    `doubtful` has the names of those of which it is not known whether they were created.
    """
    parts = [names[i : i + _AT_ONCE] for i in range(0, len(names), _AT_ONCE)]
    side_by_side(lambda part: _create_part(do, order, body, part, made, doubtful), parts, at_once=_THREADS)


def _create_part(
    do: Any,
    order: LaunchOrder,
    body: Mapping[str, Any],
    names: list[str],
    made: list[dict[str, Any]],
    doubtful: set[str],
) -> None:
    for _ in range(_CREATES):
        order.creating()
        doubtful.update(names)
        try:
            created = call(do.droplets.create, {**body, "names": names})["droplets"]
        except (AzureError, ValueError) as exc:
            if not is_unclear(exc):
                doubtful.difference_update(names)
                raise
            error = exc
            # There is no token by which the API knows the same call again: what it has made is found by name, and a
            # droplet is asked for again only when it can't be one that is not listed yet.
            for _ in retry.looks(retry.LISTED_S, order.pause):
                created = [raw for raw in find(do, order.pool_id) if raw["name"] in names]
                if len(created) == len(names):
                    break
        doubtful.difference_update(names)
        made += created
        names = [name for name in names if name not in {raw["name"] for raw in created}]
        if not names:
            return
    raise error


def _await_addresses(
    client: Client, order: LaunchOrder, names: Sequence[str], made: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return an order's droplets when all have addresses; one that was made twice is deleted."""
    do = client.do
    began = time.monotonic()
    seen: set[int] = set()
    for _ in retry.looks(order.boot_s, order.pause):
        listed = {raw["id"]: raw for raw in find(do, order.pool_id) if raw["name"] in names}
        found: dict[str, dict[str, Any]] = {}
        for droplet_id, raw in sorted({**{raw["id"]: raw for raw in made}, **listed}.items()):
            if found.setdefault(raw["name"], raw) is not raw:
                destroy(do, [droplet_id])
                made[:] = [other for other in made if other["id"] != droplet_id]
        _check_price(order, found.values())
        if all(name in found and _is_reachable(found[name]) for name in names):
            return [found[name] for name in names]
        # A droplet that can't be made after all vanishes; one that is only not listed yet can be asked for.
        seen |= set(listed)
        missing = {raw["id"]: raw["name"] for raw in made if raw["id"] not in listed}
        asked = [i for i in missing if i in seen or time.monotonic() - began > retry.LISTED_S]
        gone = [missing[i] for i in asked if unless_missing(do.droplets.get, i) is None]
        if gone:
            raise CapacityError(f"DigitalOcean brought up {len(names) - len(gone)} of {len(names)} droplets")
    there = sum(map(_is_reachable, found.values()))
    within = f"within {order.boot_s:g} s; boot_timeout= raises that"
    raise CapacityError(f"DigitalOcean brought up {there} of {len(names)} droplets {within}")


def _check_price(order: LaunchOrder, found: Iterable[Mapping[str, Any]]) -> None:
    # Prices of this release's table, which may have chosen the size, can be old.
    prices = [raw["size"]["price_hourly"] for raw in found]
    if order.max_price is not None and max(prices, default=0.0) > order.max_price:
        raise CapacityError(f"DigitalOcean asks {max(prices):g} USD/h, above max_price={order.max_price:g}")


def _undo(
    do: Any,
    order: LaunchOrder,
    names: Sequence[str],
    made: Sequence[Mapping[str, Any]],
    doubtful: Collection[str],
    others: Launches,
) -> None:
    destroy(do, [raw["id"] for raw in made])
    for _ in retry.looks(retry.LISTED_S if doubtful else 0.0):
        destroy(do, [raw["id"] for raw in find(do, order.pool_id) if raw["name"] in names])
    with others.lock:
        if others.count == 1 and not others.has_machines and not find(do, order.pool_id):
            _clear(do, order.pool_id)

