"""Calls as values: what `@sky.compute` makes of a function, and the operators that send calls to a pool."""

from skyward.compute.function import ComputeFunction, compute, is_generator_function, lazy, run_coroutine
from skyward.compute.pending import (
    PendingBatch,
    PendingCompute,
    PendingGenerator,
    PendingStream,
    gather,
    one_value,
    ref,
)

__all__ = [
    "ComputeFunction",
    "PendingBatch",
    "PendingCompute",
    "PendingGenerator",
    "PendingStream",
    "compute",
    "gather",
    "is_generator_function",
    "lazy",
    "one_value",
    "ref",
    "run_coroutine",
]
