"""Give every node its part of the data: the same indices for all arrays, every element exactly once."""

from __future__ import annotations

import numpy as np

import skyward as sky


@sky.compute
def mean_of_part(x: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    x, weights = sky.shard(x, weights, shuffle=True, seed=1)
    return float((x * weights).sum()), float(weights.sum())


def main() -> None:
    x, weights = np.random.default_rng(0).normal(3.0, 1.0, 200_000), np.ones(200_000)
    with sky.ComputePool(nodes=4) as pool:
        parts = mean_of_part(x, weights) @ pool
    total = sum(p[0] for p in parts) / sum(p[1] for p in parts)
    print(f"mean of {len(parts)} parts: {total:.6f}, of the whole: {x.mean():.6f}")


if __name__ == "__main__":
    main()
