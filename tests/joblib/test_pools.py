"""`JoblibPool` and `ScikitLearnPool`: pools that joblib uses by itself."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import time
from concurrent.futures import ThreadPoolExecutor

import joblib
import pytest
from distributed import Client, LocalCluster
from joblib import Parallel, delayed
from skyward_joblib import SkywardBackend

import skyward as sky
from skyward.integrations import JoblibPool, ScikitLearnPool, joblib_backend, sklearn_backend
from tests.waiting import wait_until


def default_backend() -> str:
    return type(joblib.parallel.get_active_backend()[0]).__name__


def test_joblib_uses_the_pool_inside_its_block_and_not_after() -> None:
    before = default_backend()
    pool = JoblibPool("local", concurrency=2, display="quiet")

    for _ in range(2):
        with pool as entered:
            assert entered is pool
            assert isinstance(joblib.parallel.get_active_backend()[0], SkywardBackend)
            assert os.getpid() not in Parallel()(delayed(os.getpid)() for _ in range(4))
            with ThreadPoolExecutor(1) as executor:
                assert executor.submit(joblib.effective_n_jobs, -1).result() == 2
            assert sky.compute(pow)(2, 3) >> sky == 8
        assert default_backend() == before
        assert not pool.is_active


def test_start_and_close_do_what_entering_and_leaving_do() -> None:
    before = default_backend()

    pool = JoblibPool("local", display="quiet").start()
    inside = joblib.parallel.get_active_backend()[0]
    pool.close()

    assert isinstance(inside, SkywardBackend)
    assert default_backend() == before


def test_it_works_in_coroutines_too() -> None:
    async def main() -> list[int]:
        async with JoblibPool("local", concurrency=2, display="quiet"):
            return list(Parallel()(delayed(pow)(i, 2) for i in range(3)))

    assert asyncio.run(main()) == [0, 1, 4]


def test_an_exception_in_the_block_restores_joblibs_default() -> None:
    before = default_backend()

    with pytest.raises(ZeroDivisionError), JoblibPool("local", display="quiet"):
        _ = 1 / 0

    assert default_backend() == before


def test_the_image_has_the_version_that_is_installed_here() -> None:
    joblib_here = importlib.metadata.version("joblib")
    sklearn_here = importlib.metadata.version("scikit-learn")

    pool = ScikitLearnPool("local", image=sky.Image(pip=["pandas"]), sklearn_version=sklearn_here)

    assert set(pool.spec.image.pip) == {"pandas", f"joblib=={joblib_here}", f"scikit-learn=={sklearn_here}"}


def test_only_machines_of_the_pool_preload_what_scikit_learn_needs() -> None:
    image = sky.Image(preload=["pandas"])

    assert ScikitLearnPool("local", image=image).spec.image.preload == ("sklearn.ensemble", "pandas")
    assert ScikitLearnPool(sky.Dask("tcp://127.0.0.1:1")).spec.image.preload == ()
    assert JoblibPool("local").spec.image.preload == ()


def test_a_version_other_than_the_local_one_is_refused_before_the_start() -> None:
    with pytest.raises(sky.VersionMismatchError, match=r"joblib_version='0\.1', but joblib .* is installed here"):
        JoblibPool("local", joblib_version="0.1")
    with pytest.raises(sky.VersionMismatchError, match=r"pip install scikit-learn==0\.1"):
        ScikitLearnPool("local", sklearn_version="0.1")


def test_bad_options_are_found_as_in_any_pool() -> None:
    with pytest.raises(sky.SpecError, match="nodes=0"):
        ScikitLearnPool("local", nodes=0)
    with pytest.raises(sky.SpecError, match="image="):
        JoblibPool("local", image="python:3.12")  # type: ignore[arg-type]


def test_slots_that_come_while_a_call_runs_are_used() -> None:
    with JoblibPool("local", nodes=1, concurrency=1, display="quiet") as pool:
        pool.scale(2)
        wait_until(lambda: pool.total_slots == 2)
        assert joblib.effective_n_jobs(-1) == 2
        found = set()
        results = Parallel(n_jobs=-1, batch_size=1, return_as="generator")(
            delayed(lambda: time.sleep(0.2) or os.getpid())() for _ in range(40)
        )
        found.add(next(results))
        pool.scale(3)
        found.update(results)

    assert len(found) == 3


def test_a_pool_that_is_not_active_is_told_so() -> None:
    with pytest.raises(sky.NoActivePoolError, match="only inside its `with` block"), joblib_backend(
        sky.ComputePool("local")
    ):
        pass


def test_a_dask_cluster_can_be_used_and_is_left_as_it_was() -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        for target in (cluster, client):
            with sklearn_backend(target):
                assert joblib.effective_n_jobs() == 2
                assert Parallel()(delayed(pow)(i, 2) for i in range(50)) == [i * i for i in range(50)]
        with joblib.parallel_config("skyward", client=client):
            assert Parallel()(delayed(pow)(i, 2) for i in range(5)) == [0, 1, 4, 9, 16]
        assert client.submit(pow, 2, 3).result(timeout=30) == 8
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2
