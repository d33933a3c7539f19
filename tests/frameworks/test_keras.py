"""Keras 3 on a pool, data-parallel on each of its backends. On CPUs."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

import skyward as sky

pytest.importorskip("keras", reason="keras is not installed: no wheel for this Python, or not asked for")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras's own
BATCH, FEATURES = 24, 5


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(5 * BATCH, FEATURES)).astype(np.float32)
    return x, (x @ np.arange(1, FEATURES + 1, dtype=np.float32))[:, None]


def fit(x: np.ndarray, y: np.ndarray, batch: int) -> tuple[list[np.ndarray], list[float]]:
    import keras

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    history = model.fit(x, y, batch_size=batch, epochs=3, shuffle=False, verbose=0)
    return model.get_weights(), history.history["loss"]


def train_on(backend: str) -> sky.ComputeFunction:
    @sky.integrations.keras(backend=backend)
    @sky.compute
    def train(x: np.ndarray, y: np.ndarray) -> tuple[str, list[np.ndarray], list[float]]:
        import keras

        info = sky.instance_info()
        assert info is not None
        mine_x, mine_y = sky.shard(x, y)
        return keras.backend.backend(), *fit(np.array(mine_x), np.array(mine_y), BATCH // info.total_workers)

    return train


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_fit_on_three_nodes_is_the_same_as_on_one_with_the_whole_batch(pool: sky.ComputePool, backend: str) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    x, y = data()
    train = train_on(backend)
    with sky.ComputePool(display="quiet") as single:
        _, weights, losses = (train(x, y) @ single)[0]

    results = train(x, y) @ pool

    for name, found, _ in results:
        assert name == backend
        for mine, first, alone in zip(found, results[0][1], weights, strict=True):
            np.testing.assert_array_equal(mine, first)
            np.testing.assert_allclose(mine, alone, atol=1e-5)
    # What each reports is of its own part, on torch; the mean of equal parts is that of the whole.
    np.testing.assert_allclose(np.mean([r[2] for r in results], axis=0), losses, atol=1e-5)


def test_a_worker_that_has_keras_on_another_backend_says_so(pool: sky.ComputePool) -> None:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("jax") is None:
        pytest.skip("torch or jax is not installed")
    x, y = data()
    with sky.ComputePool(display="quiet") as single:
        assert (train_on("jax")(x, y) >> single)[0] == "jax"
        with pytest.raises(sky.SpecError, match=r"backend='torch': Keras runs on 'jax' in this worker"):
            train_on("torch")(x, y) >> single
        assert (train_on("torch")(x, y) @ single)[0][0] == "torch"
