"""A training loop that yields its metrics: they arrive after each epoch, and leaving the loop stops the training.

As a script it prints them. In a notebook with matplotlib it draws them as they arrive.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import skyward as sky

Metrics = dict[str, float]


@sky.compute
def train(rate: float, epochs: int) -> Iterator[Metrics]:
    """Fit a line to noisy points, and yield the loss of each epoch."""
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, 1_000)
    y = 3 * x + 0.5 + random.normal(0, 0.1, x.size)
    slope = offset = 0.0
    try:
        for epoch in range(epochs):
            error = slope * x + offset - y
            slope -= rate * float(np.mean(error * x))
            offset -= rate * float(np.mean(error))
            yield {"epoch": epoch, "loss": float(np.mean(error**2)), "slope": slope, "offset": offset}
    finally:  # also when the caller leaves its loop: the place to save a checkpoint
        print(f"stopped with slope {slope:.2f} and offset {offset:.2f}")


def plot() -> Any:
    """Return a function that draws the losses so far in this notebook's cell; None elsewhere."""
    if "ipykernel" not in sys.modules:
        return None
    try:
        from IPython.display import clear_output, display
        from matplotlib import pyplot
    except ImportError:
        return None

    def draw(losses: list[float]) -> None:
        figure, axes = pyplot.subplots(figsize=(6, 3))
        axes.semilogy(losses)
        axes.set(xlabel="epoch", ylabel="loss")
        clear_output(wait=True)
        display(figure)
        pyplot.close(figure)

    return draw


def main() -> None:
    draw = plot()
    losses: list[float] = []
    with sky.ComputePool():
        for metrics in train(0.5, epochs=100_000) >> sky:
            losses.append(metrics["loss"])
            if draw is not None:
                draw(losses)
            elif metrics["epoch"] % 10 == 0:
                print("epoch {epoch:3}: loss {loss:.4f}".format(**metrics))
            if len(losses) > 1 and losses[-2] - losses[-1] < 1e-6:
                break  # the function gets GeneratorExit where it waits, and its `finally` runs
        print(f"stopped after {len(losses)} epochs")


if __name__ == "__main__":
    main()
