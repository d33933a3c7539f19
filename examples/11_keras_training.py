"""Keras on two nodes that train together: `fit` as usual, each node with its part of the digits.

Needs `pip install keras jax`. Runs on this machine; with ``provider=sky.AWS(), accelerator="T4"`` in the pool, on GPUs.
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

import skyward as sky


@sky.integrations.keras(backend="jax")
@sky.compute
def train(x: np.ndarray, y: np.ndarray, epochs: int) -> list[float]:
    import keras

    x, y = sky.shard(x, y, drop_last=True)  # equally many batches on each node
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10, activation="softmax")]
    )
    model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(x[:896], y[:896], batch_size=32, epochs=epochs, verbose=0)
    return [float(value) for value in history.history["accuracy"]]


def main() -> None:
    x, y = load_digits(return_X_y=True)
    with sky.ComputePool(nodes=2, image=sky.Image(pip=["keras", "jax", "scikit-learn"])) as pool:
        for node, accuracy in enumerate(train((x / 16).astype("float32"), y, epochs=10) @ pool):
            print(f"node {node}: accuracy {accuracy[0]:.3f} → {accuracy[-1]:.3f}")


if __name__ == "__main__":
    main()
