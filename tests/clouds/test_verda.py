"""`sky.Verda` through Verda's own SDK, against an emulated Verda; a few of its machines really boot."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import asyncssh
import pytest
from verda import VerdaClient
from verda.constants import ErrorCodes
from verda.exceptions import APIException

import skyward as sky
from skyward.accelerators.model import Accelerator
from skyward.errors import CapacityError, CredentialsError, ProviderError, QuotaError, SpecError
from skyward.launch.provisioner import pool_keys
from skyward.providers import prices
from skyward.providers.base import LaunchOrder, Login, Machine, Need, Offer, UserData
from skyward.providers.verda import api as verda_api
from skyward.providers.verda import machines as verda_machines
from skyward.providers.verda.provider import Verda
from skyward.spec.pool import PoolSpec
from tests.cloudbox import why_not
from tests.clouds.rack import Rack
from tests.clouds.verda import VerdaCloud

SMALL, A100, V100 = "CPU.4V.16G", "1A100.22V", "1V100.6V"
HERE = "FIN-03"
POOL = "0123abcd"


@pytest.fixture(autouse=True)
def _settings(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_CACHE_DIR", str(tmp_path))
    for name in ("VERDA_CLIENT_ID", "VERDA_CLIENT_SECRET", "VERDA_API_KEY", "VERDA_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(verda_api, "_PAUSES_S", (0.01,) * 5)


def _point_to(cloud: VerdaCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[VerdaCloud]:
    """Its machines are addresses alone."""
    with VerdaCloud(Rack(boots=False)) as cloud:
        _point_to(cloud, monkeypatch)
        yield cloud


@cache
def _keys() -> tuple[Login, UserData]:
    return pool_keys(3600)


def _order(count: int = 1, *, pool_id: str = POOL, spot: bool = False, **options: Any) -> LaunchOrder:
    login, user_data = _keys()
    facts = {"token": secrets.token_hex(8), "owner": "me@here", "expires": 2_000_000_000.0, **options}
    return LaunchOrder(pool_id=pool_id, count=count, spot=spot, user_data=user_data, login=login, **facts)


def _offer(name: str = SMALL, region: str = HERE) -> Offer:
    return next(o for o in Verda(region).offers(Need()) if o.instance.name == name)


def _launch(count: int = 1, *, offer: Offer | None = None, **options: Any) -> list[Machine]:
    return list(Verda().launch(offer or _offer(), _order(count, **options)))


def _images(cloud: VerdaCloud) -> list[str]:
    return [i.request["image"] for i in cloud._instances.values()]


# --- configuration ------------------------------------------------------------------------------------------


def test_a_region_is_found_whatever_its_case() -> None:
    assert Verda("fin-03") == Verda("FIN-03")
    assert Verda("ice-01", endpoint_url="http://localhost/v1").settings() == {
        "region": "ICE-01",
        "endpoint_url": "http://localhost/v1",
    }


@pytest.mark.parametrize("region", ["FIN-3", "us-east-1", "", 3])
def test_an_unknown_region_is_refused(region: Any) -> None:
    with pytest.raises(SpecError, match="'FIN-01', 'FIN-02', 'FIN-03', 'ICE-01'") as caught:
        Verda(region)

    assert caught.value.option == "region"


def test_the_nearest_region_is_proposed() -> None:
    with pytest.raises(SpecError, match="did you mean 'ICE-01'"):
        Verda("ice1")


def test_an_endpoint_has_to_be_a_url() -> None:
    with pytest.raises(SpecError, match="endpoint_url"):
        Verda(endpoint_url="localhost")


def test_making_one_imports_no_sdk() -> None:
    code = "import sys; import skyward; skyward.Verda('FIN-01'); sys.exit('verda' in sys.modules)"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_verda_lacks_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(SpecError) as caught:
        Verda().check(PoolSpec(volume=[sky.S3Volume("/data", "bucket")], architecture="arm64"))

    assert [e.option for e in caught.value.errors] == ["volume", "architecture"]
    assert "env=" in str(caught.value)
    assert "x86_64" in str(caught.value)


def test_a_missing_sdk_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "skyward.providers.verda.api")
    monkeypatch.setitem(sys.modules, "verda.authentication", None)

    with pytest.raises(ProviderError, match=r"pip install 'skyward\[verda\]'"):
        Verda().machines()


# --- credentials --------------------------------------------------------------------------------------------


def test_missing_credentials_are_named() -> None:
    with pytest.raises(CredentialsError, match="VERDA_CLIENT_ID and VERDA_CLIENT_SECRET, or VERDA_API_KEY"):
        Verda().offers(Need())


def test_half_of_the_credentials_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERDA_CLIENT_ID", "an id")

    with pytest.raises(CredentialsError, match="only VERDA_CLIENT_ID is set"):
        Verda().offers(Need())


def test_an_api_key_is_a_pair(cloud: VerdaCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERDA_CLIENT_ID")
    monkeypatch.setenv("VERDA_API_KEY", f"{cloud.client_id}:{cloud.client_secret}")
    assert Verda().offers(Need())

    monkeypatch.setenv("VERDA_API_KEY", cloud.client_secret)
    with pytest.raises(CredentialsError, match="not 'id:secret'") as caught:
        Verda().offers(Need())
    assert cloud.client_secret not in str(caught.value)


def test_wrong_credentials_are_told_without_showing_them(cloud: VerdaCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERDA_CLIENT_SECRET", "a wrong one")

    with pytest.raises(CredentialsError, match=r"refuses the credentials in VERDA_CLIENT_ID.*Invalid") as caught:
        Verda().offers(Need())

    assert "a wrong one" not in str(caught.value)
    assert isinstance(caught.value.__cause__, APIException)


def test_credentials_that_end_while_they_are_used_are_told(cloud: VerdaCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    Verda().offers(Need())
    cloud.client_secret = "another one by now"
    cloud.expire_tokens()

    with pytest.raises(CredentialsError, match="wrong, deleted or expired"):
        Verda().offers(Need())


def test_a_token_that_has_expired_is_renewed(cloud: VerdaCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    _launch()
    cloud.expire_tokens()
    assert len(Verda().machines(POOL)) == 1

    monkeypatch.setattr(cloud, "clock", lambda: time.time() + 7200)  # the server's opinion
    assert len(Verda().machines(POOL)) == 1
    assert cloud.calls.count(("POST", "/oauth2/token")) == 3


def test_the_sdks_own_client_finds_its_way_in(cloud: VerdaCloud) -> None:
    client = VerdaClient(cloud.client_id, cloud.client_secret, cloud.url)
    cloud.expire_tokens()

    with pytest.raises(APIException, match="unauthorized_request"):
        client.images.get()
    client._authentication.refresh()
    assert client.images.get(V100)
    assert client.balance.get().amount == 100


# --- offers -------------------------------------------------------------------------------------------------


def test_every_type_is_offered_in_every_region_with_live_prices(cloud: VerdaCloud) -> None:
    offers = Verda().offers(Need())

    assert {o.region for o in offers} == {"FIN-01", "FIN-02", "FIN-03", "ICE-01"}
    offer = next(o for o in offers if (o.instance.name, o.region) == ("1A100.22V", "FIN-03"))
    spec = offer.instance
    assert (offer.provider, offer.prices, offer.available, offer.available_spot) == ("verda", "live", True, True)
    assert (spec.vcpu, spec.memory_gb, spec.accelerator_count, spec.accelerator_memory_gb) == (22, 120, 1, 80)
    assert (spec.price_on_demand, spec.price_spot) == (1.29, 0.4515)
    assert spec.metadata["prepaid_minutes"] == 10


def test_memory_of_accelerators_is_told_for_each_of_them(cloud: VerdaCloud) -> None:
    spec = _offer("4A100.88V").instance

    assert (spec.accelerator_count, spec.accelerator_memory_gb) == (4, 80)


def test_accelerators_have_the_names_that_skyward_knows(cloud: VerdaCloud) -> None:
    names = {o.instance.accelerator for o in Verda().offers(Need()) if o.instance.accelerator}

    models = {Accelerator.parse(name).model for name in names}
    assert models == {"A100", "B200", "B300", "H100", "H200", "RTX-6000-Ada", "RTX-PRO-6000", "V100"}


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        ("1x A100 SXM4 40GB", "A100-40GB"),
        ("8x B300 SXM6 262GB", "B300"),
        ("2x RTX6000 Ada 48GB", "RTX-6000-Ada"),
        ("1x RTX A6000 48GB", "RTX-A6000"),
        ("1x L40S 48GB", "L40S"),
        ("1x AMD MI300X 192GB", "MI300X"),
        ("1x Whatever 5", "Whatever 5"),
    ],
)
def test_an_accelerator_that_skyward_does_not_know_keeps_its_name(
    cloud: VerdaCloud, monkeypatch: pytest.MonkeyPatch, shown: str, name: str
) -> None:
    monkeypatch.setattr("tests.clouds.verda._GPUS", {"A100-80GB": shown.partition(" ")[2]})

    assert _offer(A100).instance.accelerator == name


def test_what_has_run_out_shows_in_the_next_offers(cloud: VerdaCloud) -> None:
    cloud.faults.no_capacity.add((A100, HERE, True))

    assert (_offer(A100).available, _offer(A100).available_spot) == (True, False)


def test_prices_are_asked_for_once_a_day_and_availability_each_time(cloud: VerdaCloud) -> None:
    Verda().offers(Need())
    Verda("FIN-01").offers(Need())

    assert cloud.calls.count(("GET", "/instance-types")) == 1
    assert cloud.calls.count(("GET", "/instance-availability")) == 4


def test_the_table_serves_when_types_are_not_listed(cloud: VerdaCloud) -> None:
    cloud.faults.down.add(("GET", "/instance-types"))

    offer = _offer(A100)

    assert offer.prices == prices.FROM_TABLE
    assert (offer.instance.price_on_demand, offer.available) == (1.29, True)
    assert Accelerator.parse(offer.instance.accelerator or "").model == "A100"


def test_an_api_that_is_out_of_reach_is_told() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERDA_API_KEY", "an id:a secret")
        with pytest.raises(ProviderError, match="could not be reached to log in") as caught:
            Verda(endpoint_url="http://127.0.0.1:9/v1").offers(Need())

    assert "a secret" not in str(caught.value)


def test_an_api_that_is_down_is_told(cloud: VerdaCloud) -> None:
    Verda().offers(Need())
    cloud.faults.down.add(("", ""))

    with pytest.raises(ProviderError, match="can't be read"):
        Verda().offers(Need())


@pytest.mark.parametrize(
    "code", [*(v for k, v in vars(ErrorCodes).items() if k.isupper()), "rate_limit_exceeded", None]
)
def test_every_error_of_the_sdk_has_one_of_ours(code: str) -> None:
    with pytest.raises(ProviderError, match=r"do it|credentials") as caught, verda_api.explained("do it"):
        raise APIException(code, "because")

    assert isinstance(caught.value.__cause__, APIException)


# --- launch -------------------------------------------------------------------------------------------------


def test_machines_are_launched_and_found_again_by_what_they_bear(cloud: VerdaCloud) -> None:
    order = _order(3, disk_gib=64)

    machines = Verda().launch(_offer(), order)

    assert len({m.id for m in machines}) == len({m.public_ip for m in machines}) == 3
    one = machines[0]
    assert one.login == replace(order.login, host=one.public_ip)
    assert (one.instance_type, one.region, one.private_ip, one.spot) == (SMALL, HERE, None, False)
    assert (one.price, one.price_on_demand) == (0.0279, 0.0279)
    assert one.launched == pytest.approx(time.time(), abs=60)
    found = Verda().machines(POOL)
    assert {m.id for m in found} == {m.id for m in machines}
    assert {(m.pool_id, m.owner, m.expires) for m in [*found, *machines]} == {(POOL, "me@here", 2_000_000_000.0)}
    assert found[0].login.host == found[0].public_ip
    label = f"skyward-{POOL}-{order.token}"
    numbered = [f"{label}-{number}" for number in range(3)]
    assert sorted(cloud.left()) == sorted(
        [f"key {label}", f"script {label}", *(f"{kind} {name}" for kind in ("instance", "volume") for name in numbered)]
    )
    assert {v.size for v in cloud._volumes.values()} == {69}  # GB, of which 64 GiB are not quite as many


def test_machines_start_side_by_side(cloud: VerdaCloud) -> None:
    cloud.ordered_s = 0.3

    start = time.monotonic()
    _launch(12)

    assert time.monotonic() - start < 3


def test_spot_machines_cost_what_spot_costs(cloud: VerdaCloud) -> None:
    (machine,) = _launch(spot=True)

    assert (machine.spot, machine.price, machine.price_on_demand) == (True, 0.0098, 0.0279)
    assert Verda().machines(POOL)[0].spot


@pytest.mark.parametrize(
    ("name", "region", "image"),
    [
        (SMALL, HERE, "ubuntu-24.04"),
        (A100, HERE, "ubuntu-24.04-cuda-13.0-open"),
        (V100, "FIN-01", "ubuntu-22.04-cuda-12.0-docker"),
    ],
)
def test_the_newest_image_is_taken_that_fits_the_type(cloud: VerdaCloud, name: str, region: str, image: str) -> None:
    _launch(offer=_offer(name, region))

    assert _images(cloud) == [image]


def test_the_same_token_gives_the_same_machines(cloud: VerdaCloud) -> None:
    order, offer = _order(2), _offer()

    first, second = Verda().launch(offer, order), Verda().launch(offer, order)

    assert [m.id for m in first] == [m.id for m in second]
    assert len(cloud.left()) == 6  # two machines with their disks, a key and a script


def _no_capacity(cloud: VerdaCloud) -> None:
    cloud.faults.no_capacity.add((SMALL, HERE, False))


def _two_left(cloud: VerdaCloud) -> None:
    cloud.faults.capacity[SMALL, HERE, False] = 2


def _ends_in_error(cloud: VerdaCloud) -> None:
    cloud.faults.end_as = ["error"]


def _ends_without_capacity(cloud: VerdaCloud) -> None:
    cloud.faults.end_as = ["no_capacity"]


def _no_funds(cloud: VerdaCloud) -> None:
    cloud.faults.has_funds = False


def _limited(cloud: VerdaCloud) -> None:
    cloud.faults.most_instances = 2


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (_no_capacity, CapacityError, "No capacity available"),
        (_two_left, CapacityError, "No capacity available"),
        (_ends_in_error, CapacityError, "state 'error'"),
        (_ends_without_capacity, CapacityError, "state 'no_capacity'"),
        (_no_funds, QuotaError, r"balance.*console\.verda\.com"),
        (_limited, QuotaError, r"limit of 2 exceeded.*support@verda\.com"),
    ],
)
def test_a_launch_that_fails_leaves_nothing(
    cloud: VerdaCloud, fault: Callable[[VerdaCloud], None], error: type[Exception], words: str
) -> None:
    offer = _offer()
    cloud.provisioning_s = 0.3  # in which nothing can be deleted
    fault(cloud)

    with pytest.raises(error, match=words):
        _launch(3, offer=offer)

    assert cloud.left() == []


def test_a_price_that_has_risen_above_the_limit_is_not_paid(cloud: VerdaCloud) -> None:
    with pytest.raises(CapacityError, match=r"0\.0279 USD/h.*more than 0\.02"):
        _launch(2, max_price=0.02)

    assert cloud.left() == []


def test_throttling_is_waited_for(cloud: VerdaCloud) -> None:
    offer = _offer()
    cloud.faults.throttled = 4

    assert len(_launch(3, offer=offer)) == 3


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("path", ["/instances", "/sshkeys", "/scripts"])
def test_an_answer_that_is_lost_neither_doubles_nor_loses(cloud: VerdaCloud, path: str, times: int) -> None:
    cloud.faults.lost["POST", path] = times

    machines = _launch(3)

    assert len({m.id for m in machines}) == 3
    assert len(cloud.left()) == 3 + 3 + 1 + 1


def test_an_answer_that_is_lost_for_good_leaves_nothing(cloud: VerdaCloud) -> None:
    offer = _offer()
    cloud.faults.down.add(("POST", "/instances"))

    with pytest.raises(ProviderError, match="can't be read"):
        _launch(2, offer=offer)

    assert cloud.left() == []


def test_a_machine_that_came_up_twice_is_one_in_the_end(cloud: VerdaCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    create = cloud._create

    def twice(body: Any) -> Any:
        create(body)
        return create(body)

    monkeypatch.setattr(cloud, "_create", twice)

    (machine,) = _launch()

    assert [m.id for m in Verda().machines(POOL)] == [machine.id]
    assert sorted(kind.split()[0] for kind in cloud.left()) == ["instance", "key", "script", "volume"]


def test_a_spot_machine_reclaimed_while_it_starts_is_a_capacity_error(
    cloud: VerdaCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = _offer()
    create = cloud._create

    def reclaimed(body: Any) -> Any:
        status, ident = create(body)
        cloud.reclaim(ident)
        return status, ident

    monkeypatch.setattr(cloud, "_create", reclaimed)

    with pytest.raises(CapacityError, match="state 'discontinued'"):
        _launch(spot=True, offer=offer)

    assert cloud.left() == []


def test_what_a_failed_launch_could_not_end_is_ended_with_the_pool(cloud: VerdaCloud) -> None:
    offer = _offer()
    _two_left(cloud)
    cloud.faults.down.add(("PUT", "/instances"))
    with pytest.raises(CapacityError):
        _launch(3, offer=offer)
    assert any(left.startswith("instance") for left in cloud.left())

    cloud.faults.down.clear()
    Verda().end(POOL, [HERE])

    assert cloud.left() == []


# --- end ----------------------------------------------------------------------------------------------------


def test_terminated_machines_are_gone_with_their_disks_and_the_others_stay(cloud: VerdaCloud) -> None:
    first, second, third = _launch(3)

    Verda().terminate([first, third])

    assert [m.id for m in Verda().machines(POOL)] == [second.id]
    assert len(cloud.left()) == 4


def test_a_machine_is_terminated_as_soon_as_it_is_provisioned(cloud: VerdaCloud) -> None:
    cloud.provisioning_s = 0.3
    machines = _launch(2)
    assert {i.status for i in cloud._instances.values()} == {"provisioning"}

    Verda().terminate(machines)

    assert Verda().machines() == []
    assert [left.split()[0] for left in cloud.left()] == ["key", "script"]


def test_the_end_of_a_pool_leaves_nothing_and_may_come_twice(cloud: VerdaCloud) -> None:
    _launch(2)
    _launch(1, spot=True)

    Verda().end(POOL, [HERE])
    Verda().end(POOL, [HERE])

    assert cloud.left() == []
    assert Verda().machines() == []


def test_the_end_of_a_pool_is_nothing_to_other_pools_and_regions(cloud: VerdaCloud) -> None:
    _launch(pool_id="0123abce")
    _launch(offer=_offer(region="FIN-01"))
    _launch()

    Verda().end(POOL, [HERE])

    assert [(m.pool_id, m.region) for m in Verda().machines()] == [("0123abce", HERE), (POOL, "FIN-01")]
    assert sum("0123abce" in left for left in cloud.left()) == 4


def test_disks_that_were_left_behind_go_with_the_pool(cloud: VerdaCloud) -> None:
    _launch(3)
    client = VerdaClient(cloud.client_id, cloud.client_secret, cloud.url)
    _until(lambda: all(i.status == "running" for i in client.instances.get()))
    one, two, _ = client.instances.get()
    client.instances.action(one.id, "delete", volume_ids=[])  # its disk stays, detached
    client.instances.action(two.id, "delete")  # its disk is in the trash
    assert [v.id for v in client.volumes.get_in_trash()] == [two.os_volume_id]

    Verda().end(POOL, [HERE])

    assert cloud.left() == []


def test_an_end_while_the_api_is_down_names_what_is_left_and_works_later(cloud: VerdaCloud) -> None:
    machines = _launch(2)
    cloud.faults.down.add(("PUT", "/instances"))

    with pytest.raises(ProviderError, match="may be left and cost money"):
        Verda().end(POOL, [HERE])
    with pytest.raises(ProviderError):
        Verda().terminate(machines)

    cloud.faults.down.clear()
    Verda().end(POOL, [HERE])
    assert cloud.left() == []


def test_an_answer_to_a_deletion_that_is_lost_does_no_harm(cloud: VerdaCloud) -> None:
    machines = _launch(2)
    _until(lambda: all(i["status"] == "running" for i in cloud._list_instances({})[1]), cloud)
    cloud.faults.lost["PUT", "/instances"] = 1

    Verda().terminate(machines)

    assert Verda().machines() == []


def test_a_machine_that_will_not_go_is_named(cloud: VerdaCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.provisioning_s = 3600
    monkeypatch.setattr(verda_machines, "_END_LIMIT_S", 0.3)
    machines = _launch()

    with pytest.raises(ProviderError, match=rf"skyward-{POOL}-\w+-0 may still run.*Can't discontinue a provisioning"):
        Verda().terminate(machines)


def test_a_reclaimed_spot_machine_is_gone_with_its_disk(cloud: VerdaCloud) -> None:
    first, second = _launch(2, spot=True)

    cloud.reclaim(first.id)

    assert [m.id for m in Verda().machines(POOL)] == [second.id]
    Verda().terminate([first])
    assert sum(left.startswith("volume") for left in cloud.left()) == 1


def test_a_machine_that_switched_itself_off_is_still_found(cloud: VerdaCloud) -> None:
    (machine,) = _launch()
    _until(lambda: cloud._instances[machine.id].status == "running", cloud)
    cloud._off(machine.id)

    assert [m.id for m in Verda().machines(POOL)] == [machine.id]
    Verda().end(POOL, [HERE])
    assert cloud.left() == []


# --- the emulator's own bill --------------------------------------------------------------------------------


def test_time_is_billed_until_the_deletion_switched_on_or_off(
    cloud: VerdaCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(cloud, "clock", lambda: now)
    cloud.ordered_s = cloud.provisioning_s = cloud.deleting_s = 0
    (machine,) = _launch()
    cloud._off(machine.id)
    now += 1800
    assert cloud.bill(volumes=False) == pytest.approx(0.0279 / 2)

    Verda().end(POOL, [HERE])
    now += 3600

    assert cloud.bill(volumes=False) == pytest.approx(0.0279 / 2)
    assert cloud.bill() == pytest.approx(0.0279 / 2 + 69 * 0.2 / 730 / 2)


def _until(is_so: Callable[[], bool], cloud: VerdaCloud | None = None, *, limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        if cloud is not None:
            cloud.left()  # brings it up to date
        if is_so():
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- machines that boot -------------------------------------------------------------------------------------


@pytest.fixture
def booting(monkeypatch: pytest.MonkeyPatch) -> Iterator[VerdaCloud]:
    if reason := why_not():
        pytest.skip(reason)
    rack = Rack()
    try:
        with VerdaCloud(rack) as cloud:
            _point_to(cloud, monkeypatch)
            yield cloud
    finally:
        rack.close()


def _run(machine: Machine, command: str) -> str:
    """Run a command over SSH, as soon as the machine has the host key that it was given."""

    async def run() -> str:
        login = machine.login
        known = asyncssh.import_known_hosts(f"{login.host} {login.host_key}\n")
        key = asyncssh.import_private_key(login.key or "")
        options: Any = {"known_hosts": known, "client_keys": [key], "username": "root", "agent_path": None}
        async with asyncssh.connect(login.host, config=None, connect_timeout=5, **options) as connection:
            return str((await connection.run(command, check=True)).stdout).strip()

    deadline = time.monotonic() + 30
    while True:
        try:
            return asyncio.run(run())
        except (OSError, asyncssh.Error):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.mark.slow
def test_machines_boot_accept_the_given_key_and_end_themselves(booting: VerdaCloud) -> None:
    machines = _launch(2)
    names = [_run(machine, "hostname") for machine in machines]
    assert [name.rpartition("-")[2] for name in names] == ["0", "1"]
    assert _run(machines[0], "pgrep -cf 'sleep 3600'") != "0"
    assert _run(machines[0], "grep -c skyward /root/.ssh/authorized_keys") == "2"  # the account's key, and the script's

    _run(machines[0], "(sleep 0.2; poweroff) > /dev/null 2>&1 < /dev/null &")
    _until(lambda: booting._instances[machines[0].id].status == "offline")
    Verda().end(POOL, [HERE])

    assert booting.left() == []
    assert booting.rack.machines == {}


@pytest.mark.slow
def test_slow_machines_have_addresses_and_can_be_ended_before_they_boot(booting: VerdaCloud) -> None:
    booting.rack.boot_delay_s = 2.0

    start = time.monotonic()
    machines = _launch(2)
    assert time.monotonic() - start < 2
    assert all(m.public_ip for m in machines)
    Verda().end(POOL, [HERE])

    assert booting.left() == []


@pytest.mark.slow
def test_a_reclaimed_machine_is_off_at_once(booting: VerdaCloud) -> None:
    (machine,) = _launch(spot=True)
    _run(machine, "true")

    booting.reclaim(machine.id)

    assert booting.rack.machines == {}
    assert Verda().machines() == []
