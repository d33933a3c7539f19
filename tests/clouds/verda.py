"""Verda in a box: an HTTP server that speaks Verda's public API as its SDK uses it, and boots machines in a rack.

Sources: the SDK `verda` 1.25 (paths, fields, states, answers); GitHub verda-cloud/verdacloud-sdk-go at ca1aa5c
(further states, what a `delete` does with volumes, answers 202 and 207 of actions, fields of images and volume
types); Verda's OpenAPI description, api.verda.com/v1/docs, as others quote it (error codes and their status; 503 for
no capacity; 204 for what is so already); GitHub dstackai/dstack at 1014ea6 (the words of refusals: an instance can't
be deleted while it is provisioned; an image may not fit a type; hosts have names of up to 60 characters).
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from skyward.providers.prices import TableRow, table
from tests.clouds.rack import Rack

LOCATIONS = ("FIN-01", "FIN-02", "FIN-03", "ICE-01")
_VOLUME_USD_PER_GB_MONTH = 0.2
_HOURS_PER_MONTH = 730
# GPUs as the API describes them: GitHub dstackai/gpuhunt at 2449039, src/gpuhunt/providers/verda.py.
_GPUS = {
    "B300": "B300 SXM6 262GB",
    "B200": "B200 SXM6 180GB",
    "H200": "H200 SXM5 141GB",
    "H100": "H100 SXM5 80GB",
    "A100-80GB": "A100 SXM4 80GB",
    "V100": "Tesla V100 16GB",
    "RTX-PRO-6000": "RTX PRO 6000 96GB",
    "RTX-6000-Ada": "RTX 6000 Ada 48GB",
}
_IMAGES = (
    "ubuntu-22.04",
    "ubuntu-22.04-cuda-12.0-docker",
    "ubuntu-24.04",
    "ubuntu-24.04-cuda-12.8-open",
    "ubuntu-24.04-cuda-12.8-open-docker",
    "ubuntu-24.04-cuda-13.0-open",
    "ubuntu-24.04-cuda-13.0-open-docker",
    "kubernetes-ubuntu-24.04-cuda-12.8",
)
_ENDED = ("discontinued", "no_capacity", "error")


class Refused(Exception):  # noqa: N818 - it is an answer
    """An answer that is an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def _bad(message: str) -> Refused:
    return Refused(400, "invalid_request", message)


@dataclass
class Faults:
    """What goes wrong, until it is taken back.

    Attributes
    ----------
    no_capacity
        (type, location, whether spot) that there are none of.
    capacity
        How many more there are of (type, location, whether spot); what is not named has no end.
    end_as
        States in which the next instances end after they were ordered: ``"no_capacity"`` or ``"error"``.
    has_funds, most_instances
        False: the balance is used up; and how many instances the account may have. How the API words the latter is
        not documented.
    throttled
        So many of the next calls are answered with 429.
    lost
        So many of the next answers to (method, path) are lost after the call was done.
    down
        (method, beginning of the path) that a gateway answers in place of the API, with 503 and no JSON; "" is any.
    """

    no_capacity: set[tuple[str, str, bool]] = field(default_factory=set)
    capacity: dict[tuple[str, str, bool], int] = field(default_factory=dict)
    end_as: list[str] = field(default_factory=list)
    has_funds: bool = True
    most_instances: int | None = None
    throttled: int = 0
    lost: dict[tuple[str, str], int] = field(default_factory=dict)
    down: set[tuple[str, str]] = field(default_factory=set)


@dataclass
class _Volume:
    id: str
    name: str
    size: int
    location: str
    created: float
    is_os_volume: bool
    instance_id: str | None
    on_spot_discontinue: str = "keep_detached"
    trashed: float | None = None
    ended: float | None = None


@dataclass
class _Instance:
    id: str
    row: TableRow
    request: dict[str, Any]
    yard_id: str
    ip: str
    created: float
    price: float
    volume: _Volume
    fate: str | None = None
    status: str = "ordered"
    gone_at: float | None = None
    ended: float | None = None


class VerdaCloud:
    """A Verda account with its API at `url`, which ends in ``/v1``. Close it; the rack is its owner's to close.

    Attributes
    ----------
    clock
        Tells the time, in seconds since the epoch.
    ordered_s, provisioning_s, deleting_s
        How long instances stay in these states; provisioned is one only when its machine has booted.
    unlisted_s
        How long instances that were made are in no list. Verda documents no such time.
    token_s
        How long tokens are good for.
    calls
        (method, path) of every call so far.
    """

    def __init__(self, rack: Rack, *, port: int = 0) -> None:
        self.rack = rack
        self.client_id, self.client_secret = secrets.token_urlsafe(12), secrets.token_urlsafe(24)
        self.faults = Faults()
        self.calls: list[tuple[str, str]] = []
        self.clock: Callable[[], float] = time.time
        self.ordered_s, self.provisioning_s, self.deleting_s = 0.02, 0.05, 0.02
        self.unlisted_s = 0.0
        self.token_s = 3600
        self._lock = threading.RLock()
        self._tokens: dict[str, float] = {}
        self._rows = _by_type()
        self._keys: dict[str, dict[str, Any]] = {}
        self._scripts: dict[str, dict[str, Any]] = {}
        self._volumes: dict[str, _Volume] = {}
        self._instances: dict[str, _Instance] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="verda", daemon=True)
        self._thread.start()

    def __enter__(self) -> VerdaCloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """What Verda's users set, for this account."""
        return {
            "VERDA_CLIENT_ID": self.client_id,
            "VERDA_CLIENT_SECRET": self.client_secret,
            "VERDA_BASE_URL": self.url,
        }

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for instance in self._instances.values():
            self.rack.destroy(instance.yard_id)

    # --- for tests ------------------------------------------------------------------------------------------

    def reclaim(self, instance_id: str) -> None:
        """Take a spot instance back, without notice."""
        with self._lock:
            instance = self._instances[instance_id]
            assert instance.request["is_spot"], f"{instance_id} is no spot instance"
            self._end(instance)
            instance.status = "discontinued"
            policy = instance.volume.on_spot_discontinue
            instance.volume.instance_id = None
            if policy != "keep_detached":
                self._delete_volume(instance.volume, is_permanent=policy == "delete_permanently")

    def rename(self, pool_id: str) -> None:
        """Give the machines of a pool other names."""
        with self._lock:
            for number, instance in enumerate(self._instances.values()):
                if f"-{pool_id}-" in instance.request["hostname"]:
                    instance.request = {**instance.request, "hostname": f"renamed-{number}"}

    def expire_tokens(self) -> None:
        with self._lock:
            self._tokens.clear()

    def bill(self, *, volumes: bool = True) -> float:
        """Return USD so far, for what there is and what there was.

        Verda docs, "Pricing and Billing" (docs.verda.com/welcome-to-verda/pricing-and-billing), as quoted on
        2026-09-24: paid in advance by 10 minutes, and what is not used of them comes back after the end; so what is
        paid is the time itself. "Shutdown and delete" there: one that is switched off is paid for until it is
        deleted, and so are volumes that stay, in the trash as well. Volumes: 0.20 USD per GB and month of 730 hours,
        GitHub verda-cloud/verda-cli at 7ae1786, CLAUDE.md.
        """
        with self._lock:
            self._settle()
            now = self.clock()
            hours = [(i.price, (i.ended or now) - i.created) for i in self._instances.values() if not i.fate]
            if volumes:
                per_gb = _VOLUME_USD_PER_GB_MONTH / _HOURS_PER_MONTH
                hours += [(v.size * per_gb, (v.ended or now) - v.created) for v in self._volumes.values()]
            return sum(price * seconds / 3600 for price, seconds in hours)

    def left(self) -> list[str]:
        """Return what is in the account: instances and volumes that cost, keys and scripts."""
        with self._lock:
            self._settle()
            kinds = {
                "instance": [i.request["hostname"] for i in self._instances.values() if i.ended is None],
                "volume": [v.name for v in self._volumes.values() if v.ended is None],
                "key": [key["name"] for key in self._keys.values()],
                "script": [script["name"] for script in self._scripts.values()],
            }
            return [f"{kind} {name}" for kind, names in kinds.items() for name in names]

    # --- one call -------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, str], body: Any, token: str) -> tuple[int, Any] | None:
        """Return status and answer, a text or what becomes JSON; None: the answer is lost."""
        with self._lock:
            self.calls.append((method, path))
            if any(m in ("", method) and path.startswith(p) for m, p in self.faults.down):
                return 503, "<html><title>503 Service Temporarily Unavailable</title></html>"
            if self.faults.throttled > 0:
                self.faults.throttled -= 1
                raise Refused(429, "rate_limit_exceeded", "Too many requests")
            self._settle()
            done = self._dispatch(method, path, query, body, token)
            if self.faults.lost.get((method, path), 0) > 0:
                self.faults.lost[method, path] -= 1
                return None
            return done

    def _dispatch(self, method: str, path: str, query: dict[str, str], body: Any, token: str) -> tuple[int, Any]:
        if (method, path) == ("POST", "/oauth2/token"):
            return 200, self._token(body)
        if self._tokens.get(token, 0) <= self.clock():
            raise Refused(401, "unauthorized_request", "Access is unauthorized: the token is invalid or has expired")
        for verb, pattern, do in self._routes():
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                return do(*match.groups(), query if method == "GET" else body)
        raise Refused(404, "not_found", f"Cannot {method} {path}")

    def _routes(self) -> list[tuple[str, str, Callable[..., tuple[int, Any]]]]:
        routes: list[tuple[str, str, Callable[..., tuple[int, Any]]]] = [
            ("GET", "/locations", lambda _: (200, [{"code": c, "name": c, "country_code": c[:2]} for c in LOCATIONS])),
            ("GET", "/balance", lambda _: (200, {"amount": 100.0 * self.faults.has_funds, "currency": "usd"})),
            ("GET", "/images", self._list_images),
            ("GET", "/instance-types", lambda _: (200, [_type(rows[0]) for rows in self._rows.values()])),
            ("GET", "/instance-availability", self._availability),
            ("GET", "/volume-types", _list_volume_types),
            ("GET", "/volumes", lambda _: (200, [self._show_volume(v) for v in self._volumes.values() if _is_kept(v)])),
            ("GET", "/volumes/trash", self._list_trash),
            ("PUT", "/volumes", self._act_on_volumes),
            ("DELETE", "/volumes/([^/]+)", self._delete_one_volume),
            ("GET", "/instances", self._list_instances),
            ("GET", "/instances/([^/]+)", lambda ident, _: (200, self._show(self._instance(ident)))),
            ("POST", "/instances", self._create),
            ("PUT", "/instances", self._act),
        ]
        for path, field_name, store in (("/sshkeys", "key", self._keys), ("/scripts", "script", self._scripts)):
            routes += _routes_of_texts(path, field_name, store)
        return routes

    def _token(self, body: Any) -> dict[str, Any]:
        grant = body.get("grant_type")
        if grant == "client_credentials":
            if (body.get("client_id"), body.get("client_secret")) != (self.client_id, self.client_secret):
                raise Refused(401, "unauthorized_request", "Invalid client id or client secret")
        elif grant == "refresh_token":
            if self._tokens.get(f"refresh {body.get('refresh_token')}", 0) <= self.clock():
                raise Refused(401, "unauthorized_request", "Invalid refresh token")
        else:
            raise _bad("grant_type must be client_credentials or refresh_token")
        token, refresh = secrets.token_urlsafe(), secrets.token_urlsafe()
        self._tokens[token] = self._tokens[f"refresh {refresh}"] = self.clock() + self.token_s
        facts = {"token_type": "Bearer", "expires_in": self.token_s, "scope": "cloud-api-v1"}
        return {"access_token": token, "refresh_token": refresh, **facts}

    # --- what there is to have ------------------------------------------------------------------------------

    def _list_images(self, query: dict[str, str]) -> tuple[int, Any]:
        wanted = query.get("instance_type")
        if wanted is not None and wanted not in self._rows:
            raise _bad("Invalid instance type")
        found = [i for i in _IMAGES if wanted is None or _fits(i, self._rows[wanted][0])]
        facts = {"is_default": False, "is_cluster": False, "category": "ubuntu", "details": []}
        return 200, [{"id": _image_id(i), "image_type": i, "name": i.replace("-", " "), **facts} for i in found]

    def _availability(self, query: dict[str, str]) -> tuple[int, Any]:
        spot = query.get("isSpot", query.get("is_spot", "false")) == "true"
        wanted = query.get("location_code")
        return 200, [
            {"location_code": code, "availabilities": [t for t in self._rows if self._has(t, code, spot)]}
            for code in LOCATIONS
            if wanted in (None, code)
        ]

    def _has(self, type_name: str, location: str, spot: bool) -> bool:
        key = (type_name, location, spot)
        row = next((r for r in self._rows[type_name] if r.region == location), None)
        if row is None or (row.price_spot if spot else row.price_on_demand) is None:
            return False
        return key not in self.faults.no_capacity and self.faults.capacity.get(key, 1) > 0

    # --- instances ------------------------------------------------------------------------------------------

    def is_settled(self) -> bool:
        """Tell whether no instance is on its way up."""
        self._settle()
        return not any(instance.status in ("ordered", "provisioning") for instance in self._instances.values())

    def _settle(self) -> None:
        """Bring every instance to the state that it has by now."""
        now = self.clock()
        for instance in self._instances.values():
            age = now - instance.created
            if instance.status == "ordered" and age >= self.ordered_s:
                instance.status = instance.fate or "provisioning"
            if instance.status == "provisioning" and age >= self.ordered_s + self.provisioning_s:
                is_up = not self.rack.boots or instance.yard_id in self.rack.machines
                failed = instance.yard_id in self.rack.failed
                instance.status = "running" if is_up else "error" if failed else "provisioning"
            if instance.gone_at is not None and now >= instance.gone_at:
                instance.status = "discontinued"

    def _instance(self, ident: str) -> _Instance:
        if ident not in self._instances:
            raise Refused(404, "not_found", "Invalid instance id")
        return self._instances[ident]

    def _list_instances(self, query: dict[str, str]) -> tuple[int, Any]:
        wanted = query.get("status")
        shown = [
            self._show(i)
            for i in self._instances.values()
            if (i.status == wanted if wanted else i.status != "discontinued")
            if self.clock() >= i.created + self.unlisted_s
        ]
        return 200, shown

    def _show(self, instance: _Instance) -> dict[str, Any]:
        request = instance.request
        is_placed = instance.status not in ("ordered", "no_capacity")
        return {
            "id": instance.id,
            **_hardware(instance.row),
            "instance_type": instance.row.instance_type,
            "price_per_hour": instance.price,
            "hostname": request["hostname"],
            "description": request["description"],
            "status": instance.status,
            "created_at": _date(instance.created),
            "ssh_key_ids": request["ssh_key_ids"],
            "ip": instance.ip if is_placed else None,
            "os_volume_id": instance.volume.id if is_placed else None,
            "volume_ids": [instance.volume.id] if is_placed else [],
            "location": request["location_code"],
            "image": request["image"],
            "os_name": request["image"],
            "startup_script_id": request["startup_script_id"],
            "is_spot": request["is_spot"],
            "contract": "SPOT" if request["is_spot"] else "PAY_AS_YOU_GO",
            "pricing": request.get("pricing") or "FIXED_PRICE",
            "jupyter_token": None,
            "tags": [],
        }

    def _create(self, body: Any) -> tuple[int, Any]:
        row = self._check_create(body)
        spot, location, volume = body["is_spot"], body["location_code"], body["os_volume"]
        if not self.faults.has_funds:
            raise Refused(402, "insufficient_funds", "Insufficient funds")
        if self.faults.most_instances is not None:
            there = [i for i in self._instances.values() if i.ended is None]
            if len(there) >= self.faults.most_instances:
                raise Refused(403, "forbidden_action", f"Instance limit of {self.faults.most_instances} exceeded")
        if not self._has(row.instance_type, location, spot):
            raise Refused(503, "service_unavailable", "No capacity available")
        key = (row.instance_type, location, spot)
        if key in self.faults.capacity:
            self.faults.capacity[key] -= 1
        fate = self.faults.end_as.pop(0) if self.faults.end_as else None
        ident, now = str(uuid.uuid4()), self.clock()
        disk = _Volume(str(uuid.uuid4()), volume["name"], volume["size"], location, now, True, ident)
        disk.on_spot_discontinue = volume.get("on_spot_discontinue") or "keep_detached"
        taken = {i.yard_id for i in self._instances.values()}
        yard_id = body["hostname"] if body["hostname"] not in taken else f"{body['hostname'][:50]}-{ident[:4]}"
        ip = "" if fate else self.rack.boot(yard_id, self._user_data(body), lambda: self._off(ident))
        price = row.price_spot if spot else row.price_on_demand
        assert price is not None
        self._instances[ident] = _Instance(ident, row, body, yard_id, ip, now, price, disk, fate)
        if fate:
            self._instances[ident].ended = now
        else:
            self._volumes[disk.id] = disk
        return 202, ident

    def _check_create(self, body: Any) -> TableRow:
        rows = self._rows.get(body.get("instance_type"))
        if rows is None:
            raise _bad("Invalid instance type")
        if body.get("location_code") not in LOCATIONS:
            raise _bad("Invalid location code")
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,58}[A-Za-z0-9])?", str(body.get("hostname") or "")):
            raise _bad("hostname must be 1 to 60 letters, digits and hyphens")
        if not isinstance(body.get("description"), str) or not body["description"]:
            raise _bad("description should not be empty")
        image = next((i for i in _IMAGES if body.get("image") in (i, _image_id(i))), None)
        if image is None or not _fits(image, rows[0]):
            raise _bad("Operating system is not valid for this instance type")
        if not isinstance(body.get("ssh_key_ids"), list) or any(k not in self._keys for k in body["ssh_key_ids"]):
            raise _bad("Invalid ssh key id")
        if body.get("startup_script_id") is not None and body["startup_script_id"] not in self._scripts:
            raise _bad("Invalid startup script id")
        if body.get("pricing") not in (None, "FIXED_PRICE", "DYNAMIC_PRICE") or not isinstance(body["is_spot"], bool):
            raise _bad("Invalid pricing")
        volume = body.get("os_volume")
        if not isinstance(volume, dict) or not volume.get("name") or volume.get("size", 0) < 50:
            raise _bad("os_volume must have a name and a size of at least 50 GB")
        if volume.get("on_spot_discontinue") not in (None, "keep_detached", "move_to_trash", "delete_permanently"):
            raise _bad("Invalid on_spot_discontinue")
        return next((r for r in rows if r.region == body["location_code"]), rows[0])

    def _user_data(self, body: Any) -> str:
        """Return what a machine is told at first boot: the account's keys are let in, then the script runs."""
        keys = [self._keys[k]["key"] for k in body["ssh_key_ids"]]
        script = self._scripts[body["startup_script_id"]]["script"] if body["startup_script_id"] else "#!/bin/sh\n"
        return "\n".join(
            [
                "#!/bin/sh",
                "umask 077",
                "mkdir -p /root/.ssh",
                "cat >> /root/.ssh/authorized_keys <<'end-of-keys'",
                *keys,
                "end-of-keys",
                "cat > /root/startup-script <<'end-of-script'",
                script,
                "end-of-script",
                "chmod 700 /root/startup-script",
                "exec /root/startup-script",
                "",
            ]
        )

    def _off(self, ident: str) -> None:
        with self._lock:
            if self._instances[ident].ended is None:
                self._instances[ident].status = "offline"

    def _act(self, body: Any) -> tuple[int, Any]:
        ids = body["id"] if isinstance(body["id"], list) else [body["id"]]
        if body["action"] not in ("delete", "discontinue", "shutdown"):
            raise _bad("Invalid action")
        results, refusals = [], []
        for ident in ids:
            fact = {"action": body["action"], "instanceId": ident}
            try:
                self._act_on(self._instance(ident), body)
                results.append({**fact, "status": "success"})
            except Refused as refused:
                refusals.append(refused)
                results.append({**fact, "status": "error", "error": str(refused), "statusCode": refused.status})
        if len(refusals) == len(ids):
            raise refusals[0]
        return 207 if refusals else 202, results

    def _act_on(self, instance: _Instance, body: Any) -> None:
        if body["action"] == "shutdown":
            self.rack.destroy(instance.yard_id)
            instance.status = "offline"
            return
        if instance.status in ("provisioning", "no_capacity", "deleting", "discontinued"):
            raise _bad(f"Can't discontinue a {instance.status} instance")
        named = body.get("volume_ids")
        unknown = [v for v in named or () if v not in self._volumes]
        if unknown:
            raise _bad("Invalid volume id")
        self._end(instance)
        instance.status, instance.gone_at = "deleting", self.clock() + self.deleting_s
        instance.volume.instance_id = None
        is_permanent = named is not None and bool(body.get("delete_permanently"))
        for ident in [instance.volume.id] if named is None else named:
            if ident in self._volumes:
                self._delete_volume(self._volumes[ident], is_permanent=is_permanent)

    def _end(self, instance: _Instance) -> None:
        instance.ended = instance.ended or self.clock()
        self.rack.destroy(instance.yard_id)

    # --- volumes --------------------------------------------------------------------------------------------

    def _list_trash(self, _: Any) -> tuple[int, Any]:
        trash = [v for v in self._volumes.values() if v.trashed is not None and v.ended is None]
        return 200, [self._show_volume(v) for v in trash]

    def _show_volume(self, volume: _Volume) -> dict[str, Any]:
        return {
            "id": volume.id,
            "status": "deleted" if volume.trashed else "attached" if volume.instance_id else "detached",
            "name": volume.name,
            "size": volume.size,
            "type": "NVMe",
            "is_os_volume": volume.is_os_volume,
            "created_at": _date(volume.created),
            "target": "vda",
            "location": volume.location,
            "instance_id": volume.instance_id,
            "ssh_key_ids": [],
            "deleted_at": _date(volume.trashed) if volume.trashed else None,
            "contract": "PAY_AS_YOU_GO",
            "base_hourly_cost": volume.size * _VOLUME_USD_PER_GB_MONTH / _HOURS_PER_MONTH,
            "monthly_price": volume.size * _VOLUME_USD_PER_GB_MONTH,
            "currency": "usd",
        }

    def _act_on_volumes(self, body: Any) -> tuple[int, Any]:
        if body["action"] != "delete":
            raise _bad("Invalid action")
        for ident in body["id"] if isinstance(body["id"], list) else [body["id"]]:
            self._delete_one_volume(ident, body)
        return 202, ""

    def _delete_one_volume(self, ident: str, body: Any) -> tuple[int, Any]:
        if ident not in self._volumes:
            raise Refused(404, "not_found", "Invalid volume id")
        if self._volumes[ident].instance_id is not None:
            raise _bad("Volume is attached: shut the instance down first")
        self._delete_volume(self._volumes[ident], is_permanent=bool(body.get("is_permanent")))
        return 202, ""

    def _delete_volume(self, volume: _Volume, *, is_permanent: bool) -> None:
        now = self.clock()
        volume.trashed = volume.trashed or now
        if is_permanent:
            volume.ended = volume.ended or now


def _is_kept(volume: _Volume) -> bool:
    return volume.trashed is None and volume.ended is None


def _list_volume_types(_: Any) -> tuple[int, Any]:
    price = {"currency": "usd", "price_per_month_per_gb": _VOLUME_USD_PER_GB_MONTH}
    return 200, [{"type": "NVMe", "price": price, "is_shared_fs": False}]


def _routes_of_texts(
    path: str, field_name: str, store: dict[str, dict[str, Any]]
) -> list[tuple[str, str, Callable[..., tuple[int, Any]]]]:
    """Return what the API does with SSH keys and with scripts, which it treats alike."""
    unknown = f"Invalid {'ssh key' if field_name == 'key' else 'startup script'} id"

    def get(ident: str, _: Any) -> tuple[int, Any]:
        if ident not in store:
            raise Refused(404, "not_found", unknown)
        return 200, [store[ident]]

    def create(body: Any) -> tuple[int, Any]:
        if not body.get("name") or not body.get(field_name):
            raise _bad(f"name and {field_name} should not be empty")
        if field_name == "key" and not re.match(r"(ssh|ecdsa|sk)-\S+ [A-Za-z0-9+/=]+", body["key"]):
            raise _bad("Invalid ssh key")
        ident = str(uuid.uuid4())
        store[ident] = {"id": ident, "name": body["name"], field_name: body[field_name]}
        return 201, ident

    def delete(ids: list[str]) -> tuple[int, Any]:
        if any(ident not in store for ident in ids):
            raise _bad(unknown)
        for ident in ids:
            del store[ident]
        return 200, ""

    return [
        ("GET", path, lambda _: (200, list(store.values()))),
        ("GET", f"{path}/([^/]+)", get),
        ("POST", path, create),
        ("DELETE", path, lambda body: delete(body["keys" if field_name == "key" else "scripts"])),
        ("DELETE", f"{path}/([^/]+)", lambda ident, _: delete([ident])),
    ]


# --- the catalogue ------------------------------------------------------------------------------------------


def _by_type() -> dict[str, list[TableRow]]:
    found: dict[str, list[TableRow]] = {}
    for row in table("verda"):
        found.setdefault(row.instance_type, []).append(row)
    return found


def _type(row: TableRow) -> dict[str, Any]:
    rows = [r for r in table("verda") if r.instance_type == row.instance_type]
    price = next((r.price_on_demand for r in rows if r.price_on_demand), None)
    spot = next((r.price_spot for r in rows if r.price_spot), None)
    gpu = _GPUS.get(row.accelerator or "", "")
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, row.instance_type)),
        "instance_type": row.instance_type,
        "price_per_hour": str(price or 0),
        "spot_price": str(spot or 0),
        "description": f"Dedicated hardware instance {row.instance_type}",
        **_hardware(row),
        "best_for": ["Machine learning"],
        "model": gpu or "CPU",
        "name": gpu or f"AMD EPYC {row.vcpus}V",
        "p2p": "",
        "currency": "usd",
        "manufacturer": "NVIDIA" if gpu else "AMD",
        "display_name": gpu or row.instance_type,
        "supported_os": [i for i in _IMAGES if _fits(i, row)],
    }


def _hardware(row: TableRow) -> dict[str, Any]:
    gpu = _GPUS.get(row.accelerator or "", "")
    count, memory = row.accelerator_count, int(row.accelerator_memory_gb * row.accelerator_count)
    return {
        "cpu": {"description": f"{row.vcpus} CPU", "number_of_cores": row.vcpus},
        "gpu": {"description": f"{count}x {gpu}" if gpu else "", "number_of_gpus": count},
        "gpu_memory": {"description": f"{memory}GB GPU RAM" if gpu else "", "size_in_gigabytes": memory},
        "memory": {"description": f"{row.memory_gb:g}GB RAM", "size_in_gigabytes": int(row.memory_gb)},
        "storage": {"description": "dynamic"},
    }


def _fits(image: str, row: TableRow) -> bool:
    """Tell whether an image is for a type: a V100 is too old for NVIDIA's open drivers."""
    if not row.accelerator:
        return "cuda" not in image
    return "open" not in image if row.accelerator == "V100" else "22.04" not in image


def _image_id(image: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, image))


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- HTTP ---------------------------------------------------------------------------------------------------


def _handler(cloud: VerdaCloud) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            parts = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if not parts.path.startswith("/v1/"):
                return self._send(404, {"code": "not_found", "message": f"Cannot {self.command} {parts.path}"})
            try:
                body = json.loads(raw) if raw else {}
                path = parts.path.removeprefix("/v1")
                answer = cloud.answer(self.command, path, query, body, token)
            except Refused as refused:
                answer = refused.status, {"code": refused.code, "message": str(refused)}
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                answer = 400, {"code": "invalid_request", "message": f"{type(exc).__name__}: {exc}"}
            if answer is None:
                return self.connection.close()
            return self._send(*answer)

        def _send(self, status: int, answer: Any) -> None:
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    return Handler
