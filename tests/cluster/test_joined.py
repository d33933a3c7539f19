"""`sky.Dask`: a pool on a cluster that is somebody else's, used and left as it was."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

import skyward as sky
from skyward.cluster import joined as joining
from skyward.transfer.wire import AHEAD_VALUES
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


@sky.compute
def double(x: int) -> int:
    return 2 * x


@sky.compute
def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def joined(target: Any, **options: Any) -> sky.ComputePool:
    return sky.ComputePool(sky.Dask(target), display="quiet", **options)


def test_a_cluster_object_an_address_and_a_client_can_be_joined(cluster: LocalCluster) -> None:
    with Client(cluster, set_as_default=False) as client:
        for target in (cluster, cluster.scheduler_address, client):
            with joined(target) as pool:
                assert double(21) >> pool == 42
                assert sky.gather(*(double(i) for i in range(100))) >> pool == tuple(range(0, 200, 2))
                assert pool.total_slots == 2


def test_its_hosts_are_nodes_and_its_threads_slots(cluster: LocalCluster) -> None:
    with joined(cluster) as pool:
        assert pool.instance_count == 1
        assert len(sky.compute(os.getpid)() @ pool) == 1
        assert len(set(sky.compute(os.getpid)() @ pool.slots)) == 2


def test_leaving_leaves_the_cluster_as_it_was(cluster: LocalCluster) -> None:
    with Client(cluster, set_as_default=False) as client:
        before = set(client.scheduler_info(n_workers=-1)["workers"])
        with joined(client) as pool:
            pids = set(sky.compute(os.getpid)() @ pool.slots)
        after = set(client.scheduler_info(n_workers=-1)["workers"])

        assert client.submit(sum, [1, 2]).result(timeout=30) == 3
        assert before == after
        cluster.scale(3)  # its own maker still hears of its workers
        client.wait_for_workers(3, timeout=30)
        wait_until(lambda: len(cluster.scheduler_info["workers"]) == 3)
        cluster.scale(2)
        wait_until(lambda: len(cluster.scheduler_info["workers"]) == 2)
        left = client.run_on_scheduler(lambda dask_scheduler: [*dask_scheduler.plugins, *dask_scheduler.handlers])
        assert [name for name in left if "skyward" in name] == []
        assert set(client.run(os.getpid).values()) == pids


def test_workers_that_come_later_are_used_too(cluster: LocalCluster) -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as own, joined(own) as pool:
        assert pool.total_slots == 1
        own.scale(2)
        wait_until(lambda: pool.total_slots == 2)
        assert len(set(sky.compute(os.getpid)() @ pool.slots)) == 2


def test_exceptions_and_warnings_come_back_here_too(cluster: LocalCluster) -> None:
    def fail() -> None:
        import warnings

        warnings.warn("careful", UserWarning, stacklevel=1)
        raise KeyError("x")

    with (
        joined(cluster) as pool,
        pytest.warns(UserWarning, match="careful"),
        pytest.raises(KeyError) as info,
    ):
        sky.compute(fail)() >> pool

    assert isinstance(info.value.__cause__, sky.RemoteTraceback)


@sky.compute
def ticks(trace: Path) -> Iterator[int]:
    try:
        for i in range(1000):
            with trace.open("a") as file:
                file.write(".")
            yield i
    finally:
        trace.with_suffix(".closed").touch()


def test_values_of_a_generator_arrive_while_it_runs(cluster: LocalCluster, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with joined(cluster) as pool:
        streams = [ticks(tmp_path / name) >> pool for name in ("trace", "other")]

        for _, first, second in zip(range(50), *streams, strict=False):
            assert first == second
            assert trace.stat().st_size <= first + 1 + AHEAD_VALUES
        del streams

        assert trace.with_suffix(".closed").exists()
        assert sky.gather(*(double(i) for i in range(4))) >> pool == (0, 2, 4, 6)
        assert list(count(sky.ref(double(2))) >> pool) == [0, 1, 2, 3]
        array = next(sky.compute(large_values)() >> pool)
        assert array.nbytes == 8 << 20
        assert array[-1] == 1


@sky.compute
def count(n: int) -> Iterator[int]:
    yield from range(n)


def large_values() -> Iterator[Any]:
    yield np.ones(1 << 20)


def test_a_generator_that_computes_is_closed(cluster: LocalCluster, tmp_path: Path) -> None:
    @sky.compute
    def slow() -> Iterator[int]:
        yield 1
        try:
            while True:
                (tmp_path / "computes").touch()
                time.sleep(0.01)
        except GeneratorExit:
            (tmp_path / "closed").touch()
            raise

    with joined(cluster) as pool:
        values: Any = slow() >> pool
        next(values)
        wait_until((tmp_path / "computes").exists)

        values.close()

        assert (tmp_path / "closed").exists()


def test_a_lost_worker_ends_a_stream_and_runs_nothing_twice(tmp_path: Path) -> None:
    @sky.compute
    def identity() -> Iterator[int]:
        (tmp_path / str(os.getpid())).touch()
        yield os.getpid()
        time.sleep(1000)

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        joined(cluster) as pool,
    ):
        values = identity() >> pool
        os.kill(next(values), signal.SIGKILL)

        with pytest.raises(sky.WorkerDiedError, match="after its first 1 values; it is not run again"):
            next(values)
        assert double(1) >> pool == 2
        assert len(list(tmp_path.iterdir())) == 1

        values = identity() >> pool
        next(values)
        cluster.scale(0)  # now there is no worker that Dask could run it on again
        with pytest.raises(sky.WorkerDiedError, match="after its first 1 values; it is not run again"):
            next(values)


def test_large_arrays_reach_the_workers(cluster: LocalCluster) -> None:
    import numpy as np

    array = np.arange(1 << 19)

    with joined(cluster) as pool:
        sums = sky.gather(*(sky.compute(lambda a, k: int(a.sum()) + k)(array, k) for k in range(6))) >> pool

    assert sums == tuple(int(array.sum()) + k for k in range(6))


@pytest.mark.parametrize("sees_files", [True, False])
def test_own_modules_are_imported_by_name_and_again_when_they_change(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees_files: bool
) -> None:
    name = f"own_joined_{sees_files}"
    file = tmp_path / f"{name}.py"
    text = "import enum, os, {0}\nclass Kind(enum.Enum): A = 1\ndef work(k): return k is {0}.Kind.A, k, __file__, {1}"
    file.write_text(text.format(name, 1))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)
    look = joining.prepare
    monkeypatch.setattr(joining, "prepare", lambda *args, **options: look(*args, **options) and sees_files)

    with joined(cluster) as pool:
        first = sky.compute(module.work)(module.Kind.A) >> pool
        everywhere = sky.compute(module.work)(module.Kind.A) @ pool.slots
        file.write_text(text.format(name, 2))
        second = sky.compute(module.work)(module.Kind.A) @ pool.slots

    assert first[::3] == (True, 1)
    assert first[1] is module.Kind.A
    assert (Path(first[2]) == file) is sees_files
    assert [found[::3] for found in everywhere] == [(True, 1)] * 2
    assert [found[::3] for found in second] == [(True, 2)] * 2


def test_cancelling_harms_no_worker_that_is_not_ours(cluster: LocalCluster) -> None:
    with joined(cluster) as pool:
        before = set(sky.compute(os.getpid)() @ pool.slots)
        future = pool.submit(sky.compute(time.sleep)(4))
        while not future.running():
            time.sleep(0.01)
        future.cancel()

        assert set(sky.compute(os.getpid)() @ pool.slots) == before


def test_a_scheduler_that_does_not_answer_is_an_error() -> None:
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(sky.PoolError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"),
    ):
        joined("tcp://127.0.0.1:9").__enter__()


def test_leaving_after_the_cluster_has_ended_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        pool = sky.ComputePool(sky.Dask(cluster), display="quiet")
        pool.__enter__()
        client = pool.client
    wait_until(lambda: client.status == "connecting")

    pool.__exit__(None, None, None)

    assert client.status == "closed"
    assert [r.getMessage() for r in caplog.records if r.name.startswith("distributed.client")] == []


@pytest.mark.parametrize("target", ["nonsense", 5, None])
def test_what_cannot_be_joined_is_told_what_can(target: Any) -> None:
    with pytest.raises(sky.SpecError, match="scheduler address such as"):
        sky.Dask(target)


def test_workers_without_skyward_are_found_before_any_call(cluster: LocalCluster) -> None:
    # A worker of another environment: the same interpreter, with an import path that hides skyward.
    code = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'skyward': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from distributed.cli.dask_worker import main\n"
        "main([sys.argv[1], '--no-nanny', '--nthreads', '1', '--name', 'bare', '--no-dashboard'])\n"
    )
    with (
        LocalCluster(n_workers=0, dashboard_address=":0", processes=True) as empty,
        subprocess.Popen(
            [sys.executable, "-c", code, empty.scheduler_address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as worker,
    ):
        try:
            with pytest.raises(sky.VersionMismatchError, match=r"skyward .*missing") as info:
                joined(empty).__enter__()
        finally:
            worker.terminate()

    assert ("skyward", sky.__version__, "missing") in info.value.table  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("option", "value"),
    [("nodes", 3), ("concurrency", 2), ("accelerator", "A100"), ("cpu", 4), ("env", {"A": "b"})],
)
def test_options_that_would_change_the_workers_are_refused(option: str, value: Any) -> None:
    with pytest.raises(sky.SpecError, match=f"{option}=.*the cluster is used as it is"):
        joined("tcp://127.0.0.1:1", **{option: value})


def test_modules_to_preload_are_refused_with_what_to_do_instead() -> None:
    with pytest.raises(sky.SpecError, match=r"image\.preload=.*start its workers with `dask worker --preload`"):
        joined("tcp://127.0.0.1:1", image=sky.Image(preload=["numpy"]))


def test_packages_that_the_workers_lack_are_told_in_a_table(cluster: LocalCluster) -> None:
    image = sky.Image(pip=("dask>=2024.1", "no-such-package>=3", "not-wanted; python_version < '3'"))

    with (
        pytest.raises(sky.VersionMismatchError, match=r"no-such-package +>=3 +missing") as info,
        joined(cluster, image=image),
    ):
        pass

    assert info.value.table == (("no-such-package", ">=3", "missing"),)


@pytest.fixture
def empty() -> Iterator[LocalCluster]:
    """A cluster without workers, which has none until it is scaled or told to adapt. Its workers are threads."""
    with LocalCluster(n_workers=0, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster:
        yield cluster


def adapt(cluster: LocalCluster, maximum: int = 1, *, wait_count: int = 100) -> None:
    """Scale by demand from 0 workers. An idle worker is ended after 20 ms times `wait_count`."""
    cluster.adapt(minimum=0, maximum=maximum, interval="20ms", wait_count=wait_count)


def scaled_to_zero(cluster: LocalCluster, pool: sky.ComputePool) -> None:
    adapt(cluster, wait_count=1)
    wait_until(lambda: pool.total_slots == 0)
    adapt(cluster)


def tasks(client: Client) -> int:
    """Return how many tasks the scheduler knows of."""
    return int(client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))


def test_a_cluster_that_scales_by_demand_is_joined_without_workers(empty: LocalCluster) -> None:
    adapt(empty)

    with joined(empty, timeout=60) as pool:
        assert double(21) >> pool == 42


def test_calls_start_a_worker_after_a_cluster_scaled_back_to_zero(empty: LocalCluster) -> None:
    import numpy as np

    adapt(empty)
    with joined(empty) as pool:
        scaled_to_zero(empty, pool)
        assert double(21) >> pool == 42

        scaled_to_zero(empty, pool)
        assert sky.compute(np.sum)(np.ones(1 << 19)) >> pool == 1 << 19


def test_a_broadcast_starts_a_worker_of_a_cluster_without_any(empty: LocalCluster) -> None:
    adapt(empty)
    with joined(empty) as pool:
        scaled_to_zero(empty, pool)

        assert list(double(21) @ pool) == [42]


def test_a_cluster_gets_its_second_worker_when_long_calls_wait(empty: LocalCluster, tmp_path: Path) -> None:
    adapt(empty, maximum=2)

    with joined(empty) as pool:
        futures = [pool.submit(wait_for(tmp_path / "go")) for _ in range(4)]
        try:
            wait_until(lambda: pool.total_slots == 2)
        finally:
            (tmp_path / "go").touch()
        for future in futures:
            future.result(60)


def test_a_cluster_gets_its_second_worker_when_short_calls_wait(empty: LocalCluster) -> None:
    empty.adapt(minimum=0, maximum=2, interval="20ms", wait_count=100, target_duration="500ms")

    with joined(empty) as pool:
        sky.compute(time.sleep)(0.1) >> pool  # one worker is enough for this
        assert pool.total_slots == 1

        sky.gather(*(sky.compute(time.sleep)(0.1) for _ in range(20))) >> pool

        assert pool.total_slots == 2


def test_cancelled_calls_do_not_ask_for_workers_any_more(empty: LocalCluster) -> None:
    empty.scale(1)
    with joined(empty) as pool, Client(empty, set_as_default=False) as client:
        empty.scale(0)
        wait_until(lambda: pool.total_slots == 0)
        future = pool.submit(double(21))
        wait_until(lambda: tasks(client) == 2)  # the call, and the wait for a worker

        future.cancel()

        wait_until(lambda: tasks(client) == 0)


def test_a_wait_for_the_first_worker_says_what_it_waits_for(
    empty: LocalCluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "TELL_S", 0.05)

    def told() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == joining.__name__]

    pool = joined(empty)
    with ThreadPoolExecutor(1) as thread:
        entering = thread.submit(pool.__enter__)
        wait_until(lambda: len(told()) == 1)
        empty.scale(1)
        entering.result(60)
    try:
        empty.scale(0)
        wait_until(lambda: pool.total_slots == 0)
        future = pool.submit(double(21))
        wait_until(lambda: len(told()) == 2)
        empty.scale(1)
        assert future.result(60) == 42
    finally:
        pool.__exit__(None, None, None)

    assert all(f"waiting for the first worker of the Dask cluster at {empty.scheduler_address}" in t for t in told())


def test_closing_a_pool_ends_a_start_in_another_thread(empty: LocalCluster) -> None:
    pool = joined(empty, timeout=60)
    with ThreadPoolExecutor(1) as thread, Client(empty, set_as_default=False) as client:
        starting = thread.submit(pool.start)
        wait_until(lambda: tasks(client) == 1)

        pool.close()

        with pytest.raises(sky.PoolError, match="closed while it started"):
            starting.result(60)
    assert not pool.is_active


def test_a_task_that_is_cancelled_while_it_enters_leaves_nothing(empty: LocalCluster) -> None:
    pool = joined(empty, timeout=60)

    async def enter() -> None:
        async with pool:
            pass

    async def main(client: Client) -> bool:
        entering = asyncio.create_task(enter())
        await asyncio.to_thread(wait_until, lambda: tasks(client) == 1)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        return pool.is_active

    with Client(empty, set_as_default=False) as client:
        assert not asyncio.run(main(client))


def test_a_pool_whose_timeout_passes_without_a_worker_is_an_error(empty: LocalCluster) -> None:
    with pytest.raises(sky.PoolTimeoutError, match=r"had no worker within the pool's timeout of 0\.2 s"):
        joined(empty, timeout=0.2).__enter__()


def test_a_cluster_that_ends_while_its_first_worker_is_waited_for(empty: LocalCluster) -> None:
    pool = joined(empty)
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "5s"}),
        ThreadPoolExecutor(1) as thread,
        Client(empty, set_as_default=False) as client,
    ):
        entering = thread.submit(pool.__enter__)
        wait_until(lambda: tasks(client) == 1)
        empty.close()

        with pytest.raises(sky.PoolError, match="ended before it had a worker"):
            entering.result(60)
