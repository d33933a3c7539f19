"""TensorFlow's MultiWorkerMirroredStrategy on a pool. On CPUs."""

from __future__ import annotations

import numpy as np
import pytest

import skyward as sky

pytest.importorskip("tensorflow", reason="tensorflow is not installed: no wheel for this Python, or not asked for")


@sky.integrations.tensorflow
@sky.compute
def train(x: np.ndarray, y: np.ndarray) -> tuple[int, np.ndarray]:
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        weights = tf.Variable(tf.zeros([x.shape[1]]))
    mine_x, mine_y = sky.shard(x, y)

    @tf.function
    def step(batch_x, batch_y):
        def replica(batch_x, batch_y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((tf.linalg.matvec(batch_x, weights) - batch_y) ** 2)
            (gradient,) = tape.gradient(loss, [weights])
            context = tf.distribute.get_replica_context()
            weights.assign_sub(0.05 * context.all_reduce(tf.distribute.ReduceOp.MEAN, gradient))

        strategy.run(replica, args=(batch_x, batch_y))

    for _ in range(20):
        step(tf.constant(np.array(mine_x)), tf.constant(np.array(mine_y)))
    return strategy.num_replicas_in_sync, weights.numpy()


def test_a_strategy_over_all_nodes_trains_as_one_process_does(pool: sky.ComputePool) -> None:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(24, 5)).astype(np.float32)
    y = (x @ np.arange(1, 6, dtype=np.float32)).astype(np.float32)
    expected = np.zeros(5, np.float32)
    for _ in range(20):
        expected -= 0.05 * 2 / len(x) * x.T @ (x @ expected - y)

    results = train(x, y) @ pool

    for replicas, weights in results:
        assert replicas == 3
        np.testing.assert_array_equal(weights, results[0][1])
        np.testing.assert_allclose(weights, expected, atol=1e-5)
