"""Pools on machines reached over SSH, end to end."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import skyward as sky
from tests import hostile
from tests.cloudbox import Machine
from tests.daemons import start_daemon
from tests.engine.test_graph import PROMISED
from tests.joblib.modes import MIB, SEEN, seen
from tests.machines.conftest import IMAGE, Site


@pytest.fixture(scope="module")
def machines(boot: Callable[[int], list[Machine]]) -> list[Machine]:
    return boot(3)


@pytest.fixture(scope="module")
def pool(site: Site, machines: list[Machine]) -> Iterator[sky.ComputePool]:
    provider = site.provider(*machines)
    with sky.ComputePool(
        provider, nodes=3, concurrency=2, image=IMAGE, env={"WHAT": "it's $HOME `x`"}, display="quiet"
    ) as pool:
        yield pool


def test_a_broadcast_reaches_every_machine(pool: sky.ComputePool, machines: list[Machine]) -> None:
    assert sky.compute(socket.gethostname)() @ pool == tuple(m.name for m in machines)
    assert len(sky.compute(socket.gethostname)() @ pool.slots) == 6


def test_a_spare_host_takes_the_place_of_one_that_is_down(site: Site, machines: list[Machine]) -> None:
    up = site.provider(*machines[:2])
    provider = sky.SSH(["root@127.0.0.1:9", *up.hosts], key=site.key, known_hosts=site.known_hosts)
    told: list[Any] = []

    with sky.ComputePool(provider, nodes=2, image=IMAGE, display="quiet", on_event=told.append) as pool:
        assert sky.compute(socket.gethostname)() @ pool == (machines[1].name, machines[0].name)

    (replaced,) = [e for e in told if isinstance(e, sky.InstanceReplaced)]
    assert (replaced.node, replaced.instance_id, replaced.replaced_id) == (0, up.hosts[1], "root@127.0.0.1:9")
    assert any("127.0.0.1" in e.message for e in told if isinstance(e, sky.Error))


class RememberingSVC(SVC):  # type: ignore[misc]
    """Notes on which machine it was fitted. Defined here, so it has to travel."""

    def fit(self, X: Any, y: Any) -> RememberingSVC:
        with Path("/tmp/fits").open("a") as fits:
            fits.write("fit\n")
        super().fit(X, y)
        return self


def test_a_grid_search_uses_all_machines_and_finds_what_a_serial_one_finds(
    pool: sky.ComputePool, machines: list[Machine]
) -> None:
    X, y = load_digits(return_X_y=True)
    grid = {"C": [0.5, 1, 5, 10], "gamma": [0.0005, 0.001, 0.002]}
    serial = GridSearchCV(SVC(), grid, cv=3).fit(X, y)

    with sky.integrations.sklearn_backend(pool):
        parallel = GridSearchCV(RememberingSVC(), grid, cv=3, n_jobs=-1, refit=False).fit(X, y)

    assert parallel.best_params_ == serial.best_params_
    np.testing.assert_array_equal(parallel.cv_results_["mean_test_score"], serial.cv_results_["mean_test_score"])
    fits = [int(m.run("wc -l < /tmp/fits")) for m in machines]
    assert sum(fits) == 36
    assert min(fits) > 0


def test_tasks_of_joblib_see_arrays_as_on_one_machine(pool: sky.ComputePool) -> None:
    with sky.integrations.joblib_backend(pool):
        assert [seen(options, nbytes) for options, nbytes, _ in SEEN] == [how for *_, how in SEEN]
        with pytest.raises(sky.SpecError, match=r"mmap_mode='r\+' is invalid: expected 'r', 'c' or None on a pool"):
            seen({"mmap_mode": "r+"}, 2 * MIB)


def test_every_connection_is_encrypted(pool: sky.ComputePool) -> None:
    workers = pool.client.scheduler_info(n_workers=-1)["workers"]

    assert pool.cluster.scheduler_address.startswith("tls://127.0.0.1:")
    assert all(address.startswith("tls://10.77.") for address in workers)
    assert all(w["nanny"].startswith("tls://") for w in workers.values())


def test_calls_see_where_they_are(pool: sky.ComputePool, machines: list[Machine]) -> None:
    infos = sky.compute(sky.instance_info)() @ pool

    assert [i.node for i in infos if i] == [0, 1, 2]
    assert {i.head_addr for i in infos if i} == {machines[0].address}
    assert [i.id for i in pool.instances] == [f"root@{m.address}" for m in machines]
    assert sky.compute(lambda: sky.shard(list(range(6))))() @ pool == ([0, 3], [1, 4], [2, 5])


def test_a_daemon_without_environment_ends_with_its_pool(
    site: Site, pool: sky.ComputePool, machines: list[Machine]
) -> None:
    stays = sky.compute(start_daemon)() @ pool
    with sky.ComputePool(site.provider(machines[0]), image=IMAGE, display="quiet") as own:
        ends = sky.compute(start_daemon)() >> own
        machines[0].run(f"kill -0 {ends}")

    state = machines[0].run(f"grep -s ^State: /proc/{ends}/status || echo ended").strip()
    assert state == "ended" or "zombie" in state
    machines[0].run(f"kill -0 {stays[0]}")  # another pool's


def test_joblib_counts_the_cores_of_the_slot(pool: sky.ComputePool) -> None:
    def count() -> tuple[int, int]:
        import joblib

        return joblib.cpu_count(), max(1, int(os.environ["SKYWARD_NODE_CORES"]) // 2)

    counted, share = sky.compute(count)() >> pool

    assert counted == share


def test_variables_arrive_as_they_are(pool: sky.ComputePool) -> None:
    assert sky.compute(os.getenv)("WHAT") >> pool == "it's $HOME `x`"


def test_large_arguments_and_results_travel(pool: sky.ComputePool) -> None:
    array = np.arange(4_000_000, dtype=np.float64)

    @sky.compute
    def double(a: Any) -> Any:
        return a * 2

    results = sky.gather(*(double(array) for _ in range(4))) >> pool

    for result in results:
        np.testing.assert_array_equal(result, array * 2)


def test_what_calls_print_comes_back_with_the_machines_name(
    pool: sky.ComputePool, machines: list[Machine]
) -> None:
    lines: list[sky.LogLine] = []
    pool.on(sky.LogLine, lines.append)

    @sky.compute
    def say() -> None:
        subprocess.run(["echo", f"hello from {socket.gethostname()}"], check=True)
        if threading.current_thread() is threading.main_thread():
            print("in the main thread", file=sys.stderr)

    say() @ pool

    said = [(line.node, line.instance_id, line.stream, line.line) for line in lines]
    for i, machine in enumerate(machines):
        assert [line for line in said if line[0] == i] == [
            (i, f"root@{machine.address}", "stdout", f"hello from {machine.name}"),
            (i, f"root@{machine.address}", "stderr", "in the main thread"),
        ]


def test_frozen_exceptions_and_warnings_with_arguments_arrive(pool: sky.ComputePool) -> None:
    with pytest.raises(hostile.FrozenError) as info:
        sky.compute(hostile.raise_one)("frozen") >> pool
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        sky.compute(hostile.warn)("warning") >> pool

    assert info.value == hostile.FrozenError(3)
    assert hostile.VersionWarning in [type(w.message) for w in shown]


def test_a_call_sees_nothing_that_earlier_calls_left(pool: sky.ComputePool) -> None:
    generator = random.Random(0)
    first = random.Random(0).random()
    call = sky.compute(lambda i: generator.random())

    assert sky.gather(*(sky.compute(generator.random)() for _ in range(12))) >> pool == (first,) * 12
    assert sky.gather(*(call(i) for i in range(12))) >> pool == (first,) * 12


@sky.compute
def ticks() -> Iterator[tuple[int, str, int, Any]]:
    try:
        for i in range(1000):
            yield i, socket.gethostname(), os.getpid(), np.full(300_000, i)
    finally:
        Path("/tmp/ticks-closed").touch()


def test_values_of_a_generator_arrive_while_it_runs(pool: sky.ComputePool, machines: list[Machine]) -> None:
    closed = sky.compute(os.path.exists)("/tmp/ticks-closed")

    for i, host, _, array in ticks() >> pool:
        assert host in {m.name for m in machines}
        assert array[-1] == i
        if i == 40:
            break

    assert any(closed @ pool)


def test_a_lost_worker_ends_a_stream(pool: sky.ComputePool) -> None:
    @sky.compute
    def dying() -> Iterator[int]:
        yield 1
        while not Path("/tmp/go").exists():
            time.sleep(0.01)
        os._exit(1)

    values = dying() >> pool

    assert next(values) == 1
    sky.compute(Path.touch)(Path("/tmp/go")) @ pool
    with pytest.raises(sky.WorkerDiedError, match="after its first 1 values; it is not run again"):
        next(values)


def test_an_exception_comes_back_with_the_machine_that_raised_it(
    pool: sky.ComputePool, machines: list[Machine]
) -> None:
    @sky.compute
    def fail() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here") as info:
        fail() >> pool

    assert any(m.address in note or m.name in note for note in info.value.__notes__ for m in machines)


# --- calls that feed calls ----------------------------------------------------------------------------------


@sky.compute
def make(mib: int) -> np.ndarray[Any, Any]:
    return np.ones(mib * MIB // 8)


@sky.compute
def where_sum(array: np.ndarray[Any, Any], *others: Any) -> tuple[str, float]:
    return socket.gethostname(), float(array.sum()) + len(others)


def test_values_go_from_machine_to_machine(pool: sky.ComputePool, machines: list[Machine]) -> None:
    kept = pool.persist(make(8))

    assert where_sum(sky.ref(kept)) @ pool == tuple((m.name, float(MIB)) for m in machines)
    assert {total for _, total in sky.gather(*[where_sum(sky.ref(kept), n) for n in range(6)]) >> pool} == {MIB + 1}


def test_the_promised_lines_run_on_machines(pool: sky.ComputePool) -> None:
    @sky.compute
    def train(rate: float) -> dict[str, float]:
        return {"rate": rate}

    @sky.compute
    def score(model: dict[str, float], part: int) -> float:
        return model["rate"] * part

    names = {"sky": sky, "pool": pool, "train": train, "score": score, "parts": range(1, 4), "holdout": 10}

    exec(PROMISED, names)

    assert names["scores"] == (0.1, 0.2, pytest.approx(0.3))
    assert (names["best"], names["value"]) == (1.0, {"rate": 0.1})


def test_a_graph_takes_large_arguments_to_machines(pool: sky.ComputePool) -> None:
    array = np.ones(MIB)  # of 8 bytes each

    assert (where_sum(array, sky.ref(where_sum(array)), sky.ref(make(1))) >> pool)[1] == MIB + 2


def test_a_kept_value_survives_the_worker_that_holds_it(pool: sky.ComputePool, machines: list[Machine]) -> None:
    kept = pool.persist(make(8))
    assert where_sum(sky.ref(kept)) >> pool
    pids = pool.client.run(os.getpid, workers=next(iter(pool.client.who_has([kept]).values())))

    for machine in machines:
        for pid in pids.values():
            machine.run(f"ps -o args= -p {pid} | grep -q forkserver && kill -KILL {pid}; true")

    assert (where_sum(sky.ref(kept), 1) >> pool)[1] == MIB + 1


def test_a_large_argument_of_a_graph_survives_the_workers_that_have_it(pool: sky.ComputePool, tmp_path: Path) -> None:
    array = np.full(MIB, 3.0)
    total = sky.compute(lambda a, *_: float(a.sum()))

    @sky.compute
    def end_workers(_: Any) -> None:
        """End the process that runs this call, which has the array, the first time on each machine."""
        seen = Path("/tmp/ended-in-graph")
        if not seen.exists():
            seen.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    first = end_workers(array)

    assert sky.gather(total(array, first), total(array, sky.ref(first), 1)) >> pool == (3.0 * MIB, 3.0 * MIB)
