"""The cases of `bench.py`, each in a module of its own."""

from benchmarks.case import Case
from benchmarks.cases import (
    array,
    broadcast,
    durations,
    estimators,
    gather,
    graph,
    latency,
    layouts,
    memory,
    method,
    model,
    noops,
    results,
    start,
    stream,
)

_MODULES = (
    latency, gather, graph, durations, noops, array, layouts, memory, method, model, results, broadcast, stream,
    estimators, start,
)  # fmt: skip
CASES: dict[str, Case] = {module.CASE.name: module.CASE for module in _MODULES}
