"""`sky.DigitalOcean` through DigitalOcean's own SDK, against an emulated one; a few of its machines really boot."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import asyncssh
import pytest

from skyward.errors import CapacityError, CredentialsError, ProviderError, QuotaError, SpecError
from skyward.launch.provisioner import pool_keys
from skyward.providers import prices, retry
from skyward.providers.base import LaunchOrder, Login, Machine, Need, Offer, UserData
from skyward.providers.digitalocean import api as digitalocean_api
from skyward.providers.digitalocean import pool as digitalocean_pool
from skyward.providers.digitalocean.provider import DigitalOcean
from skyward.spec.instance import InstanceSpec
from skyward.spec.pool import PoolSpec
from skyward.spec.volume import S3Volume
from tests.cloudbox import why_not
from tests.clouds.digitalocean import REGIONS, DigitalOceanCloud
from tests.clouds.rack import Rack
from tests.waiting import wait_until

POOL, OTHER = "0123abcd", "4567cdef"
SMALL, H100 = "s-2vcpu-4gb", "gpu-h100x1-80gb"
EXPIRES = 1_800_000_000.0


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIGITALOCEAN_TOKEN", "DIGITALOCEAN_ACCESS_TOKEN", "DIGITALOCEAN_API_URL", "SKYWARD_CALLER_IP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(digitalocean_api, "PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setitem(digitalocean_api.RETRIES, "retry_backoff_factor", 0.001)


def _point_to(cloud: DigitalOceanCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[DigitalOceanCloud]:
    """Its machines are addresses alone."""
    with DigitalOceanCloud(Rack(boots=False)) as cloud:
        _point_to(cloud, monkeypatch)
        yield cloud
        assert cloud.violations == []


@cache
def _keys(pool_id: str) -> tuple[Login, UserData]:
    """Return a pool's own."""
    return pool_keys(3600)


def _order(count: int = 1, *, token: str = "a1b2c3d4", pool_id: str = POOL, **facts: Any) -> LaunchOrder:
    login, user_data = _keys(pool_id)
    return LaunchOrder(
        pool_id=pool_id, token=token, count=count, spot=False, user_data=user_data, login=login,
        owner="Ann.B@laptop.local", expires=EXPIRES, **facts,
    )  # fmt: skip


def _offer(name: str = SMALL, region: str = "nyc3") -> Offer:
    found = [o for o in DigitalOcean(region).offers(Need()) if o.instance.name == name]
    return found[0] if found else Offer(provider="digitalocean", instance=InstanceSpec(name, 2, 4.0), region=region)


def _launch(count: int = 1, *, offer: Offer | None = None, **facts: Any) -> list[Machine]:
    return list(DigitalOcean().launch(offer or _offer(), _order(count, **facts)))


def _creates(cloud: DigitalOceanCloud) -> int:
    return cloud.calls.count(("POST", "/v2/droplets"))


# --- options ------------------------------------------------------------------------------------------------


def test_it_is_a_value_that_its_settings_make_again() -> None:
    made = DigitalOcean("NYC3", endpoint_url="http://127.0.0.1:1", private_ip=True, caller_cidrs=["192.0.2.1"])

    assert made.region == "nyc3"
    assert DigitalOcean(**made.settings()) == made
    assert hash(made) == hash(dataclasses.replace(made))


def test_an_unknown_region_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SpecError, match="did you mean 'nyc3'") as refused:
        DigitalOcean("nyc33")
    assert (refused.value.option, refused.value.value) == ("region", "nyc33")


def test_every_bad_option_is_told_at_once() -> None:
    with pytest.raises(SpecError, match=r"(?s)3 options.*region.*endpoint_url.*private_ip"):
        DigitalOcean("moon1", endpoint_url="ftp://x", private_ip="yes")  # type: ignore[arg-type]


def test_making_one_imports_no_sdk() -> None:
    code = (
        "import sys; from skyward.providers.digitalocean.provider import DigitalOcean; DigitalOcean('nyc1').settings();"
        "print([m for m in ('pydo', 'azure.core', 'requests') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("allocation", ["always-spot", 0.5])
def test_spot_machines_are_refused_as_there_are_none(allocation: str | float) -> None:
    with pytest.raises(SpecError, match="no spot machines"):
        DigitalOcean().check(PoolSpec(nodes=2, allocation=allocation))  # type: ignore[arg-type]


@pytest.mark.parametrize("allocation", ["on-demand", "spot-if-available", "cheapest", 0.0])
def test_an_allocation_that_can_do_without_spot_is_fine(allocation: str | float) -> None:
    DigitalOcean().check(PoolSpec(nodes=2, allocation=allocation))  # type: ignore[arg-type]


def test_buckets_and_other_architectures_are_refused() -> None:
    volume = S3Volume(bucket="b-ucket", mount_path="/data")
    with pytest.raises(SpecError, match=r"(?s)2 options.*bucket.*x86_64"):
        DigitalOcean().check(PoolSpec(volume=[volume], architecture="arm64"))  # type: ignore[arg-type]


# --- credentials and reach ----------------------------------------------------------------------------------


def test_missing_credentials_are_told_with_the_variables(cloud: DigitalOceanCloud, monkeypatch: Any) -> None:
    monkeypatch.delenv("DIGITALOCEAN_TOKEN")

    with pytest.raises(CredentialsError, match="DIGITALOCEAN_TOKEN and DIGITALOCEAN_ACCESS_TOKEN") as refused:
        DigitalOcean().offers(Need())
    assert refused.value.missing is True
    assert cloud.calls == []


def test_a_wrong_token_is_told_and_not_shown(cloud: DigitalOceanCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIGITALOCEAN_TOKEN", "dop_v1_secret")

    for do in (
        lambda: DigitalOcean().offers(Need()),
        lambda: _launch(offer=Offer(provider="digitalocean", instance=InstanceSpec(SMALL, 2, 4.0), region="nyc3")),
        lambda: DigitalOcean().machines(),
        lambda: DigitalOcean().end(POOL, []),
        lambda: DigitalOcean().open_firewall(POOL, "nyc3"),
    ):
        with pytest.raises(CredentialsError, match=r"Unable to authenticate you.*wrong, revoked or expired") as refused:
            do()  # type: ignore[no-untyped-call]
        assert "secret" not in str(refused.value)
        assert refused.value.missing is False
    assert cloud.left() == []


def test_doctls_variable_and_an_address_with_its_version_are_understood(
    cloud: DigitalOceanCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIGITALOCEAN_TOKEN")
    monkeypatch.setenv("DIGITALOCEAN_ACCESS_TOKEN", cloud.token)

    assert DigitalOcean(endpoint_url=f"{cloud.url}/v2/").machines() == []


def test_a_token_without_rights_is_told_what_it_needs(cloud: DigitalOceanCloud) -> None:
    offer = _offer()
    cloud.faults.forbidden.add(("POST", "/v2/firewalls"))

    with pytest.raises(CredentialsError, match="scopes"):
        _launch(offer=offer)
    assert cloud.left() == []


def test_an_api_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIGITALOCEAN_TOKEN", "dop_v1_secret")

    with pytest.raises(ProviderError, match="could not be reached to list sizes") as failed:
        DigitalOcean(endpoint_url="http://127.0.0.1:9").offers(Need())
    assert failed.value.__cause__ is not None


def test_a_missing_sdk_is_told_with_the_line_that_gets_it(cloud: DigitalOceanCloud, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pydo", None)

    with pytest.raises(ProviderError, match=r"pip install 'skyward\[digitalocean\]'"):
        DigitalOcean().machines()
    assert cloud.calls == []


# --- offers -------------------------------------------------------------------------------------------------


def test_offers_are_the_sizes_of_each_region_with_live_prices(cloud: DigitalOceanCloud) -> None:
    cloud.sizes[SMALL].price_hourly = 0.04

    offers = DigitalOcean().offers(Need())

    found = {o.region: o for o in offers if o.instance.name == SMALL}
    assert set(found) == set(REGIONS)
    instance = found["nyc3"].instance
    assert (instance.vcpu, instance.memory_gb, instance.price_on_demand, instance.price_spot) == (2, 4.0, 0.04, None)
    assert (instance.accelerator, instance.billing_increment_minutes) == (None, None)
    assert instance.metadata["minimum_seconds"] == 60
    assert {o.prices for o in offers} == {"live"}
    assert all(o.available and o.available_spot is False and o.architecture == "x86_64" for o in offers)
    assert len(offers) == sum(len(size.regions) for size in cloud.sizes.values())


def test_a_region_that_was_named_is_the_only_one(cloud: DigitalOceanCloud) -> None:
    assert {o.region for o in DigitalOcean("fra1").offers(Need())} == {"fra1"}
    assert DigitalOcean("mem1").offers(Need()) == []


@pytest.mark.parametrize(("size", "count"), [(H100, 1), ("gpu-h100x8-640gb", 8)])
def test_gpus_have_the_names_and_memory_that_skyward_knows(cloud: DigitalOceanCloud, size: str, count: int) -> None:
    (offer,) = [o for o in DigitalOcean().offers(Need()) if o.instance.name == size]

    i = offer.instance
    assert (i.accelerator, i.accelerator_count, i.accelerator_memory_gb) == ("H100", count, 80)


@pytest.mark.parametrize(
    ("model", "memory", "name"),
    [
        ("nvidia_h200", 141, "H200"), ("nvidia_l40s", 48, "L40S"), ("nvidia_rtx4000_ada", 20, "RTX-4000-Ada"),
        ("nvidia_rtx6000_ada", 48, "RTX-6000-Ada"), ("amd_mi300x", 192, "MI300X"), ("acme_x1", 7, "x1"),
    ],
)  # fmt: skip
def test_gpus_that_digitalocean_names_in_its_way_are_recognised(
    cloud: DigitalOceanCloud, model: str, memory: int, name: str
) -> None:
    cloud.sizes[H100].gpu = {"count": 2, "model": model, "vram": {"amount": 2 * memory, "unit": "gib"}}

    (offer,) = [o for o in DigitalOcean().offers(Need()) if o.instance.name == H100]

    i = offer.instance
    assert (i.accelerator, i.accelerator_count, i.accelerator_memory_gb) == (name, 2, memory)


def test_what_is_sold_out_is_not_offered(cloud: DigitalOceanCloud) -> None:
    cloud.faults.no_capacity.add((SMALL, "nyc3"))

    regions = {o.region for o in DigitalOcean().offers(Need()) if o.instance.name == SMALL}
    assert regions == set(REGIONS) - {"nyc3"}


def test_the_table_serves_where_sizes_may_not_be_listed(cloud: DigitalOceanCloud, caplog: Any) -> None:
    cloud.faults.forbidden.add(("GET", "/v2/sizes"))

    offers = DigitalOcean("nyc2").offers(Need())

    assert {o.prices for o in offers} == {prices.FROM_TABLE}
    assert {o.available for o in offers} == {None}
    assert {o.instance.name for o in offers if o.instance.accelerator} == {H100, "gpu-h100x8-640gb"}
    assert "using the prices of this release" in caplog.text


# --- launch -------------------------------------------------------------------------------------------------


def test_machines_are_what_was_ordered(cloud: DigitalOceanCloud) -> None:
    before = time.time()

    machines = _launch(3)

    assert len({m.id for m in machines}) == 3
    login, _ = _keys(POOL)
    for machine in machines:
        droplet = cloud.droplets[int(machine.id)]
        assert machine.private_ip == droplet.address
        assert machine.public_ip not in (None, machine.private_ip)
        assert machine == Machine(
            id=machine.id, provider="digitalocean", login=replace(login, host=machine.public_ip or ""),
            public_ip=machine.public_ip, private_ip=machine.private_ip, instance_type=SMALL, region="nyc3",
            price=0.03571, price_on_demand=0.03571, launched=machine.launched, ssh_cidrs=("127.0.0.1/32",),
            pool_id=POOL, owner="ann-b@laptop-local", expires=EXPIRES,
        )  # fmt: skip
        assert abs((machine.launched or 0) - before) < 5
    assert [cloud.droplets[int(m.id)].name for m in machines] == [f"skyward-{POOL}-a1b2c3d4-{i}" for i in range(3)]
    assert all(cloud.droplets[int(m.id)].image == "ubuntu-24-04-x64" for m in machines)


def test_twenty_five_machines_take_three_calls(cloud: DigitalOceanCloud) -> None:
    offer = _offer()
    cloud.calls.clear()

    machines = _launch(25, offer=offer)

    assert len({m.id for m in machines}) == 25
    assert _creates(cloud) == 3
    assert len(cloud.calls) < 25


def test_the_firewall_lets_this_computer_alone_in_and_is_there_first(cloud: DigitalOceanCloud) -> None:
    _launch(2)

    (firewall,) = cloud.firewalls.values()
    assert firewall["tags"] == [f"skyward:pool:{POOL}"]
    ssh, *inside = firewall["inbound_rules"]
    assert ssh == {"protocol": "tcp", "ports": "22", "sources": {"addresses": ["127.0.0.1/32"]}}
    assert [(r["protocol"], r["ports"]) for r in inside] == [("tcp", "0"), ("udp", "0"), ("icmp", "0")]
    assert all(r["sources"] == {"tags": [f"skyward:pool:{POOL}"]} for r in inside)
    assert all(r["destinations"] == {"addresses": ["0.0.0.0/0", "::/0"]} for r in firewall["outbound_rules"])
    assert cloud.calls.index(("POST", "/v2/firewalls")) < cloud.calls.index(("POST", "/v2/droplets"))


def test_the_key_is_in_the_account_and_its_machines_know_it(cloud: DigitalOceanCloud) -> None:
    _launch()

    _, user_data = _keys(POOL)
    (key,) = cloud.keys.values()
    assert (key["name"], key["public_key"]) == (f"skyward-{POOL}", user_data.authorized_key)


def test_the_callers_address_can_be_given(cloud: DigitalOceanCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_CALLER_IP", "203.0.113.7")
    _launch()
    (firewall,) = cloud.firewalls.values()
    assert firewall["inbound_rules"][0]["sources"] == {"addresses": ["203.0.113.7/32"]}

    monkeypatch.setenv("SKYWARD_CALLER_IP", "2001:db8::7")
    for _ in range(2):
        DigitalOcean().open_firewall(POOL, "nyc3")

    (firewall,) = cloud.firewalls.values()
    assert firewall["inbound_rules"][0]["sources"] == {"addresses": ["203.0.113.7/32", "2001:db8::7/128"]}
    assert firewall["tags"] == [f"skyward:pool:{POOL}"]
    assert len(firewall["inbound_rules"]) == 4
    assert len(firewall["outbound_rules"]) == 3


def test_several_ranges_are_let_in_and_known_of_each_machine(
    cloud: DigitalOceanCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKYWARD_CALLER_IP", "192.0.2.1")
    provider = DigitalOcean(caller_cidrs=["203.0.113.7", "198.51.100.0/24"])

    (machine,) = provider.launch(_offer(), _order())

    (firewall,) = cloud.firewalls.values()
    assert firewall["inbound_rules"][0]["sources"]["addresses"] == list(machine.ssh_cidrs)
    assert machine.ssh_cidrs == ("203.0.113.7/32", "198.51.100.0/24")


def test_ranges_that_are_none_are_refused_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="caller_cidrs"):
        DigitalOcean(caller_cidrs=["home"])
    monkeypatch.setenv("SKYWARD_CALLER_IP", "home")
    with pytest.raises(SpecError, match="SKYWARD_CALLER_IP='home'"):
        DigitalOcean().check(PoolSpec())


def test_an_address_that_is_none_is_told(cloud: DigitalOceanCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_CALLER_IP", "home")

    with pytest.raises(ProviderError, match="SKYWARD_CALLER_IP"):
        _launch()
    assert cloud.left() == []


def test_private_addresses_are_logged_in_to_from_the_vpc(cloud: DigitalOceanCloud) -> None:
    (machine,) = DigitalOcean(private_ip=True).launch(_offer(), _order())

    assert machine.login.host == machine.private_ip
    (firewall,) = cloud.firewalls.values()
    assert firewall["inbound_rules"][0]["sources"]["addresses"] == ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]


@pytest.mark.parametrize(("size", "image"), [(H100, "gpu-h100x1-base"), ("gpu-h100x8-640gb", "gpu-h100x8-base")])
def test_machines_with_gpus_have_drivers_and_are_found(cloud: DigitalOceanCloud, size: str, image: str) -> None:
    (machine,) = _launch(offer=_offer(size, "nyc2"))

    assert cloud.droplets[int(machine.id)].image == image
    assert [m.id for m in DigitalOcean().machines(POOL)] == [machine.id]
    DigitalOcean().end(POOL, ["nyc2"])
    assert _left(cloud) == []


def test_the_same_order_twice_makes_the_same_machines(cloud: DigitalOceanCloud) -> None:
    first = _launch(3)
    again = _launch(3)

    assert [m.id for m in again] == [m.id for m in first]
    assert len(cloud.droplets) == 3
    assert len(cloud.firewalls) == len(cloud.keys) == 1


def test_another_order_of_a_pool_shares_its_firewall_and_key(cloud: DigitalOceanCloud) -> None:
    first = _launch(1)
    more = _launch(2, token="e5f6a7b8")

    assert len({m.id for m in [*first, *more]}) == 3
    assert len(cloud.firewalls) == len(cloud.keys) == 1


# --- launches that fail -------------------------------------------------------------------------------------


def _left(cloud: DigitalOceanCloud) -> list[str]:
    """Return what is left of skyward, but for the tags that all its pools share."""
    return [thing for thing in cloud.left() if thing not in ("tag skyward", "tag skyward:owner:ann-b:laptop-local")]


@pytest.mark.parametrize("fault", ["no_capacity", "sold_out"])
def test_no_capacity_is_a_capacity_error_and_nothing_is_left(cloud: DigitalOceanCloud, fault: str) -> None:
    offer = _offer()
    getattr(cloud.faults, fault).add((SMALL, "nyc3"))

    with pytest.raises(CapacityError, match="launch 2 s-2vcpu-4gb in nyc3: Size is not available in this region"):
        _launch(2, offer=offer)
    assert _left(cloud) == []


def test_some_of_many_that_can_not_be_had_end_all(cloud: DigitalOceanCloud) -> None:
    offer = _offer()
    cloud.faults.only = 3

    with pytest.raises(CapacityError, match="brought up 3 of 5"):
        _launch(5, offer=offer)
    assert _left(cloud) == []
    assert len(cloud.droplets) == 5


def test_one_of_several_calls_that_fails_ends_all(cloud: DigitalOceanCloud) -> None:
    offer = _offer()
    cloud.faults.droplet_limit = 15

    with pytest.raises(QuotaError, match=r"will exceed your droplet limit.*droplet_limit_increase"):
        _launch(25, offer=offer)
    assert _left(cloud) == []


def test_a_droplet_limit_is_a_quota_error_and_nothing_is_left(cloud: DigitalOceanCloud) -> None:
    cloud.add_foreign_droplet("theirs")
    cloud.faults.droplet_limit = 1

    with pytest.raises(QuotaError, match="droplet limit"):
        _launch()
    assert _left(cloud) == ["droplet theirs"]


def test_a_launch_that_is_throttled_goes_on(cloud: DigitalOceanCloud) -> None:
    offer = _offer()
    cloud.faults.throttled, cloud.faults.retry_after_s = 3, 1

    assert len(_launch(2, offer=offer)) == 2
    assert len(cloud.droplets) == 2


def test_an_api_that_is_asked_too_often_for_too_long_is_told(cloud: DigitalOceanCloud) -> None:
    offer = _offer()
    cloud.faults.throttled, cloud.faults.retry_after_s = 1, 3000

    with pytest.raises(ProviderError, match=r"too many requests.*again in 3000 s"):
        _launch(offer=offer)
    assert _left(cloud) == []


@pytest.mark.parametrize("path", ["/v2/droplets", "/v2/firewalls", "/v2/tags", "/v2/account/keys"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_lost_answer_neither_doubles_nor_loses(cloud: DigitalOceanCloud, path: str, times: int) -> None:
    offer = _offer()
    cloud.faults.lost["POST", path] = times

    machines = _launch(12, offer=offer)

    assert len({m.id for m in machines}) == len(cloud.droplets) == 12
    assert len(cloud.firewalls) == len(cloud.keys) == 1
    DigitalOcean().end(POOL, ["nyc3"])
    assert _left(cloud) == []


def test_a_machine_made_twice_because_listed_late_is_deleted_once(
    cloud: DigitalOceanCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "LISTED_S", 0.0)
    offer = _offer()
    cloud.unlisted_s = 0.3
    cloud.faults.lost["POST", "/v2/droplets"] = 1

    machines = _launch(2, offer=offer)

    wait_until(lambda: len([t for t in cloud.left() if t.startswith("droplet")]) == 2, 20)
    assert len(cloud.droplets) == 4
    assert sorted(m.id for m in DigitalOcean().machines(POOL)) == sorted(m.id for m in machines)


def test_a_lost_answer_before_a_shortage_leaves_nothing(cloud: DigitalOceanCloud) -> None:
    offer = _offer()
    cloud.faults.lost["POST", "/v2/droplets"] = 1
    cloud.faults.only = 1
    cloud.new_s = 1.5  # the droplet that can't be made is seen once before it vanishes

    with pytest.raises(CapacityError):
        _launch(2, offer=offer)
    assert _left(cloud) == []


@pytest.mark.parametrize("how", ["down", "refused"])
@pytest.mark.parametrize("call", [("POST", "/v2/droplets"), ("POST", "/v2/account/keys"), ("POST", "/v2/firewalls")])
def test_an_api_that_fails_at_any_step_leaves_nothing(
    cloud: DigitalOceanCloud, how: str, call: tuple[str, str]
) -> None:
    offer = _offer()
    getattr(cloud.faults, how).add(call)

    with pytest.raises(ProviderError, match="launch 2 s-2vcpu-4gb in nyc3"):
        _launch(2, offer=offer)
    assert _left(cloud) == []


def test_an_api_that_is_gone_after_the_launch_leaves_it_to_the_pools_end(cloud: DigitalOceanCloud, caplog: Any) -> None:
    offer = _offer()
    cloud.new_s = 60.0
    launched = threading.Event()

    def take_down() -> None:
        wait_until(lambda: _creates(cloud) == 1, 20)
        cloud.faults.down.add(("", ""))
        launched.set()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(take_down)
        with pytest.raises(ProviderError, match="503") as failed:
            _launch(2, offer=offer)
    assert "left for the end of the pool" in failed.value.__notes__[0]
    assert "after a failed launch" in caplog.text

    cloud.faults.down.clear()
    DigitalOcean().end(POOL, ["nyc3"])
    assert _left(cloud) == []


def test_a_launch_that_is_interrupted_leaves_nothing(cloud: DigitalOceanCloud) -> None:
    offer = _offer()

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    cloud.new_s = 60.0

    with pytest.raises(KeyboardInterrupt):
        _launch(3, offer=offer, pause=interrupted)
    assert _left(cloud) == []


def test_a_price_above_the_limit_is_not_paid(cloud: DigitalOceanCloud) -> None:
    offer = _offer()
    cloud.sizes[SMALL].price_hourly = 0.2

    with pytest.raises(CapacityError, match=r"asks 0\.2 USD/h, above max_price=0\.1"):
        _launch(offer=offer, max_price=0.1)
    assert _left(cloud) == []


def test_a_launch_that_fails_leaves_the_pools_other_machines_alone(cloud: DigitalOceanCloud) -> None:
    offer = _offer()
    kept = _launch(2, offer=offer)
    cloud.faults.sold_out.add((SMALL, "nyc3"))

    with pytest.raises(CapacityError):
        _launch(1, offer=offer, token="e5f6a7b8")

    assert sorted(m.id for m in DigitalOcean().machines(POOL)) == sorted(m.id for m in kept)
    assert len(cloud.firewalls) == len(cloud.keys) == 1


def test_a_failed_launch_keeps_the_firewall_of_a_concurrent_one(cloud: DigitalOceanCloud) -> None:
    good, bad = _offer(), _offer(region="fra1")
    cloud.faults.sold_out.add((SMALL, "fra1"))

    for number in range(5):
        with ThreadPoolExecutor(2) as threads:
            fails = threads.submit(_launch, 1, offer=bad, token=f"bad00000{number}")
            works = threads.submit(_launch, 1, offer=good, token=f"good0000{number}")
        assert isinstance(fails.exception(), CapacityError)
        assert len(works.result()) == 1
        assert [f["tags"] for f in cloud.firewalls.values()] == [[f"skyward:pool:{POOL}"]]
        DigitalOcean().end(POOL, ["nyc3"])
        assert _left(cloud) == []


# --- finding and ending -------------------------------------------------------------------------------------


def test_machines_are_found_by_their_tags_alone(cloud: DigitalOceanCloud) -> None:
    here = _launch(2)
    there = _launch(1, pool_id=OTHER, offer=_offer(H100, "nyc2"))
    cloud.add_foreign_droplet("theirs", ["skyward", "web"])
    cloud.lose(here[0].id)

    found = {m.id: m for m in DigitalOcean("fra1").machines()}

    assert set(found) == {m.id for m in [*here, *there]}
    assert {m.pool_id for m in found.values()} == {POOL, OTHER}
    one = found[here[0].id]
    assert (one.owner, one.expires, one.region, one.instance_type) == ("ann-b@laptop-local", EXPIRES, "nyc3", SMALL)
    assert (one.public_ip, one.private_ip, one.price) == (here[0].public_ip, here[0].private_ip, here[0].price)
    assert [m.id for m in DigitalOcean().machines(OTHER)] == [m.id for m in there]
    assert DigitalOcean().machines("none0000") == []


def test_more_machines_than_a_page_has_are_all_found(cloud: DigitalOceanCloud, monkeypatch: Any) -> None:
    machines = _launch(7)
    monkeypatch.setattr(digitalocean_api, "_PER_PAGE", 3)

    assert {m.id for m in DigitalOcean().machines(POOL)} == {m.id for m in machines}


def test_a_terminated_machine_is_gone_when_that_returns(cloud: DigitalOceanCloud) -> None:
    machines = _launch(3)
    cloud.deleting_s = 0.3

    DigitalOcean().terminate(machines[:2])

    assert [t for t in cloud.left() if t.startswith("droplet")] == [f"droplet skyward-{POOL}-a1b2c3d4-2"]
    DigitalOcean().terminate(machines[:2])


def test_a_busy_machine_is_terminated_all_the_same(cloud: DigitalOceanCloud) -> None:
    machines = _launch(2)
    cloud.faults.busy = 3

    DigitalOcean().terminate(machines)

    assert DigitalOcean().machines(POOL) == []


def test_machines_that_can_not_be_terminated_are_named(cloud: DigitalOceanCloud) -> None:
    machines = _launch(2)
    cloud.faults.down.add(("DELETE", "/v2/droplets"))

    with pytest.raises(ProviderError, match=rf"may still be there, and cost: .*{machines[0].id}"):
        DigitalOcean().terminate(machines)


def test_a_lost_machine_is_not_found_any_more(cloud: DigitalOceanCloud) -> None:
    lost, kept = _launch(2)

    cloud.lose(lost.id, gone=True)

    assert [m.id for m in DigitalOcean().machines(POOL)] == [kept.id]
    DigitalOcean().terminate([lost])


def test_the_end_takes_all_of_the_pool_and_nothing_else(cloud: DigitalOceanCloud) -> None:
    _launch(2)
    _launch(1, pool_id=OTHER)
    theirs = cloud.add_foreign_droplet("skyward-like", ["web"])
    wait_until(lambda: cloud.left() and cloud.droplets[theirs].status == "active")
    cloud.keys[1] = {"id": 1, "fingerprint": "aa", "public_key": "ssh-rsa AAAA", "name": "skyward"}

    DigitalOcean().end(POOL, ["nyc3"])

    assert _left(cloud) == [
        f"droplet skyward-{OTHER}-a1b2c3d4-0",
        "droplet skyward-like",
        f"firewall skyward-{OTHER}",
        f"key skyward-{OTHER}",
        "key skyward",
        f"tag skyward:expires:{OTHER}:1800000000",
        f"tag skyward:pool:{OTHER}",
        "tag web",
    ]
    assert cloud.droplets[theirs].status == "active"
    assert DigitalOcean().machines(OTHER)[0].expires == EXPIRES


def test_the_end_comes_twice_and_beside_itself(cloud: DigitalOceanCloud) -> None:
    _launch(3)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: DigitalOcean().end(POOL, ["nyc3"]), range(3)))
    DigitalOcean().end(POOL, ["nyc3"])

    assert _left(cloud) == []


def test_the_end_of_many_machines_is_one_call(cloud: DigitalOceanCloud) -> None:
    _launch(25)
    cloud.calls.clear()

    DigitalOcean().end(POOL, ["nyc3"])

    assert [call for call in cloud.calls if call[0] == "DELETE" and "droplets" in call[1]] == [
        ("DELETE", "/v2/droplets")
    ]
    assert _left(cloud) == []


def test_droplets_that_are_not_deleted_by_tag_are_deleted_one_by_one(
    cloud: DigitalOceanCloud, monkeypatch: Any
) -> None:
    _launch(2)
    monkeypatch.setattr(digitalocean_pool, "_BY_TAG_S", 0.0)
    cloud.deleting_s = 0.2

    DigitalOcean().end(POOL, ["nyc3"])

    assert _left(cloud) == []


@pytest.mark.parametrize("call", [("DELETE", "/v2/droplets"), ("DELETE", "/v2/firewalls"), ("DELETE", "/v2/account")])
def test_an_end_that_the_api_fails_is_told_and_can_be_tried_again(
    cloud: DigitalOceanCloud, call: tuple[str, str]
) -> None:
    _launch(2)
    cloud.faults.down.add(call)

    with pytest.raises(ProviderError, match=f"end pool {POOL}"):
        DigitalOcean().end(POOL, ["nyc3"])
    cloud.faults.down.clear()
    DigitalOcean().end(POOL, ["nyc3"])

    assert _left(cloud) == []


def test_lost_answers_and_short_outages_do_not_keep_the_end(cloud: DigitalOceanCloud) -> None:
    machines = _launch(2)
    cloud.faults.lost["DELETE", "/v2/droplets"] = 1
    cloud.faults.lost["GET", "/v2/droplets"] = 2
    cloud.faults.lost["DELETE", f"/v2/firewalls/{next(iter(cloud.firewalls))}"] = 1
    cloud.faults.throttled = 1

    DigitalOcean().end(POOL, ["nyc3"])

    assert _left(cloud) == []
    assert cloud.bill() == pytest.approx(0.01 * len(machines))


# --- machines that boot -------------------------------------------------------------------------------------


@pytest.fixture
def booting(monkeypatch: pytest.MonkeyPatch) -> Iterator[DigitalOceanCloud]:
    if reason := why_not():
        pytest.skip(reason)
    rack = Rack()
    with DigitalOceanCloud(rack) as cloud:
        _point_to(cloud, monkeypatch)
        yield cloud
        assert cloud.violations == []
    rack.close()


def _run(machine: Machine, command: str) -> str:
    """Run a command as root, under the host key that the machine was given."""

    async def run() -> str:
        login = machine.login
        known = asyncssh.import_known_hosts(f"{login.host} {login.host_key}\n")
        keys = [asyncssh.import_private_key(login.key or "")]
        async with asyncssh.connect(
            login.host, login.port or 22, username=login.user, client_keys=keys, known_hosts=known, config=None
        ) as ssh:
            return str((await ssh.run(command, check=True)).stdout).strip()

    deadline = time.monotonic() + 30
    while True:
        try:
            return asyncio.run(run())
        except OSError:  # it boots
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.slow
def test_machines_boot_accept_their_key_and_cost_until_deleted(booting: DigitalOceanCloud) -> None:
    machines = _launch(2)
    assert [_run(machine, "id -un") for machine in machines] == ["root", "root"]
    assert len({_run(machine, "hostname") for machine in machines}) == 2
    assert _run(machines[0], "pgrep -cf 'sleep 3600'") != "0"

    _run(machines[0], "(sleep 0.2; poweroff) > /dev/null 2>&1 < /dev/null &")
    wait_until(lambda: booting.droplets[int(machines[0].id)].status == "off", 20)
    assert len(DigitalOcean().machines(POOL)) == 2
    assert booting.droplets[int(machines[0].id)].ended is None
    DigitalOcean().end(POOL, ["nyc3"])

    assert _left(booting) == []
    assert booting.rack.machines == {}


@pytest.mark.slow
def test_slow_machines_have_addresses_and_can_be_ended_before_they_boot(booting: DigitalOceanCloud) -> None:
    booting.rack.boot_delay_s = 2.0

    start = time.monotonic()
    machines = _launch(2)
    assert time.monotonic() - start < 2
    assert all(m.public_ip and m.private_ip for m in machines)
    DigitalOcean().end(POOL, ["nyc3"])

    assert _left(booting) == []


@pytest.mark.slow
def test_a_machine_that_is_lost_is_off_at_once(booting: DigitalOceanCloud) -> None:
    (machine,) = _launch()
    _run(machine, "true")

    booting.lose(machine.id)

    assert booting.rack.machines == {}
    assert [m.id for m in DigitalOcean().machines(POOL)] == [machine.id]
    DigitalOcean().end(POOL, ["nyc3"])
    assert _left(booting) == []
