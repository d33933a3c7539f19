"""Calls as values: what `@sky.compute` makes of a function, and the operators that send calls to a pool."""

from skyward.compute.function import ComputeFunction, compute, lazy, refuse_generator, run_coroutine
from skyward.compute.pending import PendingBatch, PendingCompute, PendingStream, gather, ref

__all__ = [
    "ComputeFunction",
    "PendingBatch",
    "PendingCompute",
    "PendingStream",
    "compute",
    "gather",
    "lazy",
    "ref",
    "refuse_generator",
    "run_coroutine",
]
