"""From nothing to the first result, and what the imports take, each in fresh processes."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks.case import Case, Pick, Row, limit, within
from benchmarks.import_time import seconds

FIRST_RESULT = {
    "skyward": """
        import skyward as sky
        with sky.ComputePool("local", concurrency={workers}, display="quiet") as pool:
            assert sky.compute(abs)(-1) >> pool == 1
            tell()
    """,
    "Dask": """
        from distributed import Client, LocalCluster
        with LocalCluster(n_workers={workers}, threads_per_worker=1) as cluster, Client(cluster) as client:
            assert client.submit(abs, -1).result() == 1
            tell()
    """,
    "loky": """
        from joblib.externals.loky import get_reusable_executor
        assert get_reusable_executor(max_workers={workers}).submit(abs, -1).result() == 1
        tell()
    """,
    "Ray": """
        import logging, ray
        ray.init(num_cpus={workers}, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        assert ray.get(ray.remote(abs_).remote(-1)) == 1
        tell()
        ray.shutdown()
    """,
}
_CLOCK = """
import time
began = time.perf_counter()
def tell(): print(time.perf_counter() - began, flush=True)
def abs_(x): return abs(x)
"""
IMPORTS = {"skyward": "skyward", "Dask": "distributed", "loky": "joblib", "Ray": "ray"}


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:  # noqa: ARG001 - it brings its own
    here = {name: module for name, module in IMPORTS.items() if importlib.util.find_spec(module)}  # Ray may be missing
    first = {name: partial(_first_result, FIRST_RESULT[name]) for name in here}
    yield Row("import and first result", first, targets=(within("Dask", 1.2),))
    times = pick(11, 3)
    imports = {name: partial(_beyond_bare, module, times) for name, module in here.items()}
    yield Row("import, beyond a bare Python", imports, targets=(limit(0.06, "at most 60 ms"),))


def _first_result(code: str) -> float:
    script = _CLOCK + textwrap.dedent(code).format(workers=os.cpu_count())
    return float(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True).stdout)


def _beyond_bare(module: str, times: int) -> float:
    seconds(f"import {module}")  # compiles what has not been
    return statistics.median(seconds(f"import {module}") - seconds("pass") for _ in range(times))


CASE = Case("start", rows, warm_up=False)
