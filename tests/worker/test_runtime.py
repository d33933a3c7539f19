"""On a worker: who am I, and code that is installed nowhere but here."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import skyward as sky


def _info() -> sky.InstanceInfo:
    info = sky.instance_info()
    assert info is not None
    return info


def test_there_is_no_instance_outside_a_pool() -> None:
    assert sky.instance_info() is None
    assert sky.InstanceInfo.current() is None
    assert sky.current_accelerator() is None


def test_a_call_knows_its_node_and_pool(pool: sky.ComputePool) -> None:
    info = sky.compute(_info)() >> pool

    assert info.node in (0, 1)
    assert info.worker == 0
    assert info.total_nodes == 2
    assert info.workers_per_node == 1
    assert info.total_workers == 2
    assert info.peers == ("127.0.0.1", "127.0.0.1")
    assert info.head_addr == "127.0.0.1"
    assert info.network.address == "127.0.0.1"
    assert info.accelerator is None
    assert not info.is_trainium


def test_every_node_of_a_broadcast_has_its_own_part(pool: sky.ComputePool) -> None:
    infos = sky.compute(_info)() @ pool

    assert [i.node for i in infos] == [0, 1]
    assert [i.is_head for i in infos] == [True, False]
    assert len({i.job_id for i in infos}) == 1


def test_every_slot_of_a_broadcast_has_its_own_part(pool: sky.ComputePool) -> None:
    infos = sky.compute(_info)() @ pool.slots

    assert [(i.node, i.worker) for i in infos] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [i.global_worker_index for i in infos] == [0, 1, 2, 3]
    assert {i.total_workers for i in infos} == {4}


def test_parts_of_a_broadcast_start_together(pool: sky.ComputePool, tmp_path: Path) -> None:
    @sky.compute
    def meet() -> int:
        import time

        me = _info()
        (tmp_path / f"{me.node}-{me.worker}").touch()
        deadline = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < 4:  # possible only while all four run at once
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return os.getpid()

    # Other work must not hold one of the parts back for ever.
    busy = [pool.submit(sky.compute(sum)(range(100_000))) for _ in range(50)]

    assert len(set(meet() @ pool.slots)) == 4
    assert all(f.result(timeout=60) for f in busy)


def test_shard_gives_each_part_its_share(pool: sky.ComputePool) -> None:
    data = list(range(10))
    mine = sky.compute(lambda d: sky.shard(d))

    assert mine(data) @ pool == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])
    assert mine(data) @ pool.slots == ([0, 4, 8], [1, 5, 9], [2, 6], [3, 7])
    assert mine(data) >> pool == data


def _run(script: str, folder: Path, *arguments: str) -> str:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    ran = subprocess.run(
        [sys.executable, str(path), *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_functions_and_classes_of_main_travel(tmp_path: Path) -> None:
    out = _run(
        """
        import dataclasses
        import skyward as sky

        FACTOR = 3

        @dataclasses.dataclass
        class Point:
            x: int
            def grown(self): return Point(self.x * FACTOR)

        def helper(p): return p.grown()

        @sky.compute
        def grow(p): return helper(p)

        with sky.ComputePool(provider="local", display="quiet") as pool:
            result = grow(Point(2)) >> pool
            assert type(result) is Point, type(result)
            print(result)
        """,
        tmp_path,
    )

    assert out == "Point(x=6)\n"


def test_a_local_package_that_is_not_installed_travels(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("SCALE = 5\ndef scale(x):\n    return SCALE * x\n")
    (package / "outer.py").write_text(
        "from mine.inner import scale\nclass Model:\n    def run(self, x):\n        return scale(x)\n"
    )

    # The workers must not find it on their import path: it is added to the caller's only after they have started.
    out = _run(
        """
        import os, sys
        import skyward as sky

        here = sys.path.pop(0)
        os.chdir("/")
        with sky.ComputePool(provider="local", display="quiet") as pool:
            try:
                sky.compute(__import__)("mine") >> pool
            except ImportError:
                print("not there")
            sys.path.insert(0, here)
            from mine.outer import Model
            run = sky.compute(lambda m, x: m.run(x))
            print(run(Model(), 4) >> pool)
        """,
        tmp_path,
    )

    assert out == "not there\n20\n"


def test_a_local_module_used_by_name_travels_whatever_else_it_holds(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("from mine import tools\n")
    (package / "tools.py").write_text(
        "import threading, mine\n"
        "lock = threading.Lock()\n"
        "class Shape:\n    pass\n"
        "def double(x):\n    return 2 * x\n"
        "def is_shape(x):\n    return isinstance(x, mine.tools.Shape)\n"
    )

    out = _run(
        """
        import os, sys
        import skyward as sky

        here = sys.path.pop(0)
        os.chdir("/")
        with sky.ComputePool(provider="local", display="quiet") as pool:
            sys.path.insert(0, here)
            import mine
            import mine.tools as tools
            print(sky.compute(lambda x: mine.tools.double(x))(4) >> pool)
            print(sky.compute(lambda s: (isinstance(s, tools.Shape), tools.is_shape(s)))(tools.Shape()) >> pool)
            print(type(sky.compute(lambda: tools.Shape())() >> pool) is tools.Shape)
        """,
        tmp_path,
    )

    assert out == "8\n(True, True)\nTrue\n"


def test_functions_of_a_notebook_like_namespace_travel(tmp_path: Path) -> None:
    out = _run(
        """
        import types, sys
        import skyward as sky

        # What a notebook does: cells are executed in the namespace of a __main__ that has no file.
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec("import skyward as sky\\nimport math", main.__dict__)
        exec("class Shape:\\n    sides = 4\\n", main.__dict__)
        exec("def area(r): return int(math.pi * r ** 2) + Shape.sides", main.__dict__)
        exec("@sky.compute\\ndef run(r): return area(r)", main.__dict__)
        with sky.ComputePool(provider="local", display="quiet") as pool:
            exec("result = run(1) >> sky", main.__dict__)
            print(main.result)
            exec("def area(r): return -r", main.__dict__)  # the cell is edited and run again
            exec("result = run(1) >> sky", main.__dict__)
            print(main.result)
        """,
        tmp_path,
    )

    assert out == "7\n-1\n"


def test_a_local_module_that_was_changed_and_reloaded_is_sent_anew(tmp_path: Path) -> None:
    (tmp_path / "edited.py").write_text("def value():\n    return 1\n")

    out = _run(
        """
        import importlib, pathlib, sys
        import skyward as sky
        sys.dont_write_bytecode = True
        import edited

        call = sky.compute(lambda: edited.value())
        with sky.ComputePool(provider="local", display="quiet") as pool:
            print(call() >> pool)
            pathlib.Path("edited.py").write_text("def value():\\n    return 22\\n")
            importlib.reload(edited)
            print(call() >> pool)
        """,
        tmp_path,
    )

    assert out == "1\n22\n"


def test_large_arrays_arrive_equal_and_read_only(pool: sky.ComputePool) -> None:
    import numpy as np

    array = np.arange(1 << 20, dtype=np.float64)

    @sky.compute
    def look(a: Any) -> tuple[float, bool, Any]:
        return float(a.sum()), bool(a.flags.writeable), a[:10].copy()

    total, writeable, head = look(array) >> pool

    assert total == array.sum()
    assert not writeable
    assert (head == array[:10]).all()


def test_an_array_changed_between_two_calls_is_sent_as_it_is_then(pool: sky.ComputePool) -> None:
    import numpy as np

    array = np.zeros(1 << 20)
    total = sky.compute(lambda a: float(a.sum()))
    before = total(array) >> pool
    array[:] = 1

    assert (before, total(array) >> pool) == (0.0, float(1 << 20))


def test_equal_content_is_stored_once(pool: sky.ComputePool) -> None:
    import numpy as np

    store = pool.engine.store
    array = np.random.default_rng(1234).random(1 << 18)
    size = sky.compute(lambda a, b=None: a.nbytes)
    before = store.writes

    sky.gather(*(size(array) for _ in range(20))) >> pool
    sky.gather(*(size({"nested": [array.copy()]}["nested"][0]) for _ in range(5))) >> pool

    assert store.writes == before + 1


def test_large_results_come_back(pool: sky.ComputePool) -> None:
    import numpy as np

    make = sky.compute(lambda seed: np.random.default_rng(seed).random((1000, 1000)))

    results = sky.gather(*(make(s) for s in range(4))) >> pool

    for seed, result in enumerate(results):
        np.testing.assert_array_equal(result, np.random.default_rng(seed).random((1000, 1000)))


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "LOKY_MAX_CPU_COUNT"])
def test_threads_of_slots_do_not_exceed_the_cores(pool: sky.ComputePool, name: str) -> None:
    import dask.system

    values = sky.compute(lambda: os.environ.get(name))() @ pool.slots

    assert {int(v) for v in values if v} == {max(1, dask.system.CPU_COUNT // 4)}


def test_joblib_counts_the_cores_of_the_slot(pool: sky.ComputePool) -> None:
    import dask.system
    import joblib

    count = sky.compute(lambda: (joblib.cpu_count(), joblib.cpu_count(only_physical_cores=True), os.cpu_count()))
    share, whole = max(1, dask.system.CPU_COUNT // 4), max(1, dask.system.CPU_COUNT // 2)

    assert count() >> pool == (share, share, os.cpu_count())
    assert count() @ pool == ((whole, whole, os.cpu_count()),) * 2


def test_a_part_of_a_node_broadcast_may_use_the_whole_nodes_cores(pool: sky.ComputePool) -> None:
    import dask.system

    def blas_threads() -> list[int]:
        import numpy as np
        import threadpoolctl

        np.zeros((4, 4)) @ np.zeros((4, 4))
        return [p["num_threads"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"]

    alone = sky.compute(blas_threads)() >> pool
    whole = sky.compute(blas_threads)() @ pool

    assert set(alone) <= {max(1, dask.system.CPU_COUNT // 4)}
    assert set().union(*whole) <= {max(1, dask.system.CPU_COUNT // 2)}
