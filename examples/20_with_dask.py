"""Dask's collections, futures and locks beside the calls of a pool."""

from __future__ import annotations

import dask
import dask.array as da
from distributed import Lock, Variable, as_completed

import skyward as sky


@sky.compute
def square(x: int) -> int:
    return x * x


@sky.compute
def add(x: int) -> None:
    with Lock("total"):  # one for all workers of the pool
        total = Variable("total")
        total.set(total.get() + x)


def main() -> None:
    with sky.ComputePool(nodes=2, concurrency=2) as pool:
        print("array:", da.arange(1000, chunks=100).sum().compute())
        print("delayed:", *dask.compute(*(dask.delayed(square)(x) for x in range(5))))
        futures = pool.client.map(square, range(5))
        print("futures:", sum(future.result() for future in as_completed(futures)))

        total = Variable("total")
        total.set(0)
        sky.gather(*(add(x) for x in range(5))) >> pool
        print("calls with a lock:", total.get())


if __name__ == "__main__":
    main()
