"""A `concurrent.futures.Executor`, for code that takes one."""

from __future__ import annotations

from concurrent.futures import as_completed

import skyward as sky


def cube(n: int) -> int:
    return n**3


def main() -> None:
    with sky.Executor(nodes=2, concurrency=2) as executor:
        print("map:", *executor.map(cube, range(5)))
        futures = {executor.submit(cube, n): n for n in (10, 20, 30)}
        for future in as_completed(futures):
            print(f"{futures[future]} cubed is {future.result()}")


if __name__ == "__main__":
    main()
