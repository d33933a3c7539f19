"""jax.distributed on a pool, with gloo on CPUs."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

import skyward as sky

pytest.importorskip("jax", reason="jax is not installed: no wheel for this Python, or not asked for")

STEPS, BATCH, FEATURES = 6, 24, 5


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(STEPS, BATCH, FEATURES)).astype(np.float32)
    return x, (x @ np.arange(1, FEATURES + 1, dtype=np.float32)).astype(np.float32)


def fit(x: np.ndarray, y: np.ndarray, mean) -> tuple[np.ndarray, list[float]]:
    import jax
    import jax.numpy as jnp

    def loss(w, x, y):
        return jnp.mean((jnp.tanh(x @ w) * 3 - y) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    w, losses = jnp.full(FEATURES, 0.1), []
    for batch_x, batch_y in zip(x, y, strict=True):
        value, gradient = mean(step(w, batch_x, batch_y))
        w = w - 0.05 * gradient
        losses.append(float(value))
    return np.asarray(w), losses


@sky.integrations.jax
@sky.compute
def train(x: np.ndarray, y: np.ndarray) -> tuple[int, np.ndarray, list[float]]:
    import jax
    from jax.experimental import multihost_utils

    rank, size = jax.process_index(), jax.process_count()

    def mean(values):
        return jax.tree.map(lambda v: np.mean(multihost_utils.process_allgather(v), axis=0), values)

    return (len(jax.devices()), *fit(x[:, rank::size], y[:, rank::size], mean))


def test_gradients_that_are_averaged_give_what_one_process_gives(pool: sky.ComputePool) -> None:
    x, y = data()
    weights, losses = fit(x, y, lambda values: values)

    results = train(x, y) @ pool

    for devices, found, curve in results:
        assert devices == 3
        np.testing.assert_array_equal(found, results[0][1])
        np.testing.assert_allclose(found, weights, atol=1e-5)
        np.testing.assert_allclose(curve, losses, atol=1e-5)


def test_psum_goes_over_all_nodes_in_one_job_after_another(pool: sky.ComputePool) -> None:
    @sky.integrations.jax()
    @sky.compute
    def total(value: float) -> float:
        import jax
        import jax.numpy as jnp
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        mesh = Mesh(np.array(jax.devices()), ("nodes",))
        mine = np.array([value * (jax.process_index() + 1)], dtype=np.float32)
        values = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("nodes")), mine)
        summed = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(values)
        return float(summed)

    assert [total(v) @ pool for v in (1.0, 2.0)] == [(6.0,) * 3, (12.0,) * 3]


def test_a_single_call_is_alone(pool: sky.ComputePool) -> None:
    @sky.integrations.jax
    @sky.compute
    def count() -> int:
        import jax

        return jax.process_count()

    assert count() >> pool == 1


@pytest.mark.parametrize("rank", [0, 2])
def test_a_process_that_is_killed_is_told_of(pool: sky.ComputePool, rank: int) -> None:
    @sky.integrations.jax
    @sky.compute
    def die(rank: int) -> None:
        import jax
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("begin")
        if jax.process_index() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        multihost_utils.sync_global_devices("end")

    began = time.monotonic()
    with pytest.raises(sky.WorkerDiedError, match=f"rank {rank} of 3 ended with SIGKILL"):
        die(rank) @ pool

    assert time.monotonic() - began < 60
