"""The events of a pool: which there are, in which order, and what the progress of calls is."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import joblib
import pytest

import skyward as sky
from skyward.integrations import JoblibPool
from tests.waiting import wait_until


@sky.compute
def double(x: int) -> int:
    return 2 * x


@sky.compute
def fail(x: int) -> int:
    raise ValueError(x)


class Heard:
    """Keeps all events."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __call__(self, event: sky.SkywardEvent) -> None:
        self.events.append(event)

    @property
    def names(self) -> list[str]:
        """What happens to the pool and its machines, by name; the same again only once."""
        names = [type(e).__name__ for e in self.events]
        kept = [n for n in names if n not in ("Metrics", "LogLine", "TaskProgress")]
        return [name for name, _ in itertools.groupby(kept)]

    @property
    def progress(self) -> list[sky.TaskProgress]:
        return [e for e in self.events if isinstance(e, sky.TaskProgress)]


@pytest.fixture
def heard() -> Heard:
    return Heard()


START = [
    "InfraCreating", "InstanceProvisioned", "ProvisioningCompleted", "BootstrapStarting", "BootstrapCompleted",
    "ClusterSetupCompleted", "TaskPoolInitCompleted", "PoolStarted",
]  # fmt: skip


def test_a_local_pool_tells_of_everything_in_order(heard: Heard) -> None:
    with sky.ComputePool("local", nodes=2, concurrency=2, display="quiet", on_event=heard) as pool:
        started = heard.names
        ids = [instance.id for instance in pool.instances]

    assert started == START
    assert heard.names == [*START, "PoolStopping", "InstanceStopping"]
    by_type = {kind: [e for e in heard.events if type(e) is kind] for kind in {type(e) for e in heard.events}}
    assert [(e.instance_id, e.node) for e in by_type[sky.InstanceProvisioned]] == [(ids[0], 0), (ids[1], 1)]
    for kind in (sky.BootstrapStarting, sky.BootstrapCompleted, sky.InstanceStopping):
        assert [e.instance_id for e in by_type[kind]] == ids
    assert by_type[sky.TaskPoolInitCompleted] == [sky.TaskPoolInitCompleted(slots=4)]


def test_a_pool_that_can_not_start_tells_why_before_it_ends(
    heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pool = sky.ComputePool("local", image=sky.Image(pip=["skyward-no-such-thing"]), display="quiet", on_event=heard)

    with pytest.raises(sky.BootstrapError) as info:
        pool.__enter__()

    assert heard.names == [
        "InfraCreating", "InstanceProvisioned", "ProvisioningCompleted", "BootstrapStarting", "BootstrapProgress",
        "Error", "PoolStopping", "InstanceStopping",
    ]  # fmt: skip
    (error,) = (e for e in heard.events if isinstance(e, sky.Error))
    assert error.message == str(info.value)


def test_a_pool_whose_time_is_up_tells_so_before_it_ends(heard: Heard) -> None:
    with sky.ComputePool("local", idle_timeout=0.5, display="quiet", on_event=heard) as pool:
        wait_until(lambda: not pool.is_active)

    assert heard.names == [*START, "Error", "PoolStopping", "InstanceStopping"]


def test_nodes_that_come_and_go_are_told_of(heard: Heard) -> None:
    with sky.ComputePool("local", display="quiet", on_event=heard) as pool:
        pool.scale(2)
        wait_until(lambda: pool.instance_count == 2)
        second = pool.instances[1].id
        pool.scale(1)
        wait_until(lambda: pool.instance_count == 1)

    assert sky.InstanceProvisioned(instance_id=second, node=1, spot=False, provider="local") in heard.events
    assert heard.events.count(sky.InstanceStopping(instance_id=second)) == 1


# --- progress -----------------------------------------------------------------------------------------------


def test_progress_of_a_gather_rises_to_its_end_and_is_told_rarely(heard: Heard) -> None:
    with sky.ComputePool("local", concurrency=2, display="quiet", on_event=heard) as pool:
        assert len(sky.gather(*(double(i) for i in range(20_000))) >> pool) == 20_000

    told = heard.progress
    assert told[-1] == sky.TaskProgress(done=20_000, total=20_000)
    assert [e.done for e in told] == sorted(e.done for e in told)
    assert {e.total for e in told} == {20_000}
    assert len(told) < 50  # a few a second, not one for each chunk or call


def test_progress_of_a_stream_has_no_total_before_its_end(heard: Heard) -> None:
    go_on = threading.Event()

    def calls() -> Any:
        yield from (double(i) for i in range(100))
        go_on.wait(30)
        yield double(1)

    with sky.ComputePool("local", display="quiet", on_event=heard) as pool:
        results = iter(sky.gather(calls(), stream=True) >> pool)
        thread = threading.Thread(target=lambda: wait_until(lambda: heard.progress) or go_on.set())  # type: ignore[func-returns-value]
        thread.start()
        assert sum(results) == 2 * sum(range(100)) + 2
        thread.join()

    assert heard.progress[0].total is None
    assert heard.progress[-1] == sky.TaskProgress(done=101, total=101)


def test_calls_that_fail_are_counted_and_cancelled_ones_are_not(heard: Heard) -> None:
    with sky.ComputePool("local", display="quiet", on_event=heard) as pool:
        sky.gather(double(1), fail(2), fail(3), return_exceptions=True) >> pool
        wait_until(lambda: heard.progress and heard.progress[-1].done == 3)
        assert heard.progress[-1] == sky.TaskProgress(done=3, total=3, failed=2)
        with pytest.raises(ValueError):
            sky.gather(fail(0), *(double(i) for i in range(5000))) >> pool
        wait_until(lambda: heard.progress[-1].failed == 1)

    last = heard.progress[-1]
    assert last.done == last.total
    assert 1 <= last.done < 5001


def test_the_tasks_of_joblib_are_counted_one_by_one(heard: Heard) -> None:
    with JoblibPool(provider="local", concurrency=2, display="quiet", on_event=heard):
        joblib.Parallel(n_jobs=-1)(joblib.delayed(abs)(i) for i in range(3000))

    assert heard.progress[-1] == sky.TaskProgress(done=3000, total=3000)


def test_a_broadcast_and_a_single_call_count_once_each(heard: Heard) -> None:
    with sky.ComputePool("local", nodes=2, display="quiet", on_event=heard) as pool:
        double(1) @ pool
        double(1) >> pool

    ended = [e.done for e in heard.progress if e.done == e.total]
    assert sum(ended) == 2


def test_the_engine_tells_nobody_when_nobody_listens(pool: sky.ComputePool) -> None:
    with sky.ComputePool("local", display="quiet", collect_metrics=False) as quiet:  # nor is there a page of ours
        assert quiet.engine.progress.tell is None
        quiet.on(sky.TaskProgress, lambda _: None)
        assert quiet.engine.progress.tell is not None
