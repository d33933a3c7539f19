"""How a cluster of several machines starts, grows and ends when some of them fail: with agents that are not real."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from skyward.cluster import replacement
from skyward.errors import BootstrapError, NoMatchingInstanceError, PoolError, PoolTimeoutError
from tests.fake_agent import Cloud, FakeAgent, Start, begin, machines, sold_out, spare, tell
from tests.waiting import wait_until

# --- the start ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 2])
def test_a_machine_that_does_not_boot_is_replaced(make: Start, bad: int) -> None:
    cloud = Cloud(spare("spare"))
    agents = machines(*("boot" if node == bad else None for node in range(3)))
    cluster = make(cloud, agents)

    cluster.start()

    assert cluster.machines == {0: "m0", 1: "m1", 2: "m2"} | {bad: "spare"}
    assert cluster.listener.of("node_replaced") == [(bad, "spare", f"m{bad}")]
    assert [str(error) for (error,) in cluster.listener.of("machine_failed")] == [f"m{bad} failed at boot"]
    wait_until(lambda: cloud.discarded == [f"m{bad}"])
    assert agents[bad].stopped.is_set()


def test_a_replacement_that_fails_is_replaced_too(make: Start) -> None:
    cloud = Cloud(spare("first", fails_at="boot"), spare("second"))
    cluster = make(cloud, machines(None, "boot", None, None))

    cluster.start()

    assert cluster.machines == {0: "m0", 1: "second", 2: "m2", 3: "m3"}
    wait_until(lambda: cloud.discarded == ["m1", "first"])


def test_a_start_fails_when_more_than_half_of_the_machines_do(make: Start) -> None:
    cloud = Cloud(*(spare(f"spare{n}", fails_at="boot") for n in range(9)))

    with pytest.raises(BootstrapError) as info:
        make(cloud, machines(None, None, None, "boot")).start()

    assert str(info.value).splitlines() == [
        "spare1 failed at boot", "Before it failed:", "  m3 failed at boot", "  spare0 failed at boot"
    ]  # fmt: skip
    assert len(cloud.asked) == 2


def test_an_image_that_fails_twice_fails_the_start_at_once(make: Start) -> None:
    cloud, never = Cloud(spare("spare")), threading.Event()
    agents = [*machines("packages", "packages"), *(FakeAgent(n, f"m{n}", ready=never) for n in range(2, 9))]

    with pytest.raises(BootstrapError, match=r"failed at packages\nBefore it failed:\n  m\d failed at packages"):
        make(cloud, agents).start()

    assert cloud.asked == []


def test_an_image_that_fails_on_the_only_node_fails_the_start_at_once(make: Start) -> None:
    cloud = Cloud(spare("spare"))

    with pytest.raises(BootstrapError, match="m0 failed at packages"):
        make(cloud, machines("packages")).start()

    assert cloud.asked == []


def test_the_only_machine_is_replaced_if_it_does_not_boot(make: Start) -> None:
    cluster = make(Cloud(spare("spare")), machines("boot"))

    cluster.start()

    assert cluster.machines == {0: "spare"}


def test_one_that_fails_at_the_image_waits_for_another_to_pass(make: Start) -> None:
    cloud, ready = Cloud(spare("spare")), threading.Event()
    agents = [*machines("packages"), FakeAgent(1, "m1", ready=ready)]
    cluster = make(cloud, agents)
    starting = threading.Thread(target=cluster.start)
    starting.start()
    for agent in agents:
        assert agent.started.wait(30)

    assert cloud.asked == []
    ready.set()
    starting.join(30)

    assert cluster.machines == {0: "spare", 1: "m1"}


def test_a_connection_that_breaks_is_not_blamed_on_the_image(make: Start) -> None:
    class Dropped(FakeAgent):
        async def start(self, heard: Any) -> None:
            raise BootstrapError("m0 lost", machine="m0", step="packages", status=255)

    cluster = make(Cloud(spare("spare")), [Dropped(0, "m0")])

    cluster.start()

    assert cluster.machines == {0: "spare"}


def test_a_machine_that_is_lost_while_others_start_is_replaced(make: Start) -> None:
    cloud, ready = Cloud(spare("spare")), threading.Event()
    agents = [*machines(None, None), FakeAgent(2, "m2", ready=ready)]
    cluster = make(cloud, agents)
    starting = threading.Thread(target=cluster.start)
    starting.start()
    wait_until(lambda: agents[1].commands)  # it has joined

    cluster.loop.add_callback(agents[1].heard, {"event": "ended", "why": "taken away"})
    wait_until(lambda: cloud.asked)
    ready.set()
    starting.join(30)

    # The scheduler may still have workers that are called after the lost node.
    assert cluster.machines == {0: "m0", 3: "spare", 2: "m2"}
    assert cluster.plan == {0, 2, 3}


def test_workers_that_do_not_start_on_one_machine_are_started_on_another(make: Start) -> None:
    cloud, ready = Cloud(spare("spare")), threading.Event()
    agents = [*machines(None, None), FakeAgent(2, "m2", ready=ready)]
    cluster = make(cloud, agents)
    starting = threading.Thread(target=cluster.start)
    starting.start()
    wait_until(lambda: agents[1].commands)

    cluster.loop.add_callback(agents[1].heard, {"event": "failed", "error": "no memory"})
    wait_until(lambda: cloud.asked)
    ready.set()
    starting.join(30)

    assert cluster.plan == {0, 2, 3}


def test_a_start_that_swallows_a_cancellation_ends_all_the_same(make: Start) -> None:
    class Deaf(FakeAgent):
        async def start(self, heard: Any) -> None:
            self.started.set()
            with contextlib.suppress(asyncio.CancelledError):  # as asyncio.wait_for in Python 3.11: cpython issue 86296
                await asyncio.sleep(3600)
            await asyncio.sleep(3600)

    agent = Deaf(0, "m0")
    cluster = make(Cloud(), [agent])

    def start() -> None:
        with pytest.raises(BootstrapError):
            cluster.start()

    starting = threading.Thread(target=start)
    starting.start()
    agent.started.wait(10)

    cluster.abort(BootstrapError("the pool was closed while it started"))
    starting.join(20)

    assert not starting.is_alive()


def test_where_no_replacement_can_be_had_both_reasons_are_told(make: Start) -> None:
    with pytest.raises(BootstrapError) as info:
        make(Cloud(), machines("boot", None, None)).start()

    assert "m0 failed at boot" in str(info.value)
    assert "No other machine could be had in its place: sold out" in str(info.value)


def test_a_timeout_tells_which_machines_have_failed(make: Start) -> None:
    cloud = Cloud(spare("spare", ready=threading.Event()))

    with pytest.raises(PoolTimeoutError, match="These machines had failed:\n  m1 failed at boot"):
        make(cloud, machines(None, "boot"), timeout_s=0.5).start()


def test_a_host_that_fails_is_replaced_by_a_spare_one(make: Start) -> None:
    hosts = Cloud(spare("spare", fails_at="packages"), spare("other"))
    cluster = make(hosts, machines("ssh", None, None, None), hosts=True)

    cluster.start()

    assert cluster.machines[0] == "other"
    assert cluster.listener.of("node_left") == [(0, "m0"), (0, "spare")]
    assert [name for _, name, _ in cluster.listener.of("node_added")] == ["spare", "other"]
    # One that has failed is not taken again.
    assert [used[:2] for _, used in hosts.asked] == [["m0", "m0"], ["m0", "spare"]]


def test_without_a_spare_host_the_start_fails_at_once(make: Start) -> None:
    hosts = Cloud(error=NoMatchingInstanceError("no more hosts"))
    agents = [*machines("packages"), *(FakeAgent(n, f"m{n}", ready=threading.Event()) for n in (1, 2))]

    with pytest.raises(BootstrapError, match="m0 failed at packages"):
        make(hosts, agents, hosts=True).start()

    assert all(agent.stopped.is_set() for agent in agents)


def test_a_further_node_whose_workers_do_not_start_is_left_out(make: Start) -> None:
    made: list[FakeAgent] = []

    def new(node: int) -> FakeAgent:
        made.append(FakeAgent(node, "new"))
        return made[-1]

    cloud = Cloud(new, spare("another"))
    cluster = make(cloud, machines(None))
    cluster.start()
    cluster.scale(2)
    wait_until(lambda: made and made[0].commands)  # it has joined

    cluster.loop.add_callback(made[0].heard, {"event": "failed", "error": "can't reach node 0"})
    wait_until(lambda: cloud.discarded)

    assert cluster.machines == {0: "m0"}
    assert cloud.asked == [([1], ["m0"])]
    (failed,) = cluster.listener.of("machine_failed")
    assert "can't reach node 0" in str(failed[0])


# --- lost, taken away, not wanted ---------------------------------------------------------------------------


@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize("gone", [False, True])
def test_a_machine_that_is_lost_is_replaced(make: Start, gone: bool) -> None:
    cloud, agents = Cloud(spare("spare")), machines(None, None)
    cluster = make(cloud, agents)
    cluster.start()
    worker = cluster.add_worker(1)

    tell(cluster, agents[1], "ended", why="out of reach", gone=gone)
    wait_until(lambda: cluster.listener.of("node_replaced") and cloud.discarded)

    assert cluster.plan == {0, 2}  # the scheduler may still have workers that are called after node 1
    assert cluster.listener.of("node_lost") == [(1, "m1", "out of reach")]
    assert cluster.listener.of("node_replaced") == [(2, "spare", "m1")]
    assert cluster.scheduler_comm.unregistered == [(worker, gone)]
    assert cloud.discarded == ["m1"]


@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize("first", [sold_out, spare("bad", fails_at="boot")], ids=["sold-out", "bad"])
def test_a_replacement_is_looked_for_again(make: Start, first: Callable[[int], FakeAgent]) -> None:
    cloud, agents = Cloud(first, spare("good")), machines(None, None)
    cluster = make(cloud, agents)
    cluster.start()

    tell(cluster, agents[1], "ended", why="out of reach")
    wait_until(lambda: cluster.listener.of("node_replaced"))

    assert cluster.machines == {0: "m0", 2: "good"}


@pytest.mark.usefixtures("prompt")
def test_a_host_that_is_lost_is_replaced_by_a_spare_one(make: Start) -> None:
    hosts, agents = Cloud(spare("spare")), machines(None, None)
    cluster = make(hosts, agents, hosts=True)
    cluster.start()

    tell(cluster, agents[1], "ended", why="out of reach")
    wait_until(lambda: cluster.listener.of("node_replaced"))

    assert cluster.machines == {0: "m0", 2: "spare"}
    assert "m1" in hosts.asked[0][1]  # it is not taken again
    assert cluster.listener.of("node_added") == [(2, "spare", cluster.machine(2))]


@pytest.mark.usefixtures("prompt")
def test_without_a_spare_host_the_cluster_has_fewer_nodes(make: Start) -> None:
    hosts, agents = Cloud(error=NoMatchingInstanceError("no more hosts")), machines(None, None)
    cluster = make(hosts, agents, hosts=True)
    cluster.start()

    tell(cluster, agents[1], "ended", why="out of reach")
    wait_until(lambda: hosts.asked)
    cluster.stop()

    assert cluster.plan == {0}
    assert len(hosts.asked) == 1
    assert cluster.listener.of("cluster_lost") == []


@pytest.mark.usefixtures("prompt")
def test_a_machine_that_will_be_taken_away_ends_its_calls_first(make: Start) -> None:
    cloud, agents = Cloud(spare("spare")), machines(None, None)
    cluster = make(cloud, agents)
    cluster.start()
    stays, leaves = cluster.add_worker(0), cluster.add_worker(1)
    busy = {leaves}
    cluster.busy = lambda: busy

    tell(cluster, agents[1], "notice", seconds=3600)
    wait_until(lambda: cluster.listener.of("node_replaced") and cluster.scheduler_comm.retired)
    assert cluster.scheduler_comm.retired == [leaves]
    assert [slot.address for slot in cluster.slots()] == [stays]  # nothing new for the other
    assert cluster.listener.of("node_lost") == []
    busy.clear()
    wait_until(lambda: cloud.discarded == ["m1"])

    assert cluster.listener.of("node_lost") == [(1, "m1", "its provider took it back")]
    assert cluster.sync(cluster.was_reclaimed, leaves)


@pytest.mark.usefixtures("prompt")
def test_the_only_machine_works_on_after_its_notice_until_another_does(make: Start) -> None:
    ready = threading.Event()
    cloud, agents = Cloud(spare("spare", ready=ready)), machines(None)
    cluster = make(cloud, agents)
    cluster.start()
    leaves = cluster.add_worker(0)
    busy = {leaves}
    cluster.busy = lambda: busy

    tell(cluster, agents[0], "notice", seconds=3600)
    wait_until(lambda: cloud.asked)
    assert [slot.address for slot in cluster.slots()] == [leaves]
    assert (cluster.plan, cluster.expected) == (set(), 1)
    ready.set()
    wait_until(lambda: cluster.listener.of("node_replaced"))
    assert [slot.address for slot in cluster.slots()] == [leaves]  # the other has no worker yet
    comes = cluster.add_worker(1)
    assert [slot.address for slot in cluster.slots()] == [comes]
    wait_until(lambda: cluster.scheduler_comm.retired == [leaves])
    assert cloud.discarded == []  # its last calls may end
    busy.clear()
    wait_until(lambda: cloud.discarded == ["m0"] and cluster.has_scheduler)

    assert cluster.machines == {1: "spare"}
    assert cluster.sync(cluster.was_reclaimed, leaves)


@pytest.mark.usefixtures("prompt")
def test_the_only_machine_gets_nothing_new_shortly_before_it_goes(make: Start) -> None:
    cloud, agents = Cloud(spare("spare", ready=threading.Event())), machines(None)
    cluster = make(cloud, agents)
    cluster.start()
    leaves = cluster.add_worker(0)
    busy = {leaves}
    cluster.busy = lambda: busy

    tell(cluster, agents[0], "notice", seconds=replacement._EVACUATION_MARGIN_S + replacement._LAST_CALLS_S)
    wait_until(lambda: cluster.scheduler_comm.retired == [leaves])

    assert cluster.slots() == []
    assert cluster.listener.of("node_lost") == []  # its last calls may end
    busy.clear()
    wait_until(lambda: cluster.listener.of("node_lost"))


@pytest.mark.usefixtures("prompt")
def test_the_only_machine_may_go_before_its_notice_said(make: Start) -> None:
    ready = threading.Event()
    cloud, agents = Cloud(spare("spare", ready=ready), spare("one too many")), machines(None)
    cluster = make(cloud, agents)
    cluster.start()
    leaves = cluster.add_worker(0)
    tell(cluster, agents[0], "notice", seconds=3600)
    wait_until(lambda: cloud.asked)

    tell(cluster, agents[0], "ended", why="its provider has taken it away", gone=True)
    ready.set()
    wait_until(lambda: cluster.listener.of("node_replaced") and cluster.has_scheduler)

    assert cluster.machines == {1: "spare"}
    assert len(cloud.asked) == 1
    assert cluster.sync(cluster.was_reclaimed, leaves)


@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize(("has_unsent", "seconds"), [(False, 15.0), (True, 45.0)])
def test_a_machine_is_left_in_time_to_send_its_data(make: Start, has_unsent: bool, seconds: float) -> None:
    cloud, agents = Cloud(), machines(None, None)
    agents[1].has_unsent = has_unsent
    cluster = make(cloud, agents)
    cluster.start()
    worker = cluster.add_worker(1)
    cluster.busy = lambda: {worker}

    tell(cluster, agents[1], "notice", seconds=seconds)

    assert agents[1].stopped.wait(20)


def test_metrics_are_told_of_their_node(make: Start) -> None:
    cluster = make(Cloud(), agents := machines(None, None))
    cluster.start()

    tell(cluster, agents[0], "metrics", cpu=1.0)
    wait_until(lambda: cluster.listener.of("node_metrics"))

    assert cluster.listener.of("node_metrics") == [(0, "m0", {"cpu": 1.0})]


def test_a_worker_that_dies_alone_was_not_reclaimed(make: Start) -> None:
    cluster = make(Cloud(), agents := machines(None, None))
    cluster.start()
    worker = cluster.add_worker(1)

    tell(cluster, agents[1], "exited", address=worker, output="last lines")

    assert not cluster.sync(cluster.was_reclaimed, worker)
    assert cluster.listener.of("worker_output") == [("last lines",)]


def test_a_machine_that_is_not_wanted_is_given_back(make: Start) -> None:
    cloud = Cloud()
    cluster = make(cloud, machines(None, None))
    cluster.start()
    worker = cluster.add_worker(1)

    cluster.scale(1)
    wait_until(lambda: cloud.discarded == ["m1"])

    assert cluster.plan == {0}
    assert cluster.sync(cluster.was_reclaimed, worker)
    assert cluster.listener.of("node_lost") == []


# --- the end ------------------------------------------------------------------------------------------------


def test_the_end_stops_a_node_that_is_being_made_ready(make: Start) -> None:
    made: list[FakeAgent] = []

    def new(node: int) -> FakeAgent:
        made.append(FakeAgent(node, "new", ready=threading.Event()))
        return made[-1]

    cluster = make(Cloud(new), machines(None))
    cluster.start()
    cluster.scale(2)
    wait_until(lambda: made and made[0].started.is_set())

    cluster.stop()

    assert made[0].stopped.is_set()


def test_the_end_does_not_wait_for_the_next_try_to_replace_a_machine(
    make: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacement, "_REPLACEMENT_PAUSES_S", (0.0, 3600.0))
    cloud, agents = Cloud(), machines(None, None)
    cluster = make(cloud, agents)
    cluster.start()
    cluster.loop.add_callback(agents[1].heard, {"event": "ended", "why": "taken away", "gone": True})
    wait_until(lambda: cloud.asked)

    cluster.close(timeout=20)  # raises when it takes longer

    assert agents[0].stopped.is_set()


def test_a_cluster_that_has_ended_does_not_grow(make: Start) -> None:
    cloud = Cloud(spare("spare"))
    cluster = make(cloud, machines(None))
    cluster.start()
    cluster.close()

    cluster._scale(2)

    assert cloud.asked == []


def test_a_start_that_is_aborted_fails_at_once(make: Start) -> None:
    agents = [FakeAgent(n, f"m{n}", ready=threading.Event()) for n in range(2)]
    cluster = make(Cloud(), agents)
    starting, failures = begin(cluster)
    assert agents[1].started.wait(30)

    cluster.abort(PoolError("was closed while it started"))
    starting.join(30)

    assert "was closed while it started" in str(failures[0])
    assert all(agent.stopped.is_set() for agent in agents)
