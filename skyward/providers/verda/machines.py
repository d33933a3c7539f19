"""A pool's machines on Verda: created side by side with what they are born with, awaited, and deleted for good.

All that belongs to a pool has its id in its name, machines in their description too. Imported on first use, as the SDK
is.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from skyward.errors import CapacityError, CredentialsError, ProviderError
from skyward.providers import retry
from skyward.providers.base import LaunchOrder, Login, Machine, Offer
from skyward.providers.launches import side_by_side, undone_by
from skyward.providers.verda.api import Api, create_once, explained, is_wrong_state
from skyward.spec.instance import InstanceSpec

_LEAST_DISK_GB = 50
_START_LIMIT_S = 900.0
_END_LIMIT_S = 900.0
"""Verda deletes no machine while it is being provisioned, which takes minutes."""
_DISKS_LIMIT_S = 120.0
_MOST_CALLS = 16
"""Machines that are asked for at once. Chosen, not measured: a pool of a hundred takes some seconds."""

# States: GitHub verda-cloud/verdacloud-sdk-go at ca1aa5c, pkg/verda/instances_types.go.
_PLACED = ("provisioning", "validating", "running")
_ON_THE_WAY = ("new", "ordered", "pending", *_PLACED)
_GONE = ("discontinued", "deleted", "notfound")
_NO_CAPACITY = "no_capacity"
_HOSTNAME = re.compile(r"skyward-(?P<pool>.+)-[a-z0-9]+-\d+")
_IMAGE = re.compile(r"ubuntu-(?P<release>\d\d\.04)(-cuda-(?P<cuda>[\d.]+))?(-open)?(?P<docker>-docker)?")


def prefix(pool_id: str) -> str:
    """Return what the names of all of a pool begin with."""
    return f"skyward-{pool_id}-"


def found(api: Api) -> list[Machine]:
    """Return the machines of all pools, with what their tags say."""
    with explained("list machines"):
        there = api.instances.get()
    return [
        _machine(i, Login(host=i.ip or "", port=22, user="root"))
        for i in there
        if _pool_of(i) is not None and i.status not in (*_GONE, _NO_CAPACITY)
    ]


def _tags(instance: Any) -> dict[str, str]:
    return dict(re.findall(r"skyward:(\w+)=(\S+)", instance.description or ""))


def _pool_of(instance: Any) -> str | None:
    """Return the id of a machine's pool, as its name says, or else its description; None where it has none."""
    named = _HOSTNAME.fullmatch(instance.hostname)
    return named["pool"] if named else _tags(instance).get("pool")


# --- start --------------------------------------------------------------------------------------------------


def launch(api: Api, offer: Offer, order: LaunchOrder) -> list[Machine]:
    """Launch an order's machines, or none and nothing left of it. Return them when they have addresses."""
    label = f"{prefix(order.pool_id)}{order.token[:16]}"
    made: set[str] = set()
    with undone_by(lambda: _undo(api, label, made)):
        return _start(api, offer, order, label, made)


def _start(api: Api, offer: Offer, order: LaunchOrder, label: str, made: set[str]) -> list[Machine]:
    """Return an order's machines. All that is made bears `label`, and ids of machines are added to `made`."""
    instance_type, where = offer.instance.name, offer.region
    doing = f"start {order.count} {'spot ' if order.spot else ''}{instance_type} in {where}"
    with explained(doing, creates=True):
        known = {i.hostname: i for i in api.instances.get() if i.hostname.startswith(f"{label}-")}
        disk_gb = max(_LEAST_DISK_GB, math.ceil(order.disk_gib * 2**30 / 1e9))
        request = {
            "instance_type": instance_type,
            "location": where,
            "image": _image(api, offer.instance),
            "ssh_key_ids": [_text(order, api.ssh_keys, label, order.user_data.authorized_key)],
            "startup_script_id": _text(order, api.scripts, label, order.user_data.script()),
            "description": _description(order),
            "is_spot": order.spot,
            "pricing": "FIXED_PRICE",
            "wait_for_status": None,
        }
    order.on_prepared()

    def create(number: int) -> Any:
        hostname = f"{label}-{number}"
        disk = {"name": hostname, "size": disk_gb}
        if order.spot:
            disk["on_spot_discontinue"] = "delete_permanently"
        with explained(doing, creates=True):
            one = known.get(hostname) or _create(api, order, {**request, "hostname": hostname, "os_volume": disk})
        made.add(one.id)
        return one

    created = side_by_side(create, range(order.count), at_once=_MOST_CALLS)
    price = max(float(i.price_per_hour) for i in created)
    if order.max_price is not None and price > order.max_price:
        raise CapacityError(f"Verda's price for {instance_type} is now {price:g} USD/h, more than {order.max_price:g}")
    placed = _await_addresses(api, order, label, [i.id for i in created])
    on_demand = offer.instance.price_on_demand
    return [replace(_machine(i, replace(order.login, host=i.ip)), price_on_demand=on_demand) for i in placed]


def _create(api: Api, order: LaunchOrder, request: Mapping[str, Any]) -> Any:
    def find() -> Any:
        return next((i for i in api.instances.get() if i.hostname == request["hostname"]), None)

    return create_once(order, lambda: api.instances.create(**request), find)


def _text(order: LaunchOrder, service: Any, name: str, text: str) -> str:
    """Return the id of a key or script with this name, made where there is none."""

    def find() -> Any:
        return next((there for there in service.get() if there.name == name), None)

    found: str = (find() or create_once(order, lambda: service.create(name, text), find)).id
    return found


def _image(api: Api, instance: InstanceSpec) -> str:
    """Return the newest Ubuntu 24.04, or the newest there is, that fits a type; with CUDA for accelerators."""
    best: tuple[tuple[bool, str, list[int], bool], str] | None = None
    for image in api.images.get(instance_type=instance.name):
        match = _IMAGE.fullmatch(image.image_type)
        if match is None or bool(match["cuda"]) != bool(instance.accelerator):
            continue
        cuda = [int(part) for part in (match["cuda"] or "0").split(".") if part]
        rank = (match["release"] == "24.04", match["release"], cuda, not match["docker"]), image.image_type
        best = rank if best is None else max(best, rank)
    if best is None:
        raise ProviderError(f"Verda has no image of Ubuntu that fits {instance.name}")
    return best[1]


def _description(order: LaunchOrder) -> str:
    owner = re.sub(r"\s", "_", order.owner)
    return f"skyward:pool={order.pool_id} skyward:owner={owner} skyward:expires={int(order.expires)}"


def _await_addresses(api: Api, order: LaunchOrder, label: str, ids: Sequence[str]) -> list[Any]:
    limit_s = max(_START_LIMIT_S, order.boot_s)
    for _ in retry.looks(limit_s, order.pause):
        with explained("see whether machines start"):
            there = {i.id: i for i in api.instances.get() if i.hostname.startswith(f"{label}-")}
            mine = [there.get(one) or _by_id(api, one) for one in ids]
        if None in mine:
            raise CapacityError(f"Verda has no machine {ids[mine.index(None)]} any more, which it was about to start")
        failed = next((i for i in mine if i.status not in _ON_THE_WAY), None)
        if failed is not None:
            raise CapacityError(f"Verda has {failed.hostname} in state {failed.status!r} instead of starting it")
        if all(i.ip and i.status in _PLACED for i in mine):
            doubled = set(there) - set(ids)  # of a call that was thought lost, and came through late
            if doubled:
                terminate(api, doubled)
            return mine
    raise CapacityError(f"Verda gave machines no addresses within {limit_s:g} s. Raise boot_timeout=")


def _by_id(api: Api, one: str) -> Any:
    """Return a machine that is not in the list, as it may not be yet; None where there is none.

    The SDK relies on it that a machine can be asked for as soon as it is created.
    """
    try:
        return api.instances.get_by_id(one)
    except Exception as exc:  # judged by `is_wrong_state`
        if not is_wrong_state(exc):
            raise
        return None


def _machine(instance: Any, login: Login) -> Machine:
    tags = _tags(instance)
    price = float(instance.price_per_hour)
    return Machine(
        id=instance.id,
        provider="verda",
        login=login,
        public_ip=instance.ip,
        instance_type=instance.instance_type,
        region=instance.location,
        spot=instance.is_spot,
        price=price,
        price_on_demand=None if instance.is_spot else price,
        launched=datetime.fromisoformat(instance.created_at).timestamp(),
        pool_id=_pool_of(instance),
        owner=tags.get("owner"),
        expires=float(tags["expires"]) if tags.get("expires", "").isdecimal() else None,
    )


# --- end ----------------------------------------------------------------------------------------------------


def terminate(api: Api, ids: Collection[str]) -> None:
    """Destroy machines with their disks. What has a disk's name and is in use is another machine's."""
    disks = _destroy(api, lambda instance: instance.id in ids, known=ids)
    _delete_volumes(api, lambda v: v.id in disks or (v.name in disks and not v.instance_id))


def end(api: Api, pool_id: str, regions: Collection[str]) -> None:
    """Destroy all of a pool: machines and their disks, in `regions` alone, then keys and scripts.

    Raises
    ------
    ProviderError
        Something may be left; all else is gone.
    """
    began = time.monotonic()

    def is_ours(instance: Any) -> bool:
        return _pool_of(instance) == pool_id and instance.location in regions

    def is_name(name: str) -> bool:
        return name.startswith(prefix(pool_id))

    def destroy() -> None:
        _destroy(api, is_ours)
        # A machine that was created right before the first look may not have been listed by then.
        retry.sleep_until_late(began)
        _destroy(api, is_ours)
        _delete_volumes(api, lambda volume: is_name(volume.name) and volume.location in regions)

    _end(api, destroy, is_name)


def _undo(api: Api, label: str, made: Collection[str]) -> None:
    """Destroy all of a launch; `made` has ids of its machines, which may not be listed yet."""

    def is_name(name: str) -> bool:
        return name.startswith(label)

    def destroy() -> None:
        _destroy(api, lambda instance: is_name(instance.hostname), known=made)
        _delete_volumes(api, lambda volume: is_name(volume.name))

    _end(api, destroy, is_name)


def _end(api: Api, destroy: Callable[[], None], is_name: Callable[[str], bool]) -> None:
    """Destroy machines, then delete keys and scripts of such names, and raise once for what may be left."""
    failures: list[ProviderError] = []
    steps = (destroy, partial(_delete_texts, api.scripts, is_name), partial(_delete_texts, api.ssh_keys, is_name))
    for step in steps:
        try:
            step()
        except CredentialsError:
            raise
        except ProviderError as exc:
            failures.append(exc)
    if failures:
        raise ProviderError(f"something may be left and cost money: {'; '.join(map(str, failures))}") from failures[0]


def _destroy(api: Api, is_ours: Callable[[Any], bool], *, known: Collection[str] = ()) -> set[str]:
    """Delete machines with their disks, see that they are gone, and return ids and names of the disks.

    `known` has ids of machines that may not be listed yet.
    """
    disks: set[str] = set()
    unlisted = set(known)
    names, refusal = "", None
    for number, _ in enumerate(retry.looks(_END_LIMIT_S)):
        with explained("delete machines"):
            listed = [i for i in api.instances.get() if is_ours(i)]
            unlisted -= {i.id for i in listed}
            asked = [i for one in unlisted if (i := _by_id(api, one)) is not None]
            there = [i for i in (*listed, *asked) if i.status not in _GONE]
            # Of what never was Verda may not let go, and it costs nothing: that is asked for and not waited for.
            left = [i for i in there if i.status != _NO_CAPACITY or number == 0]
            if not left:
                return disks
            names = ", ".join(i.hostname for i in left)
            disks.update(text for i in left for text in (i.os_volume_id, i.hostname) if text)
            refusal = _ask_to_delete(api, [i for i in left if i.status != "deleting"], is_first=number == 0) or refusal
    said = f"; Verda said: {refusal.message}" if refusal else ""
    raise ProviderError(f"{names} may still run and cost money: not gone within {_END_LIMIT_S:g} s{said}") from refusal


def _ask_to_delete(api: Api, instances: Sequence[Any], *, is_first: bool) -> Any:
    """Ask Verda to delete machines, and return its last refusal, or None.

    Refused for now are those that are being provisioned: "Can't discontinue a provisioning instance", GitHub
    dstackai/dstack at 1014ea6. Those that are gone meanwhile are refused as well; who is left shows in the next list.
    """
    checked = [i for i in instances if i.status not in _ON_THE_WAY or i.status == "running"]
    groups = [[i] for i in instances if i not in checked]
    # At first all at once and their disks with them; then one by one, since what is refused of one is refused of all.
    groups += [checked] if is_first and checked else [[i] for i in checked]
    refusal = None
    for group in groups:
        # Without a list of disks Verda moves the machine's own one to the trash; with an empty list it would keep it.
        disks = [i.os_volume_id for i in group if i.os_volume_id and is_first] or None
        try:
            api.instances.action([i.id for i in group], "delete", volume_ids=disks, delete_permanently=True)
        except Exception as exc:  # judged by `is_wrong_state`
            if not is_wrong_state(exc):
                raise
            refusal = exc
    return refusal


def _delete_volumes(api: Api, is_ours: Callable[[Any], bool]) -> None:
    """Delete volumes that are left, in the trash too, and see that they are gone."""
    asked: set[str] = set()  # of those in the trash; it may show them for a while
    kept: list[Any] = []
    for _ in retry.looks(_DISKS_LIMIT_S):
        with explained("delete disks"):
            kept = [v for v in api.volumes.get() if is_ours(v) and v.status != "deleted"]
            trash = {v.id for v in api.volumes.get_in_trash() if is_ours(v)} - asked
            if not kept and not trash:
                return
            asked |= trash
            for one in [*(v.id for v in kept if v.status != "deleting"), *trash]:
                try:
                    api.volumes.delete_by_id(one, is_permanent=True)
                except Exception as exc:  # judged by `is_wrong_state`: attached still, or gone meanwhile
                    if not is_wrong_state(exc):
                        raise
    raise ProviderError(f"disks may be left and cost money: {', '.join(v.name for v in kept)}")


def _delete_texts(service: Any, is_name: Callable[[str], bool]) -> None:
    """Delete the keys or scripts that have such a name."""
    with explained("delete keys and scripts"):
        for there in service.get():
            if is_name(there.name):
                try:
                    service.delete_by_id(there.id)
                except Exception as exc:  # judged by `is_wrong_state`: it was deleted meanwhile by another process
                    if not is_wrong_state(exc):
                        raise
