"""joblib's `Parallel` on a pool, and code that uses it."""

from __future__ import annotations

import os

from joblib import Parallel, delayed

import skyward as sky


def collatz(n: int) -> tuple[int, int]:
    steps = 0
    while n != 1:
        n, steps = (n // 2 if n % 2 == 0 else 3 * n + 1), steps + 1
    return steps, os.getpid()


def main() -> None:
    with sky.integrations.JoblibPool(nodes=2, concurrency=2):
        found = Parallel(n_jobs=-1)(delayed(collatz)(n) for n in range(1, 5000))
    print(f"longest: {max(steps for steps, _ in found)} steps, on {len({pid for _, pid in found})} processes")


if __name__ == "__main__":
    main()
