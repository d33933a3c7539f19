"""What a console knows of a pool, and how it puts it. No terminal, no clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

import skyward as sky
from skyward.console import wording
from skyward.console.model import Model, PoolInfo, Work

CLOUD = PoolInfo("abcdef01", 2, 2, "aws")


def provisioned(node: int, *, spot: bool) -> sky.InstanceProvisioned:
    return sky.InstanceProvisioned(
        instance_id=f"i-{node}", node=node, spot=spot, provider="aws", instance_type="m7i.large",
        price_on_demand=0.1, price_spot=0.03 if spot else None,
    )  # fmt: skip


def step(node: int, name: str) -> sky.BootstrapProgress:
    return sky.BootstrapProgress(instance_id=f"i-{node}", step=name)


START: list[tuple[float, Any]] = [
    (0.0, sky.InfraCreating()),
    (1.0, sky.InfraCreated(region="us-east-1")),
    (1.5, sky.InstanceLaunching(count=1, instance_type="m7i.large", provider="aws")),
    (1.5, sky.InstanceLaunching(count=1, instance_type="m7i.large", provider="aws")),
    (4.0, provisioned(0, spot=False)),
    (4.0, provisioned(1, spot=True)),
    (4.0, sky.ProvisioningCompleted()),
    (4.0, step(0, "ssh")),
    (4.0, step(1, "ssh")),
    (20.0, step(0, "upload")),
    (24.0, step(1, "upload")),
    (30.0, step(0, "packages")),
    (40.0, sky.BootstrapCompleted(instance_id="i-0")),
    (44.0, sky.BootstrapCompleted(instance_id="i-1")),
    (46.0, sky.ClusterSetupCompleted()),
    (46.0, sky.PoolStarted()),
]


def model_of(happened: Iterable[tuple[float, Any]], info: PoolInfo = CLOUD) -> Model:
    model = Model(info)
    for at, event in happened:
        model.hear(event, at)
    return model


def test_phases_end_when_the_last_node_is_through() -> None:
    model = model_of([*START, (106.0, sky.PoolStopping())])
    model.end(110.0)

    assert model.by_phase(110.0) == {
        "plan": 1.5, "launch": 2.5, "boot": 20.0, "bootstrap": 20.0, "workers": 2.0, "running": 60.0, "ending": 4.0
    }  # fmt: skip
    assert model.start_s() == 46.0


def test_a_node_has_the_step_that_its_machine_is_at() -> None:
    model = model_of(START[:12])

    assert [(n.state, n.spot, n.price) for n in model.nodes.values()] == [
        ("packages", False, 0.1), ("upload", True, 0.03)
    ]  # fmt: skip
    assert wording.node_facts(model.nodes[1]) == ["i-1", "m7i.large", "spot", "0.0300 USD/h"]


def test_a_lost_machine_and_its_replacement() -> None:
    lost = sky.InstanceLost(instance_id="i-1", node=1, reason="its provider has taken it away")
    model = model_of([*START, (50.0, lost)])
    state = model.nodes[1].state
    replaced = sky.InstanceReplaced(instance_id="i-9", node=3, replaced_id="i-1")
    model.hear(replaced, 90.0)

    assert state == "lost"
    assert model.lost == 1
    assert list(wording.news(lost, model)) == [
        "node 1 is lost (i-1): its provider has taken it away; its calls run again elsewhere"
    ]
    assert list(wording.news(replaced, model)) == ["node 3 is up: i-9 in the place of i-1"]


def test_a_local_pool_has_no_prices() -> None:
    event = sky.InstanceProvisioned(instance_id="local-1-0", node=0, spot=False, provider="local")
    model = model_of([(0.0, event)], PoolInfo("1", 1, 1, "local", is_here=True))

    assert wording.node_facts(model.nodes[0]) == ["local-1-0", "", "", ""]


def test_calls_have_a_rate_and_a_time_left() -> None:
    model = model_of([(0.0, sky.TaskProgress(done=0, total=100)), (10.0, sky.TaskProgress(done=25, total=100))])

    assert model.work is not None
    assert wording.progress(model.work, 10.0) == "25 of 100 calls, 2.5/s, 30 s left"
    assert wording.progress(model.work, 15.0) == "25 of 100 calls, 2.5/s, 25 s left"


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (Work(0.0, done=0, total=1, heard=0.0), "0 of 1 call"),
        (Work(0.0, done=5, total=None, heard=10.0), "5 calls, 0.5/s"),
        (Work(0.0, done=5, total=10, failed=2, heard=1000.0), "5 of 10 calls, 2 failed, 0.3/min, 16 min 40 s left"),
        (Work(0.0, done=20000, total=20000, heard=2.0), "20,000 of 20,000 calls, 10,000/s"),
    ],
)
def test_progress_says_what_is_known(work: Work, words: str) -> None:
    assert wording.progress(work, work.heard) == words


def test_calls_are_added_up_over_the_life_of_a_pool() -> None:
    model = model_of(
        [
            (0.0, sky.TaskProgress(done=3, total=5, failed=1)),
            (1.0, sky.TaskProgress(done=5, total=5, failed=1)),
            (9.0, sky.TaskProgress(done=2, total=None)),
            (9.5, sky.TaskProgress(done=7, total=7, failed=2)),
        ]
    )

    assert model.total_calls() == (12, 3)


def test_cost_goes_on_between_two_updates() -> None:
    update = sky.CostUpdate(
        elapsed_seconds=1000, accumulated_cost=1.0, hourly_rate=3.6, spot_count=0, ondemand_count=1
    )
    model = model_of([(100.0, update)])

    assert model.cost is not None
    assert model.cost.now(110.0) == pytest.approx(1.01)


def test_cost_does_not_go_on_while_it_is_the_least_that_a_machine_costs() -> None:
    update = sky.CostUpdate(  # after ten of the sixty seconds that are to be paid anyway
        elapsed_seconds=10, accumulated_cost=0.06, hourly_rate=3.6, spot_count=0, ondemand_count=1
    )
    model = model_of([*START, (100.0, update)])

    assert model.cost is not None
    assert model.cost.now(130.0) == 0.06
    assert model.cost.now(160.0) == pytest.approx(0.07)


def test_cost_goes_on_at_the_rate_of_what_runs_now() -> None:
    update = sky.CostUpdate(  # nine machines have come just now
        elapsed_seconds=3600, accumulated_cost=1.0, hourly_rate=10.0, spot_count=0, ondemand_count=10
    )
    model = model_of([*START, (100.0, update)])

    assert model.cost is not None
    assert model.cost.now(136.0) == pytest.approx(1.1)


def test_the_summary_of_a_cloud_s_pool() -> None:
    final = sky.CostFinal(
        total_cost=0.0123, total_seconds=110, hourly_rate=0.4, spot_count=1, ondemand_count=1, savings_vs_ondemand=0.002
    )
    work = sky.TaskProgress(done=500, total=500, failed=2)
    model = model_of([*START, (60.0, work), (106.0, sky.PoolStopping()), (109.0, final)])
    model.end(110.0)

    assert wording.summary(model, 110.0) == [
        "ended after 1 min 50 s: 500 calls, 2 failed, cost 0.0123 USD, 0.0020 USD less than on-demand",
        "plan 1.5 s, launch 2.5 s, boot 20 s, bootstrap 20 s, workers 2.0 s, running 1 min 00 s, ending 4.0 s",
    ]


def test_a_failure_names_the_node_its_last_lines_and_what_to_do() -> None:
    lines = "\n  ".join(f"line {i}" for i in range(20))
    message = f"root@10.0.0.5 could not be made ready: its last lines:\n  {lines}\nCheck Image(pip=...).\nIts log is x"
    model = model_of(START[:12])

    assert wording.failure(model, sky.Error(message=message, instance_id="i-1")) == [
        "node 1 failed: root@10.0.0.5 could not be made ready: its last lines:",
        "  ...", *(f"  line {i}" for i in range(14, 20)),
        "Check Image(pip=...).", "Its log is x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (7500, "2 h 05 min")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text
