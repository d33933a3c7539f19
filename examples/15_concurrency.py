"""How many calls run at once: nodes × concurrency; and threads of this process, each of which waits for a call."""

from __future__ import annotations

import os
import time

import skyward as sky


@sky.compute
def wait(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def main() -> None:
    with sky.ComputePool(nodes=2, concurrency=3) as pool:
        processes = sky.gather(*(wait(0.2) for _ in range(12))) >> pool
        print(f"{len(processes)} calls in {len(set(processes))} processes")

        # Each thread sends a call and goes on with its result; the current pool is known in all of them.
        lengths = sky.conc.map_async(lambda n: len(str(wait(n / 100) >> sky)), range(6), concurrency=6)
        print(f"{len(list(lengths))} results by way of threads")


if __name__ == "__main__":
    main()
