"""Launching by plan: what follows what fails, and what is left of it. Addresses only, without machines behind them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import skyward as sky
import skyward.launch.provisioner
from skyward.cleanup import journal
from skyward.cleanup.pool_record import PoolRecord
from skyward.launch.plan import make_plan
from skyward.launch.provisioner import Provisioner
from skyward.providers import retry
from skyward.providers.base import boot_s
from skyward.spec.instance import InstanceSpec
from skyward.spec.pool import PoolSpec
from tests.clouds.emulated import NAMES, Emulated
from tests.fake_agent import FakeAgent, FakeCluster
from tests.waiting import wait_until


@pytest.fixture
def provision() -> Iterator[Callable[..., Provisioner]]:
    """Makes a provisioner for a pool with these options; everything is ended with the test."""
    made: list[tuple[Provisioner, PoolRecord]] = []

    def provision(*providers: Any, heard: list[Any] | None = None, **options: Any) -> Provisioner:
        spec = PoolSpec(**options)
        expires = time.time() + spec.timeout
        pool_id = f"{len(made):08}"
        record = PoolRecord(pool_id, "clouds", expires)
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

    monkeypatch.setattr(retry, "LISTED_S", 60.0)
    assert provisioner.gone([machine]) == set()
    monkeypatch.setattr(retry, "LISTED_S", 0.0)
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
    monkeypatch.setattr(skyward.launch.provisioner, "_MOST_TRIES", 2)
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
        ttls.append(order.user_data.ttl_s)
        return launch(self, offer, order)

    monkeypatch.setattr(sky.AWS, "launch", recording)
    provisioner.launch()
    provisioner._expires -= 3000  # as if so much time had passed
    provisioner.more([1], [])

    assert ttls[0] == pytest.approx(3600 + skyward.launch.provisioner.BOOT_HEADROOM_S, abs=30)
    assert ttls[1] == pytest.approx(600 + skyward.launch.provisioner.BOOT_HEADROOM_S, abs=30)


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


# --- the end, while machines are launched -------------------------------------------------------------------


class Stops:
    """Makes a launch wait at a step, until the pool has begun to end."""

    def __init__(self, cloud: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard: list[Any] = []
        self._cloud = cloud
        self._patch = monkeypatch
        self._reached, self._ending = threading.Event(), threading.Event()

    def at(self, step: str) -> None:
        """Make launches wait from now on."""
        boot = self._cloud.rack.boot
        match step:
            case "before the create call":
                self._wait_at = sky.InstanceLaunching
            case "during the create call":

                def wait_and_boot(*args: Any, **options: Any) -> str:
                    self._wait()
                    return boot(*args, **options)

                self._patch.setattr(self._cloud.rack, "boot", wait_and_boot)
            case "before it has an address":
                self._cloud.take_long_to_start()

                def boot_and_tell(*args: Any, **options: Any) -> str:
                    self._reached.set()
                    return boot(*args, **options)

                self._patch.setattr(self._cloud.rack, "boot", boot_and_tell)
            case "while it is made ready":
                self._wait_at = None

    _wait_at: Any = None

    def emit(self, event: Any) -> None:
        self.heard.append(event)
        if self._wait_at is not None and isinstance(event, self._wait_at):
            self._wait()

    def _wait(self) -> None:
        self._reached.set()
        assert self._ending.wait(60)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(60)

    def go_on(self) -> None:
        self._ending.set()


STEPS = ("before the create call", "during the create call", "before it has an address", "while it is made ready")
# Each cloud's own code has a part in all steps but the last; that it is a replacement makes no difference to it.
OVERTAKEN = [("scale", step, name) for name in NAMES for step in STEPS[:3]]
OVERTAKEN += [("scale", STEPS[3], "digitalocean"), *(("replacement", step, "digitalocean") for step in STEPS)]


@pytest.mark.parametrize(("why", "step", "name"), OVERTAKEN)
def test_a_launch_that_the_end_overtakes_leaves_nothing(
    why: str, step: str, name: str, emulate: Callable[..., Emulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = emulate(name, boots=False)
    stops = Stops(cloud, monkeypatch)
    provisioner, record = make_provisioner(cloud, stops.emit)
    agents: list[FakeAgent] = []

    def new_agents(nodes: Sequence[int], used: Sequence[str]) -> list[FakeAgent]:
        machines = provisioner.more(nodes, used)
        new = [FakeAgent(n, m.id, ready=threading.Event()) for n, m in zip(nodes, machines, strict=True)]
        agents.extend(new)
        return new

    first = [FakeAgent(n, m.id) for n, m in enumerate(provisioner.launch())]
    cluster = FakeCluster(first, new_agents=new_agents, discard=provisioner.discard)
    cluster.start()
    stops.at(step)
    if why == "scale":
        cluster.scale(3)
    else:
        cluster.loop.add_callback(first[1].heard, {"event": "ended", "why": "lost", "gone": True})
    if step == "while it is made ready":
        wait_until(lambda: agents and agents[0].started.is_set())
    else:
        stops.wait_until_reached()

    provisioner.close()
    stops.go_on()
    cluster.stop()
    left = provisioner.end()
    record.left = left
    record.close()

    assert left == []
    assert cloud.left() == []
    assert journal.entries() == []
    assert record._guardian._process.returncode is not None
    asked = cloud.calls()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("skyward-launch")])
    assert cloud.calls() == asked  # of the cloud, nothing more


def make_provisioner(cloud: Emulated, emit: Callable[[Any], None]) -> tuple[Provisioner, PoolRecord]:
    # Several offers, so that one that fails is followed by the next; the emulated AWS takes long to price so many.
    machine: dict[str, Any] = {"machine": cloud.type} if cloud.name == "aws" else {"cpu": 2}
    spec = PoolSpec(**machine, nodes=2, allocation="on-demand")
    expires = time.time() + spec.timeout
    record = PoolRecord("0123abcd", cloud.name, expires)
    return Provisioner(make_plan((cloud.provider(),), spec), spec, "0123abcd", record, emit, expires), record


@pytest.mark.parametrize("name", NAMES)
def test_a_pool_that_has_ended_asks_nothing_more_of_its_cloud(
    name: str, emulate: Callable[..., Emulated]
) -> None:
    cloud = emulate(name, boots=False)
    provisioner, record = make_provisioner(cloud, lambda _: None)
    machine, _ = provisioner.launch()
    assert provisioner.end() == []
    record.close()
    calls = cloud.calls()

    with pytest.raises(sky.PoolError, match="the pool has ended"):
        provisioner.more([2], [])
    assert provisioner.gone([machine]) == set()
    provisioner.discard(machine)

    assert cloud.calls() == calls
    assert journal.entries() == []


def test_a_pool_that_another_process_has_ended_launches_no_more(emulate: Callable[..., Emulated]) -> None:
    cloud = emulate("digitalocean", boots=False)
    provisioner, record = make_provisioner(cloud, lambda _: None)
    provisioner.launch()
    cloud.provider().end("0123abcd", [cloud.region])
    journal.close("0123abcd")  # as `skyward down` does, and the guardian when this computer was suspended

    with pytest.raises(sky.PoolError, match="was ended by another process"):
        provisioner.more([2], [])

    assert cloud.left() == []
    assert journal.entries() == []
    assert provisioner.end() == []
    record.close()


def test_after_its_timeout_a_pool_launches_no_more(emulate: Callable[..., Emulated]) -> None:
    cloud = emulate("digitalocean", boots=False)
    provisioner, record = make_provisioner(cloud, lambda _: None)
    provisioner._expires = time.time() - 1

    with pytest.raises(sky.PoolTimeoutError):
        provisioner.launch()

    assert cloud.left() == []
    assert provisioner.end() == []
    record.close()


@pytest.mark.parametrize("name", NAMES)
def test_refused_credentials_leave_nothing_for_the_guardian(
    name: str, emulate: Callable[..., Emulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = emulate(name, boots=False)
    told: list[Any] = []
    provisioner, record = make_provisioner(cloud, told.append)
    for variable in ("AWS_ACCESS_KEY_ID", "DIGITALOCEAN_TOKEN", "VERDA_CLIENT_SECRET"):
        monkeypatch.setenv(variable, "wrong")

    with pytest.raises(sky.CredentialsError):
        provisioner.launch()
    record.left = provisioner.end()
    record.close()

    assert record.left == []
    assert journal.entries() == []
    assert record._guardian._process.returncode is not None
    assert not any("may still run" in event.message for event in told if isinstance(event, sky.Error))


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_that_nobody_waited_for_is_left_to_the_guardian(
    name: str, emulate: Callable[..., Emulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C twice: the second one while the end waits for a launch."""
    cloud = emulate(name, boots=False)
    stops = Stops(cloud, monkeypatch)
    provisioner, record = make_provisioner(cloud, stops.emit)
    stops.at("during the create call")
    with ThreadPoolExecutor(1) as threads:
        launch = threads.submit(provisioner.launch)
        stops.wait_until_reached()

        provisioner.close()
        record.left = ["not confirmed"]
        record.close()
        (entry,) = journal.entries()
        stops.go_on()
        with pytest.raises(sky.PoolError):
            launch.result(60)

    assert entry.state == "stopping"
    assert entry.launching_until > time.time() + 60
    assert record._guardian._process.poll() is None  # it looks again until then
    wait_until(lambda: cloud.left() == [], 60)
    record._guardian._process.kill()
    record._guardian._process.wait()
    journal.close("0123abcd")


def test_ctrl_c_ends_the_start_of_several_pools_at_once(emulate: Callable[..., Emulated]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident
    assert main is not None
    cloud, waiting = emulate("digitalocean", boots=False), threading.Semaphore(0)
    # Nobody answers at the address of such a machine.
    options: dict[str, Any] = {"machine": cloud.type, "display": "quiet", "timeout": 7200.0, "boot_timeout": 3600.0}
    pools = [sky.ComputePool(provider=cloud.provider(), **options) for _ in range(2)]
    for pool in pools:
        pool.on(sky.BootstrapStarting, lambda _: waiting.release())

    def interrupt() -> None:
        assert waiting.acquire(timeout=60)
        assert waiting.acquire(timeout=60)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt), sky.MultiPool(*pools):
        pass

    assert cloud.left() == []
    assert journal.entries() == []


# --- booting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "boot_timeout", "limit_s"),
    [("m6i.large", None, 300), ("p5.48xlarge", None, 1200), ("p5.48xlarge", 60, 60)],
)
def test_big_machines_may_boot_for_longer(
    machine: str, boot_timeout: float | None, limit_s: float,
    emulate: Callable[..., Emulated], provision: Callable[..., Provisioner],
) -> None:  # fmt: skip
    cloud = emulate("aws", boots=False)

    (launched,) = provision(cloud.provider(), machine=machine, boot_timeout=boot_timeout).launch()

    assert launched.boot_s == limit_s


def test_bare_metal_may_boot_for_longer() -> None:
    assert boot_s(InstanceSpec("m6i.metal", vcpu=128, memory_gb=512)) == 1200
