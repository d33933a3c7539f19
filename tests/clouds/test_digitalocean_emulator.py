"""DigitalOcean in a box by itself: it holds to the published description, and bills as DigitalOcean does."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.clouds.digitalocean import DigitalOceanCloud
from tests.clouds.openapi import Description
from tests.clouds.rack import Rack

_NAMED = {"size": "s-1vcpu-1gb", "region": "nyc1", "image": "ubuntu-24-04-x64"}


@pytest.fixture
def cloud() -> Iterator[DigitalOceanCloud]:
    with DigitalOceanCloud(Rack(boots=False)) as cloud:
        cloud.new_s = cloud.unlisted_s = cloud.deleting_s = 0.0
        yield cloud
        assert cloud.violations == []


def _ask(cloud: DigitalOceanCloud, method: str, path: str, body: Any = None, token: str | None = None) -> Any:
    request = Request(f"{cloud.url}/v2{path}", method=method)
    request.add_header("Authorization", f"Bearer {token or cloud.token}")
    request.add_header("Content-Type", "application/json")
    with urlopen(request, None if body is None else json.dumps(body).encode(), timeout=10) as answer:
        text = answer.read()
        return json.loads(text) if text else None


def _refused(cloud: DigitalOceanCloud, *args: Any, **kwargs: Any) -> tuple[int, dict[str, Any], Any]:
    with pytest.raises(HTTPError) as refused:
        _ask(cloud, *args, **kwargs)
    with refused.value as answer:
        return answer.code, json.loads(answer.read()), answer.headers


def test_every_list_and_object_is_as_described(cloud: DigitalOceanCloud) -> None:
    key = _ask(cloud, "POST", "/account/keys", {"name": "k", "public_key": "ssh-ed25519 AAAA k"})["ssh_key"]
    _ask(cloud, "POST", "/tags", {"name": "a:b"})
    made = _ask(
        cloud, "POST", "/droplets", {**_NAMED, "names": ["one", "two"], "tags": ["a:b"], "ssh_keys": [key["id"]]}
    )
    one = made["droplets"][0]["id"]
    rules = [{"protocol": "tcp", "ports": "22", "sources": {"addresses": ["192.0.2.1/32"], "tags": ["a:b"]}}]
    firewall = _ask(cloud, "POST", "/firewalls", {"name": "f1", "tags": ["a:b"], "inbound_rules": rules})["firewall"]
    action = _ask(cloud, "POST", f"/droplets/{one}/actions", {"type": "power_off"})["action"]

    for path in (
        "/account", "/account/keys", f"/account/keys/{key['id']}", "/sizes", "/regions", "/images",
        "/images/ubuntu-24-04-x64", "/tags", "/tags/a:b", "/firewalls", f"/firewalls/{firewall['id']}", "/vpcs",
        "/droplets", f"/droplets/{one}", f"/droplets/{one}/actions", f"/actions/{action['id']}",
        f"/actions/{made['links']['actions'][1]['id']}",
    ):  # fmt: skip
        _ask(cloud, "GET", path)
    _ask(cloud, "PUT", f"/firewalls/{firewall['id']}", {"name": "f1", "inbound_rules": rules, "tags": []})
    resource = {"resources": [{"resource_id": str(one), "resource_type": "droplet"}]}
    _ask(cloud, "DELETE", "/tags/a:b/resources", resource)
    _ask(cloud, "POST", "/tags/a:b/resources", resource)
    _ask(cloud, "DELETE", "/droplets?tag_name=a:b")

    assert cloud.left() == ["firewall f1", "key k", "tag a:b"]


def test_lists_come_in_pages_with_links(cloud: DigitalOceanCloud) -> None:
    for name in ("a", "b", "c"):
        cloud.add_foreign_droplet(name, ["t"])

    first = _ask(cloud, "GET", "/droplets?tag_name=t&per_page=2")
    second = _ask(cloud, "GET", first["links"]["pages"]["next"].removeprefix(f"{cloud.url}/v2"))

    assert [d["name"] for d in first["droplets"] + second["droplets"]] == ["a", "b", "c"]
    assert "next" not in second["links"]["pages"]
    assert first["meta"] == {"total": 3}


def test_droplets_with_gpus_are_listed_apart(cloud: DigitalOceanCloud) -> None:
    body = {
        **_NAMED,
        "name": "g",
        "size": "gpu-h100x1-80gb",
        "region": "nyc2",
        "image": "gpu-h100x1-base",
        "tags": ["t"],
    }
    _ask(cloud, "POST", "/droplets", body)

    assert _ask(cloud, "GET", "/droplets?tag_name=t")["droplets"] == []
    assert [d["name"] for d in _ask(cloud, "GET", "/droplets?type=gpus")["droplets"]] == ["g"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/droplets", {**_NAMED, "name": "under_score"}, 422, "not valid"),
        ("POST", "/droplets", {**_NAMED, "names": ["a"] * 11}, 422, "up to 10"),
        ("POST", "/droplets", {**_NAMED, "name": "a", "size": "s-9"}, 422, "invalid size"),
        ("POST", "/droplets", {**_NAMED, "name": "a", "region": "mars1"}, 422, "invalid region"),
        ("POST", "/droplets", {**_NAMED, "name": "a", "image": "dos"}, 422, "invalid image"),
        ("POST", "/droplets", {**_NAMED, "name": "a", "ssh_keys": [7]}, 422, "invalid key"),
        ("POST", "/droplets", {**_NAMED, "name": "a", "size": "gpu-h100x1-80gb"}, 422, "not available in this region"),
        ("POST", "/account/keys", {"name": "a"}, 422, "required"),
        ("POST", "/tags", {"name": "no spaces"}, 400, "does not match"),
        ("POST", "/firewalls", {"name": "f1"}, 400, "not valid"),
        ("POST", "/firewalls", {"name": "f1", "tags": ["none"], "inbound_rules": []}, 404, "not found"),
        ("GET", "/droplets?per_page=500", None, 422, "maximum"),
        ("GET", "/droplets/1", None, 404, "could not be found"),
        ("DELETE", "/droplets", None, 422, "tag_name is missing"),
    ],
)
def test_what_does_not_fit_is_refused(
    cloud: DigitalOceanCloud, method: str, path: str, body: Any, status: int, words: str
) -> None:
    code, answer, _ = _refused(cloud, method, path, body)

    assert (code, words in (answer.get("message") or answer["error"])) == (status, True), answer


def test_a_wrong_token_is_refused_and_nothing_done(cloud: DigitalOceanCloud) -> None:
    code, answer, headers = _refused(cloud, "POST", "/droplets", {**_NAMED, "name": "a"}, token="wrong")

    assert (code, answer["id"]) == (401, "unauthorized")
    assert headers["ratelimit-limit"] == "5000"
    assert cloud.left() == []


def test_a_limited_call_says_when_to_come_back(cloud: DigitalOceanCloud) -> None:
    cloud.faults.throttled = 1

    code, answer, headers = _refused(cloud, "GET", "/account")

    assert (code, answer["id"], headers["retry-after"]) == (429, "too_many_requests", "1")
    assert _ask(cloud, "GET", "/account")["account"]["droplet_limit"] == 100


def test_a_field_that_the_api_would_overlook_is_noted(cloud: DigitalOceanCloud) -> None:
    _ask(cloud, "POST", "/droplets?wait=true", {**_NAMED, "name": "a", "userdata": "#!/bin/sh"})

    noted = [v.partition(": ")[2] for v in cloud.violations]
    cloud.violations.clear()
    assert noted == ["query parameter wait is not in the description", "userdata in the body is not in the description"]


def test_an_answer_that_is_not_as_described_is_noticed() -> None:
    path = Path(__file__).with_name("data") / "digitalocean-openapi.json"
    found = Description(json.loads(path.read_text())["paths"]).find("GET", "/v2/account")
    assert found is not None

    errors = list(found[0].answer_errors(200, {"ratelimit-limit": "many"}, {"account": {"droplet_limit": "ten"}}))

    assert any("'ten' is not of type 'integer'" in e for e in errors)
    assert any("'email' is a required property" in e for e in errors)
    assert "header ratelimit-reset is missing" in errors
    assert any("'many' is not of type" in e for e in errors)
    assert list(found[0].answer_errors(302, {}, None)) == ["status 302 is not in the description"]


def _at(cloud: DigitalOceanCloud, *date: int) -> None:
    moment = datetime(*date, tzinfo=UTC).timestamp()  # type: ignore[arg-type]
    cloud.clock = lambda: moment


def test_seconds_are_billed_until_the_droplet_is_deleted_off_or_on(cloud: DigitalOceanCloud) -> None:
    size = cloud.sizes["g-16vcpu-64gb"]
    _at(cloud, 2026, 3, 1)
    ident = cloud.add_foreign_droplet("a", size=size.slug)
    _at(cloud, 2026, 3, 1, 0, 30)
    cloud.lose(ident)
    _at(cloud, 2026, 3, 1, 1, 0, 1)
    before = cloud.bill()
    _ask(cloud, "DELETE", f"/droplets/{ident}")
    _at(cloud, 2026, 3, 9)

    assert before == pytest.approx(size.price_hourly * 3601 / 3600)
    assert cloud.bill() == before


def test_a_moment_costs_a_minute_or_a_cent(cloud: DigitalOceanCloud) -> None:
    _at(cloud, 2026, 3, 1)
    small, large = cloud.add_foreign_droplet("a"), cloud.add_foreign_droplet("b", size="g-32vcpu-128gb")
    for ident in (small, large):
        _ask(cloud, "DELETE", f"/droplets/{ident}")

    assert cloud.bill() == pytest.approx(0.01 + 1.5 * 60 / 3600)


def test_a_month_has_a_price_that_is_not_exceeded(cloud: DigitalOceanCloud) -> None:
    _at(cloud, 2026, 2, 20)
    cloud.add_foreign_droplet("a")
    _at(cloud, 2026, 4, 1)

    february = cloud.sizes["s-1vcpu-1gb"].price_hourly * 9 * 24
    assert cloud.bill() == pytest.approx(february + 6.0)


def test_a_droplet_is_new_until_it_has_addresses(cloud: DigitalOceanCloud) -> None:
    start = time.time()
    cloud.clock = lambda: start
    cloud.new_s = 30.0
    ident = cloud.add_foreign_droplet("a")

    before = _ask(cloud, "GET", f"/droplets/{ident}")["droplet"]
    cloud.clock = lambda: start + 31
    after = _ask(cloud, "GET", f"/droplets/{ident}")["droplet"]

    assert (before["status"], before["networks"]["v4"]) == ("new", [])
    assert (after["status"], {a["type"] for a in after["networks"]["v4"]}) == ("active", {"public", "private"})
