"""Dask beside the calls of a pool: its collections, futures and primitives, and functions of `sky.compute` in it."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import numpy as np

import skyward as sky


@sky.compute
def double(x: Any) -> Any:
    return 2 * x


@sky.compute(timeout=60, retries=1)
async def later(x: int) -> int:
    await asyncio.sleep(0)
    return 3 * x


class Model:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    @sky.compute
    def scale(self, x: int) -> int:
        return self.factor * x


# --- functions of sky.compute in Dask -----------------------------------------------------------------------


def test_dask_runs_compute_functions(any_pool: sky.ComputePool) -> None:
    client = any_pool.client
    functions = [double, later, Model(5).scale, functools.partial(Model(7).scale), sky.compute(lambda x: -x)]

    futures = [client.submit(fn, 2) for fn in functions]

    assert client.gather(futures) == [4, 6, 10, 14, -2]
    assert client.gather(client.map(double, range(4))) == [0, 2, 4, 6]
    assert set(client.run(double, 4).values()) == {8}


def test_dask_collections_run_compute_functions(any_pool: sky.ComputePool) -> None:
    bag = db.from_sequence(range(4), npartitions=2)
    collections = [
        dask.delayed(double)(3),
        bag.map(double),
        bag.groupby(double),  # which toolz calls
        da.arange(4, chunks=2).map_blocks(double),  # which runs here once, to learn its type
    ]

    one, mapped, grouped, blocks = dask.compute(*collections, scheduler=any_pool.client)

    assert one == 6
    assert mapped == [0, 2, 4, 6]
    assert sorted(grouped) == [(2 * x, [x]) for x in range(4)]
    assert np.array_equal(blocks, [0, 2, 4, 6])


def test_a_function_in_dask_makes_calls_as_everywhere(any_pool: sky.ComputePool) -> None:
    def make(x: int) -> str:
        return repr(double(x)) + str(double.local(x))

    assert any_pool.client.submit(make, 4).result(timeout=30) == "<PendingCompute double(...)>8"
