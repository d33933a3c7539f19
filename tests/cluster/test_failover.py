"""What a cluster does when its Dask scheduler is lost, in every order of events: with agents that are not real."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from skyward.cluster import failover
from skyward.cluster import scheduler as scheduler
from skyward.errors import NoMatchingInstanceError, PoolError
from tests.fake_agent import Cloud, FakeAgent, FakeCluster, Start, begin, machines, sold_out, spare, tell
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prompt")

JOIN_NONE = {"do": "join", "address": ""}
SCHEDULER = {"do": "scheduler"}


def join(agent: FakeAgent) -> dict[str, Any]:
    return {"do": "join", "address": agent.scheduler}


def has_moved(cluster: FakeCluster, times: int = 1) -> Callable[[], bool]:
    return lambda: len(cluster.listener.of("scheduler_moved")) == times and cluster.has_scheduler


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failover, "_AGAIN_S", 0.01)


def test_another_node_gets_the_scheduler_when_its_machine_is_lost(make: Start) -> None:
    cloud, agents = Cloud(spare("spare")), machines(None, None, None)
    cluster = make(cloud, agents)
    cluster.start()
    workers = [cluster.add_worker(node) for node in range(3)]

    tell(cluster, agents[0], "ended", why="out of reach")
    wait_until(lambda: cluster.listener.of("node_replaced") and has_moved(cluster)())

    assert cluster.scheduler == agents[1].scheduler
    assert agents[1].commands == [join(agents[0]), JOIN_NONE, SCHEDULER]
    assert agents[2].commands == [join(agents[0]), JOIN_NONE, join(agents[1])]
    assert cluster.machines == {1: "m1", 2: "m2", 3: "spare"}
    assert [cluster.sync(cluster.was_reclaimed, worker) for worker in workers] == [False, True, True]
    assert cloud.discarded == ["m0"]


def test_on_demand_machines_get_the_scheduler_first(make: Start) -> None:
    agents = [FakeAgent(0, "m0"), FakeAgent(1, "m1", spot=True), FakeAgent(2, "m2")]
    cluster = make(Cloud(sold_out), agents)
    cluster.start()

    tell(cluster, agents[0], "ended", why="out of reach")
    wait_until(has_moved(cluster))

    assert cluster.scheduler == agents[2].scheduler


def test_a_node_that_does_not_answer_does_not_get_the_scheduler(make: Start) -> None:
    agents = machines(None, None, None)
    agents[1].has_answers = False
    cluster = make(Cloud(sold_out), agents)
    cluster.start()

    tell(cluster, agents[0], "ended", why="out of reach")
    wait_until(has_moved(cluster))

    assert cluster.scheduler == agents[2].scheduler


def test_a_scheduler_that_ends_alone_is_started_again_on_its_node(make: Start) -> None:
    cloud, agents = Cloud(), machines(None, None)
    cluster = make(cloud, agents)
    cluster.start()
    workers = [cluster.add_worker(node) for node in range(2)]

    tell(cluster, agents[0], "scheduler-ended", why="signal 9")
    wait_until(has_moved(cluster))

    assert agents[0].commands == [JOIN_NONE, SCHEDULER]
    assert cluster.machines == {0: "m0", 1: "m1"}
    assert all(cluster.sync(cluster.was_reclaimed, worker) for worker in workers)
    assert cluster.listener.of("scheduler_lost") == [("m0: signal 9",)]


def test_there_are_no_slots_until_all_know_the_next_scheduler(make: Start) -> None:
    cluster = make(Cloud(), agents := machines(None, None))
    cluster.start()
    cluster.add_worker(1)
    go_on = cluster.listener.hold_moves()

    tell(cluster, agents[0], "scheduler-ended", why="signal 9")
    wait_until(lambda: cluster.scheduler_count == 2)
    worker = cluster.add_worker(1)
    assert cluster.slots() == []
    assert cluster.addresses() == set()
    go_on()
    wait_until(has_moved(cluster))

    assert [slot.address for slot in cluster.slots()] == [worker]


def test_the_replacement_of_the_only_machine_gets_the_scheduler(make: Start) -> None:
    cloud = Cloud(sold_out, spare("bad", fails_at="boot"), spare("spare"))
    cluster = make(cloud, agents := machines(None))
    cluster.start()

    tell(cluster, agents[0], "ended", why="taken away", gone=True)
    wait_until(has_moved(cluster))

    assert cluster.machines == {1: "spare"}
    assert cluster.listener.of("cluster_lost") == []


@pytest.mark.parametrize(
    ("event", "facts"),
    [("ended", {}), ("failed", {}), ("failed", {"address": None}), ("scheduler-ended", {})],
    ids=["ended", "failed", "not-started", "scheduler-ended"],
)
def test_the_next_scheduler_may_be_lost_before_it_is_there(make: Start, event: str, facts: dict[str, None]) -> None:
    agents = machines(None, None, None)
    agents[1].starts_schedulers = False
    cluster = make(Cloud(sold_out), agents)
    cluster.start()
    tell(cluster, agents[0], "ended", why="out of reach")
    wait_until(lambda: SCHEDULER in agents[1].commands)

    agents[1].starts_schedulers = True
    tell(cluster, agents[1], event, why="it too", error="it too", last_lines=[], **facts)
    wait_until(has_moved(cluster))

    assert cluster.scheduler == agents[2].scheduler


def test_the_next_scheduler_may_be_lost_while_it_is_made_known(make: Start) -> None:
    cluster = make(Cloud(sold_out), agents := machines(None, None, None))
    cluster.start()
    go_on = cluster.listener.hold_moves()
    tell(cluster, agents[0], "ended", why="out of reach")
    wait_until(lambda: cluster.scheduler_count == 2)

    tell(cluster, agents[1], "ended", why="it too")
    wait_until(lambda: cluster.scheduler_count == 3)
    go_on()
    wait_until(has_moved(cluster))

    assert cluster.scheduler == agents[2].scheduler
    assert agents[2].commands == [join(agents[0]), JOIN_NONE, join(agents[1]), JOIN_NONE, SCHEDULER]


def test_a_scheduler_that_can_not_be_reached_is_left(make: Start) -> None:
    cluster = make(Cloud(), agents := machines(None, None))
    cluster.start()
    cluster.unreachable = {agents[0].scheduler}

    def allow() -> None:
        cluster.unreachable = set()

    cluster.listener.when_lost = lambda: allow() if len(cluster.listener.of("scheduler_lost")) == 2 else None
    tell(cluster, agents[0], "scheduler-ended", why="signal 9")
    wait_until(has_moved(cluster))

    assert [why for (why,) in cluster.listener.of("scheduler_lost")] == [
        "m0: signal 9", "it could not be reached: no such place"
    ]  # fmt: skip


def test_a_node_that_tells_of_no_scheduler_in_time_is_passed_over(
    make: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_SCHEDULER_S", 0.2)
    agents = machines(None, None, None)
    agents[1].starts_schedulers = False
    cluster = make(Cloud(sold_out), agents)
    cluster.start()

    tell(cluster, agents[0], "ended", why="out of reach")
    wait_until(has_moved(cluster))

    assert cluster.scheduler == agents[2].scheduler


def test_a_node_that_failed_to_join_a_scheduler_that_is_lost_stays(make: Start) -> None:
    cluster = make(Cloud(), agents := machines(None, None))
    cluster.start()
    tell(cluster, agents[0], "scheduler-ended", why="signal 9")
    tell(cluster, agents[1], "failed", error="can't reach it", last_lines=[], address="tls://lost:1")
    wait_until(has_moved(cluster))

    assert cluster.machines == {0: "m0", 1: "m1"}


def test_a_node_that_becomes_ready_during_a_move_joins_the_next_scheduler(make: Start) -> None:
    ready, made = threading.Event(), []

    def new(node: int) -> FakeAgent:
        made.append(FakeAgent(node, "new", ready=ready))
        return made[-1]

    cluster = make(Cloud(new), agents := machines(None, None))
    cluster.start()
    cluster.scale(3)
    wait_until(lambda: made and made[0].started.is_set())
    agents[0].starts_schedulers = False
    tell(cluster, agents[0], "scheduler-ended", why="signal 9")
    wait_until(lambda: SCHEDULER in agents[0].commands)

    ready.set()
    wait_until(lambda: made[0] in cluster.ready)
    agents[0].tell_soon(cluster)
    wait_until(has_moved(cluster))

    assert made[0].commands == [join(agents[0])]


@pytest.mark.parametrize("has_told", [True, False])
def test_the_first_machine_may_be_lost_while_the_cluster_starts(make: Start, has_told: bool) -> None:
    ready = threading.Event()
    agents = [FakeAgent(0, "m0"), FakeAgent(1, "m1", ready=ready)]
    agents[0].starts_scheduler = has_told
    cluster = make(Cloud(spare("spare")), agents)
    starting = threading.Thread(target=cluster.start)
    starting.start()
    assert agents[1].started.wait(30)
    wait_until(lambda: agents[0] in cluster.ready)

    tell(cluster, agents[0], "ended", why="taken away", gone=True)
    ready.set()
    starting.join(30)

    assert cluster.has_scheduler
    assert sorted(cluster.machines.values()) == ["m1", "spare"]
    assert cluster.listener.of("scheduler_lost") == []  # it was not in use yet


@pytest.mark.parametrize("retries", [0, 3])
def test_another_scheduler_starts_where_the_first_does_not(make: Start, retries: int) -> None:
    agents = machines(None, None)
    agents[0].starts_scheduler = False
    cluster = make(Cloud(), agents, retries=retries)
    starting, failures = begin(cluster)
    wait_until(lambda: agents[0] in cluster.ready)
    tell(cluster, agents[0], "failed", error="ended by signal 9", last_lines=[], address=None)
    starting.join(30)

    if retries:
        assert cluster.scheduler == agents[1].scheduler
        assert cluster.machines == {0: "m0", 1: "m1"}
    else:
        assert "ended by signal 9" in str(failures[0])


def test_a_loss_after_the_end_moves_nothing(make: Start) -> None:
    cluster = make(Cloud(spare("spare")), agents := machines(None, None))
    cluster.start()
    cluster.close()

    cluster._heard(agents[0], {"event": "scheduler-ended", "why": "signal 9"})

    assert cluster.listener.of("scheduler_lost") == []


def test_the_end_does_not_wait_for_the_next_scheduler(make: Start) -> None:
    agents = machines(None, None)
    cluster = make(Cloud(), agents)
    cluster.start()
    agents[0].starts_schedulers = False
    tell(cluster, agents[0], "scheduler-ended", why="signal 9")
    wait_until(lambda: SCHEDULER in agents[0].commands)

    cluster.close(timeout=20)  # raises when it takes longer

    assert all(agent.stopped.is_set() for agent in agents)


def test_a_notice_moves_the_scheduler_when_what_runs_there_has_ended(make: Start) -> None:
    cloud, agents = Cloud(spare("spare")), machines(None, None)
    cluster = make(cloud, agents)
    cluster.start()
    leaves, stays = cluster.add_worker(0), cluster.add_worker(1)
    busy = {leaves}
    cluster.busy = lambda: busy

    tell(cluster, agents[0], "notice", seconds=3600)
    wait_until(lambda: cluster.listener.of("node_replaced"))
    assert [slot.address for slot in cluster.slots()] == [stays]
    assert cluster.listener.of("scheduler_lost") == []
    busy.clear()
    wait_until(lambda: has_moved(cluster)() and cloud.discarded == ["m0"])

    assert cluster.scheduler == agents[1].scheduler
    assert cluster.sync(cluster.was_reclaimed, leaves)


def test_after_its_notice_the_only_machine_may_start_another_scheduler(make: Start) -> None:
    cloud = Cloud(spare("spare", ready=threading.Event()))
    cluster = make(cloud, agents := machines(None))
    cluster.start()
    tell(cluster, agents[0], "notice", seconds=3600)
    wait_until(lambda: cloud.asked)

    tell(cluster, agents[0], "scheduler-ended", why="signal 9")
    wait_until(has_moved(cluster))
    worker = cluster.add_worker(0)

    assert [slot.address for slot in cluster.slots()] == [worker]


def test_a_scheduler_that_is_lost_again_and_again_ends_the_pool(make: Start) -> None:
    cluster = make(Cloud(), agents := machines(None, None), retries=2)
    cluster.start()
    for times in (1, 2):
        tell(cluster, agents[0], "scheduler-ended", why=f"signal {times}")
        wait_until(has_moved(cluster, times))

    tell(cluster, agents[0], "scheduler-ended", why="signal 3")
    wait_until(lambda: cluster.listener.of("cluster_lost"))

    ((error,),) = cluster.listener.of("cluster_lost")
    assert "scheduler was lost again and again" in str(error)
    assert "\n  m0: signal 1\n  m0: signal 2\n  m0: signal 3\n" in str(error)


def test_calls_that_end_in_between_let_the_scheduler_be_lost_more_often(make: Start) -> None:
    cluster = make(Cloud(), agents := machines(None, None), retries=1)
    cluster.start()
    ended = 0
    cluster.ended = lambda: ended

    for times in range(1, 6):
        ended += 1
        tell(cluster, agents[0], "scheduler-ended", why="signal 9")
        wait_until(has_moved(cluster, times))

    assert cluster.listener.of("cluster_lost") == []


def test_machines_that_are_taken_away_do_not_count_against_retries(make: Start) -> None:
    cluster = make(Cloud(sold_out), agents := machines(None, None, None), retries=0)
    cluster.start()

    for times, agent in enumerate(agents[:2], 1):
        tell(cluster, agent, "ended", why="its provider has taken it away", gone=True)
        wait_until(has_moved(cluster, times))

    assert cluster.scheduler == agents[2].scheduler
    assert cluster.listener.of("cluster_lost") == []


@pytest.mark.parametrize("gone", [True, False])
def test_the_end_of_a_scheduler_counts_unless_its_machine_is_taken(make: Start, gone: bool) -> None:
    cluster = make(Cloud(sold_out), agents := machines(None, None), retries=0)
    cluster.start()
    agents[0].has_answers = False  # it is being shut down

    tell(cluster, agents[0], "scheduler-ended", why="signal 15")
    wait_until(has_moved(cluster))
    assert cluster.listener.of("cluster_lost") == []
    tell(cluster, agents[0], "ended", why="not there any more", gone=gone)
    wait_until(lambda: cluster.listener.of("node_lost") and not cluster._growth)

    assert cluster.scheduler == agents[1].scheduler
    wait_until(lambda: gone or cluster.listener.of("cluster_lost"))
    assert len(cluster.listener.of("cluster_lost")) == (0 if gone else 1)


@pytest.mark.parametrize("hosts", [True, False])
def test_the_pool_ends_when_no_machine_is_left_and_none_can_be_had(make: Start, hosts: bool) -> None:
    cluster = make(Cloud(error=NoMatchingInstanceError("no more of them")), agents := machines(None), hosts=hosts)
    cluster.start()

    tell(cluster, agents[0], "ended", why="out of reach")
    wait_until(lambda: cluster.listener.of("cluster_lost"))

    ((error,),) = cluster.listener.of("cluster_lost")
    assert isinstance(error, PoolError)
    assert "none of its machines is left" in str(error)
    assert "no more of them" in str(error)


def test_this_processs_own_silence_ends_the_pool(make: Start) -> None:
    cluster = make(Cloud(), agents := machines(None, None))
    cluster.start()

    tell(cluster, agents[0], "ended", why="no heartbeats", silence=True)
    wait_until(lambda: cluster.listener.of("cluster_lost"))

    ((error,),) = cluster.listener.of("cluster_lost")
    assert "has ended: no heartbeats" in str(error)


def test_scaling_leaves_the_schedulers_node(make: Start) -> None:
    cloud = Cloud(sold_out)
    cluster = make(cloud, agents := machines(None, None, None))
    cluster.start()
    tell(cluster, agents[0], "ended", why="out of reach")
    tell(cluster, agents[1], "ended", why="out of reach")
    wait_until(lambda: cluster.has_scheduler and cluster.scheduler == agents[2].scheduler)

    cluster.scale(1)
    cluster.sync(_nothing)

    assert cluster.plan == {2}


async def _nothing() -> None:
    pass
