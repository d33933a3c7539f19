"""DigitalOcean in a box: an HTTP server that answers as DigitalOcean's API is described, and boots machines in a rack.

Sources: the published API description (data/README.md), against which every request and every answer is checked; and,
for what it leaves open, the words of refusals as GitHub issues quote them (pry0cc/axiom 422 of 2021-08-14: droplet
limit; 294 of 2021-04-15: no size in a region; digitalocean/api-v2 41 and 52: regions; harmony-one/harmony-ops 374:
firewalls of one name) and the header ``retry-after`` (digitalocean/openapi 818 of 2023-08-24). How the API words other
refusals is not documented. Droplets that can't be made after all vanish, and their create action ends as "errored".
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from skyward.providers.prices import TableRow, table
from tests.clouds.openapi import describe
from tests.clouds.rack import Rack

_DESCRIPTION = Path(__file__).with_name("data") / "digitalocean-openapi.json"
REGIONS = {
    "nyc1": "New York 1", "nyc2": "New York 2", "nyc3": "New York 3", "sfo1": "San Francisco 1",
    "sfo2": "San Francisco 2", "sfo3": "San Francisco 3", "ams3": "Amsterdam 3", "sgp1": "Singapore 1",
    "lon1": "London 1", "fra1": "Frankfurt 1", "tor1": "Toronto 1",
}  # fmt: skip
# Sizes beside those of the package's table: (vCPUs, GB, USD per month). GitHub gist
# colinwilson/cd31bde012f6727b24b2fc4ebee749c0, prices from 2022-07-01 on; per hour it is a 672nd.
_SMALL = {"s-1vcpu-1gb": (1, 1.0, 6.0), "s-1vcpu-2gb": (1, 2.0, 12.0), "s-2vcpu-4gb": (2, 4.0, 24.0)}
# GB of disk: the same gist and, for GPUs, godo's sizes_test.go; others by feel.
_DISKS = {
    "s-1vcpu-1gb": 25, "s-1vcpu-2gb": 50, "s-2vcpu-4gb": 80, "s-4vcpu-8gb": 160, "s-8vcpu-16gb": 320,
    "gpu-h100x1-80gb": 720, "gpu-h100x8-640gb": 2046,
}  # fmt: skip
# Slugs and names: output of `doctl compute image list --public` in several public repositories.
_IMAGES = {
    "ubuntu-22-04-x64": "22.04 (LTS) x64", "ubuntu-24-04-x64": "24.04 (LTS) x64",
    "gpu-h100x1-base": "NVIDIA AI/ML Ready", "gpu-h100x8-base": "NVIDIA AI/ML Ready with NVLink",
    "gpu-amd-base": "AMD AI/ML Ready",
}  # fmt: skip
_IMAGE_REGIONS = [r for r in REGIONS if r != "atl1"]
_FEATURES = ["backups", "ipv6", "metadata", "install_agent", "storage", "image_transfer"]
_MOST_AT_ONCE = 10
_CAPPED_HOURS = 672
_KINDS = {
    400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 409: "conflict",
    422: "unprocessable_entity", 429: "too_many_requests", 500: "server_error", 503: "service_unavailable",
}  # fmt: skip


class Refused(Exception):  # noqa: N818 - it is an answer
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _unfit(message: str) -> Refused:
    return Refused(422, message)


def _unknown() -> Refused:
    return Refused(404, "The resource you were accessing could not be found.")


@dataclass
class Faults:
    """What goes wrong, until it is taken back.

    Attributes
    ----------
    no_capacity
        (size, region) that there are no droplets of, as the lists say too.
    sold_out
        The same, while the lists still show it.
    only
        So many droplets of the next create call come up; the others vanish.
    droplet_limit
        How many droplets the account may have.
    throttled
        So many of the next calls are answered with 429, with `retry_after_s` in its header.
    lost
        So many of the next answers to (method, path) are lost after the call was done.
    down
        (method, beginning of the path) that is answered with 503; "" is any.
    refused
        The same, but the connection ends without an answer and nothing is done.
    forbidden
        The same, but the token has not got the scope that is needed.
    busy
        So many of the next requests to delete a droplet are refused, as something else is going on with it.
    """

    no_capacity: set[tuple[str, str]] = field(default_factory=set)
    sold_out: set[tuple[str, str]] = field(default_factory=set)
    only: int | None = None
    droplet_limit: int = 100
    throttled: int = 0
    retry_after_s: int = 1
    lost: dict[tuple[str, str], int] = field(default_factory=dict)
    down: set[tuple[str, str]] = field(default_factory=set)
    refused: set[tuple[str, str]] = field(default_factory=set)
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    busy: int = 0


@dataclass(kw_only=True)
class Size:
    """A size of droplet."""

    slug: str
    vcpus: int
    memory_mb: int
    disk: int
    price_hourly: float
    price_monthly: float
    regions: list[str]
    gpu: dict[str, Any] | None = None


@dataclass(kw_only=True)
class _Droplet:
    id: int
    name: str
    size: Size
    region: str
    image: str
    vpc_uuid: str
    tags: list[str]
    action: int
    created: float
    yard_name: str
    fate: str
    address: str = ""
    status: str = "new"
    gone_at: float | None = None
    ended: float | None = None


class DigitalOceanCloud:
    """A DigitalOcean account with its API at `url`. Close it; the rack is its owner's to close.

    Attributes
    ----------
    token
        The only one that is let in.
    violations
        What was wrong with answers, which is this emulator's fault, and with requests that the API would overlook. Of
        requests that it would refuse there is nothing here: they are refused.
    calls
        (method, path) of every call so far.
    clock
        Tells the time, in seconds since the epoch.
    new_s, unlisted_s, deleting_s
        How long droplets are "new" and have no address; how long they are in no list, and not deleted by their tag
        (GitHub digitalocean/api-v2 202 of 2025-05-19: some seconds); and how long they are there after they were
        deleted.
    """

    def __init__(self, rack: Rack, *, port: int = 0) -> None:
        self.rack = rack
        self.token = f"dop_v1_{secrets.token_hex(32)}"
        self.faults = Faults()
        self.violations: list[str] = []
        self.calls: list[tuple[str, str]] = []
        self.clock: Callable[[], float] = time.time
        self.new_s, self.unlisted_s, self.deleting_s = 0.05, 0.03, 0.02
        self.sizes = {size.slug: size for size in _sizes()}
        self.droplets: dict[int, _Droplet] = {}
        self.keys: dict[int, dict[str, Any]] = {}
        self.tags: set[str] = set()
        self.firewalls: dict[str, dict[str, Any]] = {}
        self._vpcs = {region: _vpc(region, number) for number, region in enumerate(REGIONS)}
        self._actions: dict[int, dict[str, Any]] = {}
        self._requests = 0
        self._last_id = 300_000_000
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), name="digitalocean", daemon=True
        )
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """The variables under which `sky.DigitalOcean` finds it."""
        return {"DIGITALOCEAN_TOKEN": self.token, "DIGITALOCEAN_API_URL": self.url}

    def __enter__(self) -> DigitalOceanCloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for droplet in self.droplets.values():
            self.rack.destroy(droplet.yard_name)

    # --- for tests ------------------------------------------------------------------------------------------

    def lose(self, droplet_id: int | str, *, gone: bool = False) -> None:
        """Take a droplet's machine away without notice: it is off, and billed, or `gone` altogether."""
        with self._lock:
            droplet = self.droplets[int(droplet_id)]
            self.rack.destroy(droplet.yard_name)
            droplet.status = "off"
            if gone:
                droplet.gone_at = droplet.ended = self.clock()

    def bill(self) -> float:
        """Return USD so far, for the droplets there are and those there were.

        Per second, at least 60 seconds and 0.01 USD, from 2026-01-01: DigitalOcean's staff on
        digitalocean.com/community/questions/droplet-billing-is-it-granular-after-the-first-hour, which adds to the
        older answers there: up to the price of a month in each month, and until it is deleted, off or on.
        """
        with self._lock:
            self._settle()
            now = self.clock()
            return sum(_cost(d.size, d.created, d.ended or now) for d in self.droplets.values() if d.fate != "errored")

    def left(self) -> list[str]:
        """Return what is in the account that was made: droplets, firewalls, keys and tags."""
        with self._lock:
            self._settle()
            return [
                *(f"droplet {d.name}" for d in self._there()),
                *(f"firewall {f['name']}" for f in self.firewalls.values()),
                *(f"key {key['name']}" for key in self.keys.values()),
                *(f"tag {tag}" for tag in sorted(self.tags)),
            ]

    def add_foreign_droplet(self, name: str, tags: Iterable[str] = (), size: str = "s-1vcpu-1gb") -> int:
        """Add a droplet that skyward has nothing to do with, and return its id."""
        request = {"names": [name], "size": size, "region": "nyc1", "image": "ubuntu-24-04-x64", "tags": list(tags)}
        with self._lock:
            made = self._create_droplets(request)["droplets"]
            return int(made[0]["id"])

    # --- one call -------------------------------------------------------------------------------------------

    def answer(
        self, method: str, path: str, query: dict[str, str], raw: bytes, token: str
    ) -> tuple[int, dict[str, str], Any] | None:
        """Return status, headers and what becomes JSON; None: there is no answer."""
        with self._lock:
            self.calls.append((method, path))
            self._requests += 1
            if _matches(self.faults.refused, method, path):
                return None
            try:
                status, body = self._do(method, path, query, raw, token)
            except Refused as refused:
                status, body = refused.status, _error(refused, method, path)
            headers = {
                "content-type": "application/json; charset=utf-8",
                "x-request-id": str(uuid.uuid4()),
                "ratelimit-limit": "5000",
                "ratelimit-remaining": str(max(0, 5000 - self._requests)),
                "ratelimit-reset": str(int(self.clock()) + 3600),
            }
            if status == 429:
                headers["retry-after"] = str(self.faults.retry_after_s)
            found = describe(_DESCRIPTION).find(method, path)
            if found is not None:
                errors = found[0].answer_errors(status, headers, body)
                self.violations += [f"{method} {path}: {error}" for error in errors]
            if self.faults.lost.get((method, path), 0) > 0 and status < 400:
                self.faults.lost[method, path] -= 1
                return None
            return status, headers, body

    def _do(self, method: str, path: str, query: dict[str, str], raw: bytes, token: str) -> tuple[int, Any]:
        if token != self.token:
            raise Refused(401, "Unable to authenticate you")
        if _matches(self.faults.down, method, path):
            raise Refused(503, "Server is unavailable")
        if _matches(self.faults.forbidden, method, path):
            raise Refused(403, "You are not authorized to perform this operation")
        if self.faults.throttled > 0:
            self.faults.throttled -= 1
            raise Refused(429, "API rate limit exceeded.")
        found = describe(_DESCRIPTION).find(method, path)
        if found is None:
            raise _unknown()
        operation, arguments = found
        malformed = 400 if "400" in operation.statuses else 422
        try:
            body = json.loads(raw) if raw else None
        except ValueError as exc:
            raise Refused(400, f"error parsing request body: {exc}") from exc
        for error in operation.request_errors(arguments, query, body):
            raise Refused(malformed, error)
        self.violations += [f"{method} {path}: {odd}" for odd in operation.oddities(query, body)]
        self._settle()
        return self._dispatch(method, operation.path, arguments, query, body)

    def _dispatch(
        self, method: str, path: str, arguments: dict[str, str], query: dict[str, str], body: Any
    ) -> tuple[int, Any]:
        one = next(iter(arguments.values()), "")
        match method, path.removeprefix("/v2"):
            case "GET", "/account":
                return 200, {"account": self._account()}
            case "GET", "/account/keys":
                return 200, self._page("ssh_keys", list(self.keys.values()), path, query)
            case "POST", "/account/keys":
                return 201, {"ssh_key": self._create_key(body)}
            case "GET", "/account/keys/{ssh_key_identifier}":
                return 200, {"ssh_key": self._key(one)}
            case "PUT", "/account/keys/{ssh_key_identifier}":
                self._key(one)["name"] = body["name"]
                return 200, {"ssh_key": self._key(one)}
            case "DELETE", "/account/keys/{ssh_key_identifier}":
                del self.keys[self._key(one)["id"]]
                return 204, None
            case "GET", "/actions/{action_id}":
                return 200, {"action": self._action(int(one))}
            case "GET", "/droplets":
                return 200, self._page("droplets", self._list_droplets(query), path, query)
            case "POST", "/droplets":
                return 202, self._create_droplets(body)
            case "DELETE", "/droplets":
                for droplet in self._listed():
                    if query["tag_name"] in droplet.tags:
                        self._delete(droplet)
                return 204, None
            case "GET", "/droplets/{droplet_id}":
                return 200, {"droplet": self._show(self._droplet(one))}
            case "DELETE", "/droplets/{droplet_id}":
                droplet = self._droplet(one)
                if self.faults.busy > 0:
                    self.faults.busy -= 1
                    raise _unfit("Droplet already has a pending event.")
                self._delete(droplet)
                return 204, None
            case "GET", "/droplets/{droplet_id}/actions":
                ident = self._droplet(one).id
                actions = [self._action(i) for i, a in self._actions.items() if a["resource_id"] == ident]
                return 200, self._page("actions", actions, path.replace("{droplet_id}", one), query)
            case "POST", "/droplets/{droplet_id}/actions":
                return 201, {"action": self._act(self._droplet(one), body)}
            case "GET", "/sizes":
                return 200, self._page("sizes", [self._show_size(s) for s in self.sizes.values()], path, query)
            case "GET", "/regions":
                return 200, self._page("regions", [self._show_region(r) for r in REGIONS], path, query)
            case "GET", "/images":
                return 200, self._page("images", [_image(slug) for slug in _IMAGES], path, query)
            case "GET", "/images/{image_id}":
                return 200, {"image": _image(_slug_of(one))}
            case "GET", "/vpcs":
                return 200, self._page("vpcs", list(self._vpcs.values()), path, query)
            case _, "/tags" | "/tags/{tag_id}" | "/tags/{tag_id}/resources":
                return self._tags_call(method, path, one, query, body)
            case _, _ if path.startswith("/v2/firewalls"):
                return self._firewalls_call(method, path, one, query, body)
        raise Refused(500, f"this box has no {method} {path}")

    def _page(self, name: str, items: list[Any], path: str, query: Mapping[str, str]) -> dict[str, Any]:
        per_page, page = int(query.get("per_page", 20)), int(query.get("page", 1))
        last = max(1, -(-len(items) // per_page))
        kept = "".join(f"&{key}={value}" for key, value in query.items() if key not in ("page", "per_page"))

        def link(number: int) -> str:
            return f"{self.url}{path}?page={number}&per_page={per_page}{kept}"

        pages = {}
        if page < last:
            pages |= {"next": link(page + 1), "last": link(last)}
        if page > 1:
            pages |= {"first": link(1), "prev": link(page - 1)}
        shown = items[(page - 1) * per_page : page * per_page]
        return {name: shown, "links": {"pages": pages} if pages else {}, "meta": {"total": len(items)}}

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    # --- account --------------------------------------------------------------------------------------------

    def _account(self) -> dict[str, Any]:
        return {
            "droplet_limit": self.faults.droplet_limit,
            "floating_ip_limit": 5,
            "email": "sammy@example.com",
            "name": "Sammy",
            "uuid": "b6fr89dbf6d9156cace5f3c78dc9851d957381ef",
            "email_verified": True,
            "status": "active",
            "status_message": "",
            "team": {"uuid": "5df3e3004a17e242b7c20ca6c9fc25b701a47ece", "name": "My Team"},
        }

    def _create_key(self, body: dict[str, Any]) -> dict[str, Any]:
        words = body["public_key"].split()
        if len(words) < 2 or not re.fullmatch(r"ssh-\w+|ecdsa-[\w-]+|sk-[\w@.-]+", words[0]):
            raise _unfit("Key invalid, key should be of the format `ssh-rsa AAAAB3N...`")
        digest = hashlib.md5(base64.b64decode(words[1])).hexdigest()
        fingerprint = ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))
        if any(key["fingerprint"] == fingerprint for key in self.keys.values()):
            raise _unfit("SSH Key is already in use on your account")
        ident = self._next_id()
        facts = {"id": ident, "fingerprint": fingerprint, "public_key": body["public_key"], "name": body["name"]}
        self.keys[ident] = facts
        return facts

    def _key(self, identifier: str | int) -> dict[str, Any]:
        for ident, key in self.keys.items():
            if str(identifier) in (str(ident), key["fingerprint"]):
                return key
        raise _unknown()

    # --- droplets -------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Bring every droplet to the state that it has by now."""
        now = self.clock()
        for droplet in self.droplets.values():
            if droplet.status == "new" and now >= droplet.created + self.new_s:
                if droplet.fate == "errored":
                    droplet.gone_at = droplet.ended = droplet.ended or now
                else:
                    droplet.status = "active"

    def _there(self) -> list[_Droplet]:
        now = self.clock()
        return [d for d in self.droplets.values() if d.gone_at is None or now < d.gone_at]

    def _listed(self) -> list[_Droplet]:
        return [d for d in self._there() if self.clock() >= d.created + self.unlisted_s]

    def _droplet(self, ident: str) -> _Droplet:
        found = next((d for d in self._there() if str(d.id) == ident), None)
        if found is None:
            raise _unknown()
        return found

    def _list_droplets(self, query: Mapping[str, str]) -> list[dict[str, Any]]:
        if "tag_name" in query and ("name" in query or "type" in query):
            raise _unfit("tag_name can not be combined with name or type")
        gpus = query.get("type") == "gpus"
        shown = [d for d in self._listed() if (d.size.gpu is not None) == gpus]
        if "tag_name" in query:
            shown = [d for d in shown if query["tag_name"] in d.tags]
        if "name" in query:
            shown = [d for d in shown if d.name.lower() == query["name"].lower()]
        return [self._show(d) for d in shown]

    def _create_droplets(self, body: dict[str, Any]) -> dict[str, Any]:
        names = body["names"] if "names" in body else [body["name"]]
        size = self._check_create(body, names)
        only, self.faults.only = self.faults.only, None
        self.tags |= set(body.get("tags") or ())
        made = []
        for number, name in enumerate(names):
            is_errored = only is not None and number >= only
            droplet = _Droplet(
                id=self._next_id(), name=name, size=size, region=body["region"], image=_slug_of(body["image"]),
                vpc_uuid=body.get("vpc_uuid") or self._vpcs[body["region"]]["id"], tags=list(body.get("tags") or ()),
                action=self._next_id(), created=self.clock(), yard_name="", fate="errored" if is_errored else "active",
            )  # fmt: skip
            droplet.yard_name = f"do-{droplet.id}"
            self._add_action(droplet, "create", droplet.action)
            self.droplets[droplet.id] = droplet
            if not is_errored:
                user_data = body.get("user_data") or "#cloud-config\n{}"
                droplet.address = self.rack.boot(droplet.yard_name, user_data, lambda d=droplet: self._off(d))
            made.append(droplet)
        links = [{"id": d.action, "rel": "create", "href": f"{self.url}/v2/actions/{d.action}"} for d in made]
        shown = [self._show(d) for d in made]
        facts = {"droplets": shown} if "names" in body else {"droplet": shown[0]}
        return {**facts, "links": {"actions": links}}

    def _check_create(self, body: dict[str, Any], names: list[str]) -> Size:
        if not 0 < len(names) <= _MOST_AT_ONCE:
            raise _unfit(f"You can only create up to {_MOST_AT_ONCE} Droplets at once.")
        region, size = body.get("region"), self.sizes.get(body["size"])
        if region not in REGIONS:
            raise _unfit("You specified an invalid region for Droplet creation.")
        if size is None:
            raise _unfit("You specified an invalid size for Droplet creation.")
        image = _image_or_none(body["image"])
        if image is None or (image.startswith("gpu-") and size.gpu is None):
            raise _unfit("You specified an invalid image for Droplet creation.")
        if bad := [key for key in body.get("ssh_keys", ()) if not self._is_key(key)]:
            raise _unfit(f"{', '.join(map(str, bad))} are invalid key identifiers for Droplet creation.")
        if any(not re.fullmatch(r"[A-Za-z0-9_:-]{1,255}", tag) for tag in body.get("tags") or ()):
            raise _unfit("Tags may contain letters, numbers, colons, dashes, and underscores.")
        if len(body.get("user_data") or "") > 64 * 1024:
            raise _unfit("user_data may not exceed 64 KiB.")
        if body.get("vpc_uuid") not in (None, self._vpcs[region]["id"]):
            raise _unfit("vpc_uuid is not valid for this region.")
        if len(self._there()) + len(names) > self.faults.droplet_limit:
            raise _unfit("creating this/these droplet(s) will exceed your droplet limit")
        place = (size.slug, region)
        if region not in size.regions or place in self.faults.no_capacity or place in self.faults.sold_out:
            raise _unfit("Size is not available in this region.")
        return size

    def _is_key(self, identifier: str | int) -> bool:
        return any(identifier in (ident, key["fingerprint"]) for ident, key in self.keys.items())

    def _show(self, droplet: _Droplet) -> dict[str, Any]:
        size = droplet.size
        facts = {
            "id": droplet.id,
            "name": droplet.name,
            "memory": size.memory_mb,
            "vcpus": size.vcpus,
            "disk": size.disk,
            "locked": droplet.status == "new",
            "status": droplet.status,
            "kernel": None,
            "created_at": _date(droplet.created),
            "features": ["private_networking"],
            "backup_ids": [],
            "next_backup_window": None,
            "snapshot_ids": [],
            "image": _image(droplet.image),
            "volume_ids": [],
            "size": self._show_size(size),
            "size_slug": size.slug,
            "networks": {"v4": [] if droplet.status == "new" else self._addresses(droplet), "v6": []},
            "region": self._show_region(droplet.region),
            "tags": [tag for tag in droplet.tags if tag in self.tags],
            "vpc_uuid": droplet.vpc_uuid,
        }
        return {**facts, "gpu_info": size.gpu} if size.gpu else facts

    def _addresses(self, droplet: _Droplet) -> list[dict[str, Any]]:
        # A machine in a box has one address, for both; where nothing boots, they can be told apart.
        private = droplet.address
        public = private if self.rack.boots else str(ipaddress.ip_address("198.18.0.0") + droplet.id % 100_000)
        return [
            {"ip_address": private, "netmask": "255.255.240.0", "gateway": "<nil>", "type": "private"},
            {"ip_address": public, "netmask": "255.255.240.0", "gateway": public, "type": "public"},
        ]

    def _off(self, droplet: _Droplet) -> None:
        with self._lock:
            if droplet.ended is None:
                droplet.status = "off"

    def _delete(self, droplet: _Droplet) -> None:
        now = self.clock()
        droplet.ended = droplet.ended or now
        droplet.gone_at = droplet.gone_at or now + self.deleting_s
        self.rack.destroy(droplet.yard_name)

    # --- actions --------------------------------------------------------------------------------------------

    def _add_action(self, droplet: _Droplet, kind: str, ident: int) -> None:
        self._actions[ident] = {
            "id": ident, "type": kind, "started_at": _date(self.clock()), "resource_id": droplet.id,
            "resource_type": "droplet", "region": self._show_region(droplet.region), "region_slug": droplet.region,
        }  # fmt: skip

    def _action(self, ident: int) -> dict[str, Any]:
        if ident not in self._actions:
            raise _unknown()
        action = self._actions[ident]
        droplet = self.droplets[action["resource_id"]]
        status = "completed"
        if action["type"] == "create" and self.clock() < droplet.created + self.new_s:
            status = "in-progress"
        elif action["type"] == "create" and droplet.fate == "errored":
            status = "errored"
        done = None if status == "in-progress" else _date(self.clock())
        return {**action, "status": status, "completed_at": done}

    def _act(self, droplet: _Droplet, body: dict[str, Any]) -> dict[str, Any]:
        match body["type"]:
            case "power_off" | "shutdown":
                self.rack.destroy(droplet.yard_name)
                droplet.status = "off"
            case "rename":
                droplet.name = body["name"]
            case kind:
                raise _unfit(f"this box has no action {kind}")
        ident = self._next_id()
        self._add_action(droplet, body["type"], ident)
        return self._action(ident)

    # --- tags and firewalls ---------------------------------------------------------------------------------

    def _tags_call(self, method: str, path: str, name: str, query: Mapping[str, str], body: Any) -> tuple[int, Any]:
        if name and name not in self.tags:
            raise _unknown()
        match method, path:
            case "GET", "/v2/tags":
                return 200, self._page("tags", [self._show_tag(tag) for tag in sorted(self.tags)], path, query)
            case "POST", "/v2/tags":
                self.tags.add(body["name"])
                return 201, {"tag": self._show_tag(body["name"])}
            case "GET", _:
                return 200, {"tag": self._show_tag(name)}
            case "DELETE", "/v2/tags/{tag_id}":
                self.delete_tag(name)
                return 204, None
            case _:
                for resource in body["resources"]:
                    tags = self._droplet(resource["resource_id"]).tags
                    if method == "POST" and name not in tags:
                        tags.append(name)
                    elif method == "DELETE" and name in tags:
                        tags.remove(name)
                return 204, None

    def delete_tag(self, name: str) -> None:
        """Delete a tag, which untags what has it."""
        with self._lock:
            self.tags.discard(name)
            for tags in self._all_tags():
                if name in tags:
                    tags.remove(name)

    def _all_tags(self) -> list[list[str]]:
        return [*(d.tags for d in self.droplets.values()), *(f["tags"] for f in self.firewalls.values())]

    def _show_tag(self, name: str) -> dict[str, Any]:
        tagged = [d for d in self._there() if name in d.tags]
        facts = {"count": len(tagged)}
        if tagged:
            facts["last_tagged_uri"] = f"{self.url}/v2/droplets/{tagged[-1].id}"
        return {"name": name, "resources": {**facts, "droplets": facts}}

    def _firewalls_call(
        self, method: str, path: str, ident: str, query: Mapping[str, str], body: Any
    ) -> tuple[int, Any]:
        if ident and ident not in self.firewalls:
            raise _unknown()
        match method, path.removeprefix("/v2/firewalls"):
            case "GET", "":
                return 200, self._page("firewalls", list(self.firewalls.values()), path, query)
            case "POST", "":
                ident = str(uuid.uuid4())
                self.firewalls[ident] = self._firewall(ident, body)
                return 202, {"firewall": self.firewalls[ident]}
            case "GET", _:
                return 200, {"firewall": self.firewalls[ident]}
            case "PUT", _:
                self.firewalls[ident] = self._firewall(ident, body)
                return 200, {"firewall": self.firewalls[ident]}
            case "DELETE", "/{firewall_id}":
                del self.firewalls[ident]
                return 204, None
            case _, part:
                name = "droplet_ids" if part.endswith("droplets") else "tags"
                had, named = set(self.firewalls[ident][name]), set(body[name])
                self.firewalls[ident][name] = sorted(had | named if method == "POST" else had - named)
                return 204, None

    def _firewall(self, ident: str, body: dict[str, Any]) -> dict[str, Any]:
        if any(f["name"] == body["name"] and f["id"] != ident for f in self.firewalls.values()):
            raise Refused(409, "duplicate name")
        places = [rule["sources"] for rule in body.get("inbound_rules") or ()]
        places += [rule["destinations"] for rule in body.get("outbound_rules") or ()]
        tags = body.get("tags") or []
        for tag in [*tags, *(tag for place in places for tag in place.get("tags") or ())]:
            if tag not in self.tags:
                raise Refused(404, f"tag {tag} not found")
        for address in (address for place in places for address in place.get("addresses") or ()):
            try:
                ipaddress.ip_network(address)
            except ValueError as exc:
                raise _unfit("invalid address") from exc
        for rule in [*(body.get("inbound_rules") or ()), *(body.get("outbound_rules") or ())]:
            if not re.fullmatch(r"\d+(-\d+)?|all", rule["ports"]):
                raise _unfit("invalid ports")
        return {
            "id": ident, "status": "succeeded", "created_at": _date(self.clock()), "pending_changes": [],
            "name": body["name"], "droplet_ids": body.get("droplet_ids") or [], "tags": list(tags),
            "inbound_rules": body.get("inbound_rules") or [], "outbound_rules": body.get("outbound_rules") or [],
        }  # fmt: skip

    # --- what there is to have ------------------------------------------------------------------------------

    def _show_size(self, size: Size) -> dict[str, Any]:
        facts = {
            "slug": size.slug,
            "memory": size.memory_mb,
            "vcpus": size.vcpus,
            "disk": size.disk,
            "transfer": 4.0,
            "price_monthly": size.price_monthly,
            "price_hourly": size.price_hourly,
            "regions": [r for r in size.regions if (size.slug, r) not in self.faults.no_capacity],
            "available": True,
            "description": _described(size.slug),
        }
        return {**facts, "gpu_info": size.gpu} if size.gpu else facts

    def _show_region(self, slug: str) -> dict[str, Any]:
        sizes = [
            s.slug for s in self.sizes.values() if slug in s.regions and (s.slug, slug) not in self.faults.no_capacity
        ]
        name = REGIONS[slug]
        return {"name": name, "slug": slug, "features": _FEATURES, "available": bool(sizes), "sizes": sizes}


def _error(refused: Refused, method: str, path: str) -> dict[str, Any]:
    if (method, path, refused.status) == ("POST", "/v2/tags", 400):  # alone described so
        return {"error": str(refused), "messages": None, "root_causes": []}
    return {"id": _KINDS[refused.status], "message": str(refused), "request_id": str(uuid.uuid4())}


def _matches(places: set[tuple[str, str]], method: str, path: str) -> bool:
    return any(m in ("", method) and path.startswith(p) for m, p in places)


# --- the catalogue ------------------------------------------------------------------------------------------


def _sizes() -> list[Size]:
    found: dict[str, Size] = {}
    for slug, (vcpus, memory_gb, monthly) in _SMALL.items():
        found[slug] = Size(
            slug=slug, vcpus=vcpus, memory_mb=int(memory_gb * 1024), disk=_DISKS[slug],
            price_hourly=round(monthly / _CAPPED_HOURS, 5), price_monthly=monthly, regions=list(REGIONS),
        )  # fmt: skip
    for row in table("digitalocean"):
        if row.instance_type not in found:
            found[row.instance_type] = _size(row)
        if row.region not in found[row.instance_type].regions:
            found[row.instance_type].regions.append(row.region)
    for size in found.values():
        if size.gpu is None:  # the table has the regions of America alone
            size.regions += [r for r in REGIONS if r not in size.regions]
    return list(found.values())


def _size(row: TableRow) -> Size:
    hourly = row.price_on_demand
    assert hourly is not None
    gpu = None
    if row.accelerator:
        memory = round(row.accelerator_memory_gb * row.accelerator_count)  # of all together: godo's sizes_test.go
        vram = {"amount": memory, "unit": "gib"}
        gpu = {"count": row.accelerator_count, "vram": vram, "model": f"nvidia_{row.accelerator.lower()}"}
    return Size(
        slug=row.instance_type, vcpus=row.vcpus, memory_mb=int(row.memory_gb * 1024),
        disk=_DISKS.get(row.instance_type, 12 * row.vcpus), price_hourly=hourly,
        price_monthly=round(hourly * (744 if gpu else _CAPPED_HOURS), 2), regions=[], gpu=gpu,
    )  # fmt: skip


def _described(slug: str) -> str:
    return {"s": "Basic", "g": "General Purpose", "gpu": "H100 GPU"}[slug.partition("-")[0]]


def _image_or_none(identifier: str | int) -> str | None:
    return next((s for n, s in enumerate(_IMAGES) if str(identifier) in (s, str(112_929_454 + n))), None)


def _slug_of(identifier: str | int) -> str:
    slug = _image_or_none(identifier)
    if slug is None:
        raise _unknown()
    return slug


def _image(slug: str) -> dict[str, Any]:
    return {
        "id": 112_929_454 + list(_IMAGES).index(slug),
        "name": _IMAGES[slug],
        "type": "base",
        "distribution": "Ubuntu",
        "slug": slug,
        "public": True,
        "regions": _IMAGE_REGIONS,
        "created_at": "2025-06-26T17:14:44Z",
        "min_disk_size": 7,
        "size_gigabytes": 0.64,
        "description": _IMAGES[slug],
        "tags": [],
        "status": "available",
        "error_message": "",
    }


def _vpc(region: str, number: int) -> dict[str, Any]:
    ident = str(uuid.uuid5(uuid.NAMESPACE_DNS, region))
    return {
        "name": f"default-{region}",
        "description": "",
        "region": region,
        "ip_range": f"10.{110 + number}.0.0/20",
        "default": True,
        "id": ident,
        "urn": f"do:vpc:{ident}",
        "created_at": "2025-06-26T17:14:44Z",
    }


# --- money --------------------------------------------------------------------------------------------------


def _cost(size: Size, start: float, end: float) -> float:
    total = sum(min(seconds * size.price_hourly / 3600, size.price_monthly) for seconds in _by_month(start, end))
    return max(total, 60 * size.price_hourly / 3600, 0.01)


def _by_month(start: float, end: float) -> list[float]:
    """Return the seconds in each calendar month between two times."""
    parts = []
    while start < end:
        day = datetime.fromtimestamp(start, UTC)
        month = datetime(day.year + day.month // 12, day.month % 12 + 1, 1, tzinfo=UTC).timestamp()
        parts.append(min(month, end) - start)
        start = month
    return parts


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# --- HTTP ---------------------------------------------------------------------------------------------------


def _handler(cloud: DigitalOceanCloud) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            parts = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            try:
                answer = cloud.answer(self.command, unquote(parts.path), query, raw, token)
            except Exception as exc:  # a fault of this emulator, which a test is to hear of
                cloud.violations.append(f"{self.command} {self.path}: {exc!r}")
                raise
            if answer is None:
                self.close_connection = True
                return
            status, headers, body = answer
            data = b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    return Handler
