"""Launching by plan: what follows what fails, and what is left of it. Addresses only, without machines behind them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import skyward as sky
import skyward.provision
from skyward.cluster import journal
from skyward.cluster.record import Record
from skyward.plan import make_plan
from skyward.providers import listing
from skyward.provision import Provisioner
from skyward.spec import PoolSpec
from tests.clouds.emulated import NAMES, Emulated
from tests.waiting import wait_until


@pytest.fixture
def provision() -> Iterator[Callable[..., Provisioner]]:
    """Makes a provisioner for a pool with these options; everything is ended with the test."""
    made: list[tuple[Provisioner, Record]] = []

    def provision(*providers: Any, heard: list[Any] | None = None, **options: Any) -> Provisioner:
        spec = PoolSpec(**options)
        expires = time.time() + spec.timeout
        pool_id = f"{len(made):08}"
        record = Record(pool_id, "clouds", expires)
        emit = heard.append if heard is not None else lambda _: None
        provisioner = Provisioner(make_plan(providers, spec), spec, pool_id, record, emit, expires)
        made.append((provisioner, record))
        return provisioner

    yield provision
    for provisioner, record in made:
        record.left = provisioner.end()
        record.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_is_in_the_journal_and_its_end_leaves_nothing(
    name: str, emulate: Callable[..., Emulated], provision: Callable[..., Provisioner]
) -> None:
    cloud = emulate(name, boots=False)

    provisioner = provision(cloud.provider(), machine=cloud.type, nodes=4)
    machines = provisioner.launch()

    (entry,) = journal.entries()
    assert [m.id for m in entry.machines] == [m.id for m in machines]
    assert [(p.provider, p.region) for p in entry.places] == [(name, cloud.region)]
    assert len(cloud.machines()) == 4
    assert [m.spot for m in machines] == sorted(m.spot for m in machines)
    assert provisioner.end() == []
    assert cloud.left() == []


def test_the_cheapest_is_followed_by_the_next_provider_when_it_is_sold_out(
    emulate: Callable[..., Emulated], provision: Callable[..., Provisioner]
) -> None:
    aws, verda = emulate("aws", boots=False), emulate("verda", boots=False)
    clouds = (sky.AWS(), sky.Verda())
    options: dict[str, Any] = {"accelerator": "H100", "selection": "cheapest", "allocation": "on-demand"}
    heard: list[Any] = []
    assert make_plan(clouds, PoolSpec(**options)).steps[0].offer.instance.name == "1H100.80S.32V"
    verda.refuse_creates()

    (machine,) = provision(*clouds, heard=heard, **options).launch()

    assert (machine.provider, machine.instance_type) == ("aws", "p5.4xlarge")
    assert verda.left() == []
    assert len(aws.machines()) == 1
    assert [type(e).__name__ for e in heard if isinstance(e, (sky.InstanceLaunching, sky.Error))] == [
        "InstanceLaunching", "Error", "InstanceLaunching"
    ]  # fmt: skip


def test_when_all_is_sold_out_the_error_has_a_line_for_each_attempt(
    emulate: Callable[..., Emulated], provision: Callable[..., Provisioner]
) -> None:
    verda = emulate("verda", boots=False)
    verda.refuse_creates()

    with pytest.raises(sky.AllProvidersFailedError) as info:
        provision(sky.Verda(), accelerator="A100", allocation="on-demand").launch()

    text = str(info.value)
    assert "FIN-01 1A100.22V" in text
    assert "FIN-03 1A100.22V" in text
    assert set(info.value.reasons) == {"verda"}
    assert verda.left() == []


def test_credentials_that_are_refused_are_not_tried_again(
    emulate: Callable[..., Emulated], provision: Callable[..., Provisioner], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = emulate("digitalocean", boots=False)
    provisioner = provision(sky.DigitalOcean(), cpu=4)
    monkeypatch.setenv("DIGITALOCEAN_TOKEN", "wrong")

    with pytest.raises(sky.CredentialsError):
        provisioner.launch()

    monkeypatch.setenv("DIGITALOCEAN_TOKEN", cloud.cloud.token)


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_that_is_not_listed_yet_is_not_gone(
    name: str,
    emulate: Callable[..., Emulated],
    provision: Callable[..., Provisioner],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cloud = emulate(name, boots=False)
    provisioner = provision(cloud.provider(), machine=cloud.type, allocation="on-demand")
    (machine,) = provisioner.launch()
    cloud.list_late(60)

    monkeypatch.setattr(listing, "LISTED_S", 60.0)
    assert provisioner.gone([machine]) == set()
    monkeypatch.setattr(listing, "LISTED_S", 0.0)
    assert provisioner.gone([machine]) == {machine.id}
    cloud.list_late(0)


@pytest.mark.parametrize(
    "refusal",
    [
        ("AuthFailure.ServiceLinkedRoleCreationNotPermitted", "The provided credentials do not have permission to "
         "create the service-linked role for EC2 Spot Instances."),
        ("UnauthorizedOperation", "User: arn:aws:iam::1:user/me is not authorized to perform: ec2:RunInstances"),
        ("SpotMaxPriceTooLow", "Your Spot request price of 0.01 is lower than the minimum"),
        ("MaxSpotInstanceCountExceeded", "Max spot instance count exceeded"),
    ],
)  # fmt: skip
def test_where_spot_is_refused_on_demand_machines_are_launched(
    refusal: tuple[str, str], emulate: Callable[..., Emulated], provision: Callable[..., Provisioner]
) -> None:
    cloud = emulate("aws", boots=False)
    cloud.faults.refused["*", cloud.region, "spot"] = refusal

    machines = provision(cloud.provider(), machine=cloud.type, nodes=2, allocation="spot-if-available").launch()

    assert [m.spot for m in machines] == [False, False]
    assert cloud.cloud.calls["CreateFleet"] == 3  # one for each market, then both on demand


def test_many_spot_types_without_capacity_leave_on_demand_its_tries(
    emulate: Callable[..., Emulated], provision: Callable[..., Provisioner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skyward.provision, "_MOST_TRIES", 2)
    cloud = emulate("aws", boots=False)
    cloud.faults.no_capacity.add(("*", cloud.region, "spot"))

    (machine,) = provision(cloud.provider(), cpu=2, allocation="spot-if-available").launch()

    assert not machine.spot


def test_a_type_that_is_refused_is_followed_by_another_in_its_region(
    emulate: Callable[..., Emulated], provision: Callable[..., Provisioner]
) -> None:
    cloud = emulate("aws", boots=False)
    options: dict[str, Any] = {"cpu": 2, "allocation": "spot-if-available"}
    first = make_plan([cloud.provider()], PoolSpec(**options)).steps[0].offer.instance.name
    said = f"Cluster placement groups are not supported by the '{first}' instance type."
    cloud.faults.refused[first, cloud.region] = ("InvalidParameterCombination", said)
    heard: list[Any] = []

    (machine,) = provision(cloud.provider(), heard=heard, **options).launch()

    assert machine.region == cloud.region
    assert machine.instance_type != first
    assert len([e for e in heard if isinstance(e, sky.Error)]) == 1


def test_a_quota_of_a_whole_region_is_met_once(
    emulate: Callable[..., Emulated], provision: Callable[..., Provisioner]
) -> None:
    cloud = emulate("aws", boots=False)
    cloud.faults.refused["*", cloud.region] = ("VolumeLimitExceeded", "Maximum storage of gp3 volumes exceeded")

    with pytest.raises(sky.QuotaError, match="gp3"):
        provision(cloud.provider(), cpu=2, allocation="spot-if-available").launch()

    assert cloud.cloud.calls["CreateFleet"] == 1


def test_four_nodes_on_aws_are_one_fleet_call(
    emulate: Callable[..., Emulated], provision: Callable[..., Provisioner]
) -> None:
    cloud = emulate("aws", boots=False)

    provision(cloud.provider(), machine=cloud.type, nodes=4, allocation="on-demand").launch()

    assert cloud.cloud.calls["CreateFleet"] == 1
    assert len(cloud.machines()) == 4


@pytest.mark.slow
def test_calls_for_a_thousand_nodes_are_as_many_as_for_one(
    emulate: Callable[..., Emulated], provision: Callable[..., Provisioner]
) -> None:
    cloud = emulate("aws", boots=False)
    calls = []
    for nodes in (1, 1000):
        provisioner = provision(cloud.provider(), machine=cloud.type, nodes=nodes, allocation="on-demand")
        cloud.cloud.calls.clear()  # offers were asked for
        machines = provisioner.launch()
        assert {len(e.machines) for e in journal.entries()} == {nodes}
        assert len({m.id for m in machines}) == nodes
        assert provisioner.end() == []
        calls.append(sum(cloud.cloud.calls.values()))
        journal.close(journal.entries()[0].pool_id)

    # A look more or less, while machines get their addresses or come to their end.
    assert calls[1] <= calls[0] + 3


# --- time and money -----------------------------------------------------------------------------------------


def test_further_machines_switch_themselves_off_with_the_first(
    emulate: Callable[..., Emulated], provision: Callable[..., Provisioner], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = emulate("aws", boots=False)
    provisioner = provision(cloud.provider(), machine=cloud.type, timeout=3600)
    ttls: list[int] = []
    launch = sky.AWS.launch

    def recording(self: Any, offer: Any, order: Any) -> Any:
        ttls.append(order.birth.ttl_s)
        return launch(self, offer, order)

    monkeypatch.setattr(sky.AWS, "launch", recording)
    provisioner.launch()
    provisioner._expires -= 3000  # as if so much time had passed
    provisioner.more([1], [])

    assert ttls[0] == pytest.approx(3600 + skyward.provision.BIRTH_HEADROOM_S, abs=30)
    assert ttls[1] == pytest.approx(600 + skyward.provision.BIRTH_HEADROOM_S, abs=30)


def test_a_machine_costs_before_it_has_an_address(
    emulate: Callable[..., Emulated], provision: Callable[..., Provisioner]
) -> None:
    cloud = emulate("aws", boots=False)
    cloud.cloud.pending_s = 3.0
    provisioner = provision(cloud.provider(), machine=cloud.type, nodes=2, allocation="on-demand")

    with ThreadPoolExecutor(1) as threads:
        launch = threads.submit(provisioner.launch)
        wait_until(lambda: provisioner.cost().accumulated_cost > 0)
        early = provisioner.cost()
        assert not launch.done()

    assert early.hourly_rate == pytest.approx(sum(m.price or 0 for m in launch.result()))
    assert provisioner.cost().hourly_rate == pytest.approx(early.hourly_rate)
    assert provisioner.cost().accumulated_cost >= early.accumulated_cost


@pytest.mark.parametrize("name", NAMES)
def test_a_start_that_costs_too_much_ends(name: str, emulate: Callable[..., Emulated]) -> None:
    cloud = emulate(name, boots=False)
    pool = sky.ComputePool(cloud.provider(), machine=cloud.type, max_cost=1e-5, display="quiet")

    with pytest.raises(sky.PoolBudgetError, match="destroyed before they were ready"), pool:
        pass

    assert cloud.left() == []
    assert journal.entries() == []
    assert pool.cost >= 1e-5
