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
_FIRST_FIT = """
import sys, time
import skyward_joblib.pools
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score
from benchmarks.case import Peak
from skyward.integrations import ScikitLearnPool

def fit():
    began = time.perf_counter()
    with ScikitLearnPool("local", concurrency=8, display="quiet"):
        cross_val_score(RandomForestClassifier(10), *load_iris(return_X_y=True), cv=8, n_jobs=-1)
        return time.perf_counter() - began

if sys.argv[1] == "no preload":
    skyward_joblib.pools.PRELOAD = ()
if sys.argv[2] == "s":
    print(fit())
else:
    with Peak() as peak:
        fit()
    print(peak.extra_mb)
"""
IMPORTS = {"skyward": "skyward", "Dask": "distributed", "loky": "joblib", "Ray": "ray"}


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:  # noqa: ARG001 - it brings its own
    here = {name: module for name, module in IMPORTS.items() if importlib.util.find_spec(module)}  # Ray may be missing
    first = {name: partial(_first_result, FIRST_RESULT[name]) for name in here}
    yield Row("import and first result", first, targets=(within("Dask", 1.2),))
    for unit, title, factor in (("s", "`with` to first fit", 0.5), ("MB", "memory for the first fit", 0.6)):
        fits = {name: partial(_first_fit, name, unit) for name in ("skyward", "no preload")}
        yield Row(f"ScikitLearnPool, 8 slots: {title}", fits, unit, (within("no preload", factor),))
    times = pick(11, 3)
    imports = {name: partial(_beyond_bare, module, times) for name, module in here.items()}
    yield Row("import, beyond a bare Python", imports, targets=(limit(0.06, "at most 60 ms"),))


def _first_result(code: str) -> float:
    script = _CLOCK + textwrap.dedent(code).format(workers=os.cpu_count())
    return float(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True).stdout)


def _first_fit(name: str, unit: str) -> float:
    command = [sys.executable, "-c", _FIRST_FIT, name, unit]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def _beyond_bare(module: str, times: int) -> float:
    seconds(f"import {module}")  # compiles what has not been
    return statistics.median(seconds(f"import {module}") - seconds("pass") for _ in range(times))


CASE = Case("start", rows, warm_up=False)
