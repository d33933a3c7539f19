"""The joblib backend: what users of `joblib.Parallel` rely on."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from joblib import Parallel, delayed, parallel_config
from joblib._parallel_backends import ThreadingBackend
from skyward_joblib import SkywardBackend

import skyward as sky
from tests.dashboard import names_shown
from tests.hostile import FrozenError, raise_one
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def on_pool(pool: sky.ComputePool) -> Iterator[None]:
    with sky.integrations.joblib_backend(pool):
        yield


def square(x: int) -> int:
    return x * x


def running(folder: Path, i: int, seconds: float) -> int:
    """Return how many of these ran at once, as seen by this one."""
    mark = folder / str(i)
    mark.touch()
    count = len(list(folder.iterdir()))
    time.sleep(seconds)
    mark.unlink()
    return count


# --- the basics ---------------------------------------------------------------------------------------------


def test_results_come_in_order_from_the_workers() -> None:
    assert Parallel()(delayed(square)(i) for i in range(300)) == [i * i for i in range(300)]
    assert os.getpid() not in Parallel(n_jobs=-1)(delayed(os.getpid)() for _ in range(20))


def test_compute_functions_run_as_others_do() -> None:
    assert Parallel()(delayed(sky.compute(square))(i) for i in range(3)) == [0, 1, 4]


def test_minus_one_means_all_slots_and_one_means_here() -> None:
    assert joblib.effective_n_jobs(-1) == 4
    assert joblib.effective_n_jobs(None) == 4
    assert joblib.effective_n_jobs(-2) == 3
    assert joblib.effective_n_jobs(-9) == 1
    assert joblib.effective_n_jobs(8) == 8
    assert Parallel(n_jobs=1)(delayed(os.getpid)() for _ in range(2)) == [os.getpid()] * 2
    with pytest.raises(ValueError, match="n_jobs == 0"):
        Parallel(n_jobs=0)(delayed(square)(i) for i in range(2))


def test_an_explicit_n_jobs_limits_how_many_run_at_once(tmp_path: Path) -> None:
    counts = Parallel(n_jobs=2, batch_size=1)(delayed(running)(tmp_path, i, 0.05) for i in range(20))

    assert max(counts) == 2


def test_all_slots_work_at_once_although_joblib_hands_out_little_ahead(tmp_path: Path) -> None:
    counts = Parallel(n_jobs=-1, batch_size=1)(delayed(running)(tmp_path, i, 0.2) for i in range(24))

    assert max(counts) == 4


def test_many_tiny_tasks_become_few_batches() -> None:
    sent = 0

    class Counting(SkywardBackend):
        def submit(self, func: Any, callback: Any = None) -> Any:
            nonlocal sent
            sent += 1
            return super().submit(func, callback)

    with parallel_config(backend=Counting()):
        assert len(Parallel()(delayed(square)(i) for i in range(20_000))) == 20_000

    assert sent < 1000


@pytest.mark.parametrize("size", [300_000, 1_000_000])  # compared as a whole, and by samples
def test_an_array_changed_between_two_calls_of_one_parallel_arrives(size: int) -> None:
    array = np.zeros(size)

    with Parallel(n_jobs=2) as parallel:
        for i in range(4):
            array[:] = i
            assert parallel(delayed(np.max)(array) for _ in range(2)) == [i, i]


@pytest.mark.parametrize(("seconds", "tasks", "goes_far_ahead"), [(0.0, 20_000, True), (0.03, 100, False)])
def test_short_batches_alone_go_far_ahead(seconds: float, tasks: int, goes_far_ahead: bool) -> None:
    most = 0

    class Counting(SkywardBackend):
        def submit(self, func: Any, callback: Any = None) -> Any:
            nonlocal most
            future = super().submit(func, callback)
            most = max(most, self._in_flight)
            return future

    fn = square if not seconds else time.sleep
    with parallel_config(backend=Counting()):
        Parallel()(delayed(fn)(seconds or i) for i in range(tasks))

    assert (most > 2 * 4) == goes_far_ahead  # joblib has two batches a slot on their way


def test_a_named_backend_serves_one_call_itself_and_gives_others_their_own() -> None:
    with parallel_config(backend=SkywardBackend()) as config:
        first = Parallel(return_as="generator")(delayed(square)(i) for i in range(20))
        second = Parallel(return_as="generator")(delayed(square)(i) for i in range(20))
        serving = config["backend"].parallel
        assert list(first) == list(second) == [i * i for i in range(20)]
        third = Parallel(n_jobs=2)
        third(delayed(square)(i) for i in range(4))

    assert serving is not None
    assert third._backend is config["backend"]
    assert config["backend"].parallel is None


def test_lambdas_closures_and_local_classes_travel() -> None:
    factor = 3

    class Local:
        def __call__(self, x: int) -> int:
            return factor * x

    assert Parallel()(delayed(lambda x: factor * x)(i) for i in range(4)) == [0, 3, 6, 9]
    assert Parallel()(delayed(Local())(i) for i in range(4)) == [0, 3, 6, 9]


# --- ways to get results ------------------------------------------------------------------------------------


def test_generators_give_results_in_order_or_as_they_end() -> None:
    def wait(i: int) -> int:
        time.sleep(1.0 if i == 0 else 0)
        return i

    ordered = Parallel(return_as="generator")(delayed(square)(i) for i in range(20))
    assert next(ordered) == 0
    assert list(ordered) == [i * i for i in range(1, 20)]
    unordered = list(Parallel(return_as="generator_unordered", batch_size=1)(delayed(wait)(i) for i in range(8)))
    assert sorted(unordered) == list(range(8))
    assert unordered[0] != 0


def test_a_call_may_run_while_another_ones_generator_is_read() -> None:
    first = Parallel(return_as="generator")(delayed(square)(i) for i in range(50))
    taken = [next(first) for _ in range(5)]

    inner = Parallel()(delayed(square)(i) for i in range(10))

    assert inner == [i * i for i in range(10)]
    assert taken + list(first) == [i * i for i in range(50)]


def test_a_generator_of_tasks_may_itself_use_the_pool() -> None:
    def tasks() -> Iterator[Any]:
        for i in range(30):
            yield delayed(square)(sum(Parallel()(delayed(square)(k) for k in (i, 1))))

    assert Parallel()(tasks()) == [(i * i + 1) ** 2 for i in range(30)]


def test_a_timeout_ends_the_call_and_frees_the_slots() -> None:
    with pytest.raises(multiprocessing.TimeoutError):  # joblib's own choice
        Parallel(n_jobs=2, timeout=0.5)(delayed(time.sleep)(30) for _ in range(4))

    assert Parallel()(delayed(square)(i) for i in range(8)) == [i * i for i in range(8)]


def test_calls_of_several_threads_do_not_mix(pool: sky.ComputePool) -> None:
    found: dict[int, list[int]] = {}

    def ask(k: int) -> None:
        with sky.integrations.joblib_backend(pool):
            found[k] = Parallel()(delayed(square)(i + k) for i in range(40))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == {k: [(i + k) ** 2 for i in range(40)] for k in range(4)}


# --- failures -----------------------------------------------------------------------------------------------


def test_a_failure_is_raised_unchanged_and_ends_the_rest_on_the_cluster(tmp_path: Path) -> None:
    def work(i: int) -> None:
        if i == 3:
            raise KeyError("the third")
        (tmp_path / f"began-{i}").touch()
        for _ in range(500):
            time.sleep(0.02)
        (tmp_path / f"ended-{i}").touch()

    began = time.monotonic()
    with pytest.raises(KeyError, match="the third") as info:
        Parallel(batch_size=1)(delayed(work)(i) for i in range(100))

    assert isinstance(info.value.__cause__, sky.RemoteTraceback)
    assert Parallel()(delayed(square)(i) for i in range(8)) == [i * i for i in range(8)]
    assert time.monotonic() - began < 9  # it did not wait for those that ran
    assert list(tmp_path.glob("ended-*")) == []
    assert len(list(tmp_path.glob("began-*"))) < 20


def test_an_argument_that_cannot_be_pickled_is_an_error_wherever_it_comes() -> None:
    tasks = [delayed(square)(i) for i in range(50)]

    for place in (0, 40):  # handed out at once, or by joblib's callback much later
        with pytest.raises(pickle.PicklingError, match="lock"):
            Parallel(batch_size=1)([*tasks[:place], delayed(square)(threading.Lock()), *tasks[place:]])

    assert Parallel()(tasks) == [i * i for i in range(50)]


def squares(n: int) -> Iterator[int]:
    yield from (i * i for i in range(n))


@pytest.mark.parametrize("function", [squares, sky.compute(squares)], ids=["plain", "compute"])
def test_a_task_that_returns_a_generator_is_told_what_to_do(function: Any) -> None:
    with pytest.raises(sky.SerializationError, match=r"'generator' object.* Decorate the generator function"):
        Parallel()([delayed(function)(3)])


def test_an_error_in_the_iterator_of_tasks_is_raised_here() -> None:
    def tasks(n: int) -> Iterator[Any]:
        for i in range(n):
            yield delayed(square)(i)
        raise LookupError("no more")

    for n in (0, 3, 60):
        with pytest.raises(LookupError, match="no more"):
            Parallel()(tasks(n))


def test_a_worker_that_dies_costs_no_result(tmp_path: Path) -> None:
    def work(i: int) -> int:
        mark = tmp_path / "died"
        if i == 10 and not mark.exists():
            mark.touch()
            os._exit(1)
        return i

    assert Parallel()(delayed(work)(i) for i in range(100)) == list(range(100))


def test_warnings_of_tasks_are_issued_here() -> None:
    def work(i: int) -> int:
        if i == 5:
            warnings.warn("the fifth", RuntimeWarning, stacklevel=1)
        return i

    with pytest.warns(RuntimeWarning, match="the fifth"):
        Parallel()(delayed(work)(i) for i in range(10))


# --- nesting and threads ------------------------------------------------------------------------------------


def test_nested_work_stays_on_its_slot() -> None:
    def outer(i: int) -> tuple[int, set[int]]:
        inner = Parallel(n_jobs=4)(delayed(os.getpid)() for _ in range(4))
        return os.getpid(), set(inner)

    found = Parallel()(delayed(outer)(i) for i in range(8))

    assert all(inner == {pid} for pid, inner in found)


def test_nested_work_has_the_threads_it_asks_for_or_those_of_its_slot() -> None:
    def outer() -> list[int]:
        found = []
        for n_jobs in (None, 2, -1):
            inner = Parallel(n_jobs=n_jobs)
            found.append(inner._effective_n_jobs())
            assert type(inner._backend) is ThreadingBackend
        return found

    slot = max(1, joblib.cpu_count() // 4)
    assert Parallel(n_jobs=2)(delayed(outer)() for _ in range(2)) == [[1, 2, slot]] * 2


def test_nested_work_may_ask_for_processes_of_its_own() -> None:
    def outer() -> tuple[int, set[int]]:
        return os.getpid(), set(Parallel(n_jobs=2, backend="loky")(delayed(os.getpid)() for _ in range(4)))

    for pid, inner in Parallel(n_jobs=2)(delayed(outer)() for _ in range(2)):
        assert pid not in inner


def test_work_that_needs_shared_memory_runs_on_threads_here(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    Parallel(n_jobs=2, require="sharedmem")(delayed(seen.append)(i) for i in range(4))

    assert sorted(seen) == [0, 1, 2, 3]
    assert not caplog.text  # as with joblib


def test_inner_threads_can_be_limited(pool: sky.ComputePool) -> None:
    def threads() -> list[int]:
        import threadpoolctl

        assert {os.environ[v] for v in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} == {"1"}

        np.zeros((2, 2)) @ np.zeros((2, 2))
        return [p["num_threads"] for p in threadpoolctl.threadpool_info()]

    with parallel_config(backend=SkywardBackend(pool=pool), inner_max_num_threads=1):
        found = Parallel()(delayed(threads)() for _ in range(4))

    assert {n for numbers in found for n in numbers} == {1}


def test_options_without_meaning_here_do_no_harm() -> None:
    with parallel_config(backend="skyward", temp_folder="/tmp", verbose=0):
        assert Parallel(pre_dispatch="n_jobs", prefer="threads")(delayed(square)(i) for i in range(4)) == [0, 1, 4, 9]


# --- large arrays -------------------------------------------------------------------------------------------


def test_a_large_array_is_stored_once_for_all_tasks_and_calls(pool: sky.ComputePool) -> None:
    array = np.random.default_rng(99).random(1 << 19)
    before = pool.engine.store.writes

    for _ in range(3):
        sums = Parallel()(delayed(lambda a, k: float(a["deep"][0].sum()) + k)({"deep": [array]}, k) for k in range(8))
        assert sums == [float(array.sum()) + k for k in range(8)]

    assert pool.engine.store.writes == before + 1


# --- names --------------------------------------------------------------------------------------------------


def test_the_name_skyward_finds_the_active_pool() -> None:
    with parallel_config("skyward", n_jobs=3):
        assert joblib.effective_n_jobs(None) == 3
        assert os.getpid() not in Parallel()(delayed(os.getpid)() for _ in range(4))


def test_the_name_takes_a_pool(pool: sky.ComputePool) -> None:
    with parallel_config("skyward", pool=pool):
        assert Parallel()(delayed(square)(i) for i in range(3)) == [0, 1, 4]
    with pytest.raises(TypeError, match="takes pool= or client=, not colour"):
        parallel_config("skyward", colour="red")


def test_the_dashboard_shows_the_users_function(pool: sky.ComputePool) -> None:
    def a_name_to_be_seen(x: int) -> int:
        return x

    Parallel()(delayed(a_name_to_be_seen)(i) for i in range(3))

    wait_until(lambda: "a_name_to_be_seen" in names_shown(pool.client))


def _run(script: str, folder: Path) -> str:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    ran = subprocess.run([sys.executable, str(path)], cwd=folder, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_backend_name_needs_an_active_pool_and_says_so_without_one(tmp_path: Path) -> None:
    out = _run(
        """
        import skyward as sky
        from joblib import Parallel, delayed, parallel_config

        def double(x): return 2 * x

        class Carried:
            def __init__(self, x): self.x = x

        with sky.ComputePool("local", concurrency=2, display="quiet"), parallel_config("skyward"):
            print(Parallel()(delayed(double)(i) for i in range(3)))
            print(type(Parallel(n_jobs=2)(delayed(Carried)(i) for i in range(3))[0]) is Carried)
        with parallel_config("skyward"):
            try:
                Parallel()(delayed(double)(i) for i in range(3))
            except sky.NoActivePoolError as exc:
                print(exc)
        """,
        tmp_path,
    )

    assert out.startswith("[0, 2, 4]\nTrue\n")
    assert "with sky.integrations.JoblibPool(nodes=2):" in out
    assert "with sky.integrations.joblib_backend(pool):" in out


def test_the_name_takes_the_current_dask_client(tmp_path: Path) -> None:
    out = _run(
        """
        from distributed import Client, LocalCluster
        from joblib import Parallel, delayed, effective_n_jobs, parallel_config
        import skyward_joblib

        def double(x): return 2 * x

        if __name__ == "__main__":
            with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
                with Client(cluster) as client, parallel_config("skyward"):
                    print(effective_n_jobs(), Parallel()(delayed(double)(i) for i in range(3)))
        """,
        tmp_path,
    )

    assert out == "2 [0, 2, 4]\n"


def test_all_jobs_of_a_cluster_without_workers_start_some(tmp_path: Path) -> None:
    out = _run(
        """
        import os
        import time
        from distributed import LocalCluster
        from joblib import Parallel, delayed
        import skyward as sky

        if __name__ == "__main__":
            with LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=":0") as cluster:
                cluster.adapt(minimum=0, maximum=1, interval="20ms")
                with sky.ComputePool(sky.Dask(cluster), display="quiet") as pool:
                    while pool.total_slots:  # the cluster scales back to 0
                        time.sleep(0.02)
                    cluster.adapt(minimum=0, maximum=1, interval="20ms", wait_count=100)
                    with sky.integrations.joblib_backend(pool):
                        pids = Parallel(n_jobs=-1)(delayed(os.getpid)() for _ in range(3))
            print(len(set(pids)), os.getpid() in pids)
        """,
        tmp_path,
    )

    assert out == "1 False\n"


def test_a_frozen_dataclass_is_raised_as_any_other_exception() -> None:
    with pytest.raises(FrozenError) as info:
        Parallel(n_jobs=2)(delayed(raise_one)("frozen") for _ in range(4))

    assert (info.value.code, info.value.text) == (3, "frozen")
