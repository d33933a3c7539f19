"""Use two pools: small machines prepare the data, a large one trains. Both start and stop in parallel."""

from __future__ import annotations

import skyward as sky


@sky.compute
def prepare(seed: int) -> list[float]:
    return [((seed * 7919 + i * 104_729) % 1000) / 1000 for i in range(1000)]


@sky.compute
def train(parts: list[list[float]]) -> float:
    values = [v for part in parts for v in part]
    return sum(values) / len(values)


def main() -> None:
    small = sky.ComputePool(nodes=2)
    large = sky.ComputePool(nodes=1)
    with sky.MultiPool(small, large) as (preparing, training):
        parts = sky.gather(*(prepare(seed) for seed in range(8))) >> preparing
        print(f"mean: {train(list(parts)) >> training:.4f}")


if __name__ == "__main__":
    main()
