"""Calls that feed calls: a tournament of models whose parts never leave the cluster."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import skyward as sky

Array = npt.NDArray[np.float64]


@sky.compute
def load(seed: int) -> tuple[Array, Array]:
    """Make data as if it were read from a bucket: it stays on the cluster."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20_000, 20))
    return x, x @ np.arange(20) + rng.normal(size=20_000)


@sky.compute
def train(data: tuple[Array, Array], penalty: float) -> Array:
    """Fit a ridge regression."""
    x, y = data
    weights: Array = np.linalg.solve(x.T @ x + penalty * np.eye(20), x.T @ y)
    return weights


@sky.compute
def score(weights: Array, data: tuple[Array, Array]) -> float:
    """Return the mean squared error."""
    x, y = data
    return float(np.mean((x @ weights - y) ** 2))


@sky.compute
def best(scores: tuple[float, ...], penalties: list[float]) -> tuple[float, float]:
    return min(zip(scores, penalties, strict=True))


def main() -> None:
    penalties = [0.1, 1.0, 10.0, 100.0, 10_000.0]
    with sky.ComputePool(nodes=2, concurrency=2) as pool:
        holdout = pool.persist(load(1))  # runs now, and stays
        data = load(0)  # runs once, where it is first needed
        models = [train(sky.ref(data), penalty) for penalty in penalties]
        scores = sky.gather(*[score(sky.ref(model), sky.ref(holdout)) for model in models])

        error, penalty = best(sky.ref(scores), penalties) >> pool  # one pair of numbers comes back

        print(f"best penalty: {penalty:g}, mean squared error: {error:.3f}")


if __name__ == "__main__":
    main()
