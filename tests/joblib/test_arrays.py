"""Options of joblib for large arrays mean on a pool what they mean on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from distributed import LocalCluster
from joblib import Parallel, delayed, parallel_config

import skyward as sky
from skyward.cluster import joined
from tests.joblib.modes import MIB, OWN, SEEN, SHARED, fill, seen


@pytest.fixture(autouse=True)
def on_pool(pool: sky.ComputePool) -> Iterator[None]:
    with sky.integrations.joblib_backend(pool):
        yield


@pytest.mark.parametrize(("options", "nbytes", "how"), SEEN)
def test_a_task_sees_an_array_as_with_joblibs_own_processes(options: dict[str, Any], nbytes: int, how: str) -> None:
    assert seen(options, nbytes) == how


def test_the_options_may_be_set_for_a_block() -> None:
    with parallel_config(max_nbytes=None):
        assert seen({}, 2 * MIB) == OWN
        assert seen({"max_nbytes": "1M"}, 2 * MIB) == SHARED
    with parallel_config(mmap_mode="c"):
        assert seen({}, 2 * MIB) == OWN


def test_arrays_deep_in_arguments_and_in_functions_follow_the_options() -> None:
    array = np.zeros(MIB)

    def write(x: Any) -> list[str]:
        return [fill(x["deep"][0], 1)[0], fill(array, 1)[0]]

    assert Parallel(n_jobs=2, max_nbytes=None)([delayed(write)({"deep": [array + 1]})]) == [[OWN, OWN]]
    assert Parallel(n_jobs=2)([delayed(write)({"deep": [array + 1]})]) == [[SHARED, SHARED]]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("mode", ["r+", "w+"])
def test_with_r_plus_tasks_write_into_one_array_that_is_not_the_callers(mode: str, order: Any) -> None:
    array = np.zeros((512, 512), order=order)

    def mark(a: Any, i: int) -> None:
        a[i, i] = 1

    with Parallel(n_jobs=2, mmap_mode=mode, batch_size=1) as parallel:
        parallel(delayed(mark)(array, i) for i in range(8))
        sums = parallel(delayed(np.sum)(array) for _ in range(4))
    afterwards = Parallel(n_jobs=2, mmap_mode=mode)(delayed(np.sum)(array) for _ in range(2))

    assert sums == [8, 8, 8, 8]
    assert not array.any()
    assert afterwards == [0, 0]


def test_with_r_plus_equal_arrays_are_not_the_same() -> None:
    a, b = np.zeros(MIB), np.zeros(MIB)

    with Parallel(n_jobs=2, mmap_mode="r+") as parallel:
        parallel([delayed(fill)(a, 1)])
        assert parallel([delayed(np.max)(a), delayed(np.max)(b)]) == [1, 0]
    assert Parallel(n_jobs=2)([delayed(np.max)(a)]) == [0]


def test_what_r_plus_has_kept_is_let_go_after_the_call(pool: sky.ComputePool) -> None:
    store = pool.engine.store
    before = sum(store._uses.values())

    Parallel(n_jobs=2, mmap_mode="r+")(delayed(fill)(np.zeros(MIB), 1) for _ in range(3))

    assert sum(store._uses.values()) == before


def test_a_mode_that_numpy_does_not_know_is_refused() -> None:
    with pytest.raises(sky.SpecError, match=r"mmap_mode='x' is invalid: expected 'r', 'r\+', 'w\+', 'c' or None"):
        Parallel(n_jobs=2, mmap_mode="x")(delayed(abs)(i) for i in range(2))


def test_an_option_that_no_backend_knows_is_refused() -> None:
    with pytest.raises(TypeError, match="takes pool= or client=, not n_job"):
        Parallel(n_jobs=2, n_job=3)(delayed(abs)(i) for i in range(2))


@pytest.mark.parametrize("shares_files", [True, False])
def test_a_joined_clusters_tasks_see_arrays_so_too(shares_files: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shares_files:
        prepare = joined.prepare
        monkeypatch.setattr(joined, "prepare", lambda *args, **options: bool(prepare(*args, **options)) and False)

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        sky.integrations.joblib_backend(cluster) as pool,
    ):
        assert (pool.engine.store.has_files) == shares_files
        assert [seen(options, nbytes) for options, nbytes, _ in SEEN] == [how for *_, how in SEEN]
        if not shares_files:
            with pytest.raises(sky.SpecError, match=r"mmap_mode='r\+' is invalid: expected 'r', 'c' or None on a pool"):
                seen({"mmap_mode": "r+"}, 2 * MIB)
