"""torch.distributed on a pool: process groups, DDP, failures. With gloo, on CPUs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import skyward as sky

torch = pytest.importorskip("torch", reason="torch is not installed: no wheel for this Python, or not asked for")

STEPS, BATCH, FEATURES = 6, 24, 5


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(STEPS * BATCH, FEATURES)).astype(np.float32)
    y = (x @ np.arange(1, FEATURES + 1, dtype=np.float32) + 0.1 * rng.normal(size=len(x))).astype(np.float32)
    return x, y[:, None]


def model() -> Any:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def fit(net: Any, x: np.ndarray, y: np.ndarray, batch: int) -> list[float]:
    """Return the losses of steps on whole batches, in order."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for start in range(0, len(x), batch):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(
            net(torch.from_numpy(x[start : start + batch])), torch.from_numpy(y[start : start + batch])
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(net: Any) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in net.parameters()])


@sky.integrations.torch(backend="gloo")
@sky.compute
def train(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, list[float]]:
    import torch.distributed as dist

    # Every third row: of each whole batch, each rank has its share.
    mine_x, mine_y = sky.shard(x, y)
    net = torch.nn.parallel.DistributedDataParallel(model())
    losses = torch.tensor(fit(net, np.array(mine_x), np.array(mine_y), BATCH // dist.get_world_size()))
    dist.all_reduce(losses)
    return weights(net.module), (losses / dist.get_world_size()).tolist()


def test_ddp_on_three_nodes_is_the_same_as_one_process_on_the_whole_batch(pool: sky.ComputePool) -> None:
    x, y = data()
    alone = model()
    expected = fit(alone, x, y, BATCH)

    results = train(x, y) @ pool

    for found, losses in results:
        np.testing.assert_array_equal(found, results[0][0])
        np.testing.assert_allclose(found, weights(alone), atol=1e-5)
        np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_collectives_work_in_one_job_after_another_and_end_with_it(pool: sky.ComputePool) -> None:
    @sky.compute
    @sky.integrations.torch
    def total(value: float) -> tuple[float, str]:
        import torch.distributed as dist

        summed = torch.tensor([value * (dist.get_rank() + 1)])
        dist.all_reduce(summed)
        dist.barrier()
        return summed.item(), dist.get_backend()

    assert [total(v) @ pool for v in (1.0, 2.0)] == [((6.0, "gloo"),) * 3, ((12.0, "gloo"),) * 3]


def test_two_pools_train_at_once(pool: sky.ComputePool) -> None:
    from concurrent.futures import ThreadPoolExecutor

    @sky.integrations.torch
    @sky.compute
    def size() -> float:
        import torch.distributed as dist

        ones = torch.ones(1)
        dist.all_reduce(ones)
        return ones.item()

    with sky.ComputePool(nodes=2, display="quiet") as other, ThreadPoolExecutor(2) as threads:
        here, there = threads.submit(lambda: size() @ pool), threads.submit(lambda: size() @ other)

        assert (here.result(), there.result()) == ((3.0,) * 3, (2.0,) * 2)


def test_a_call_under_run_is_a_world_of_one_whose_group_ends(pool: sky.ComputePool) -> None:
    @sky.integrations.torch
    @sky.compute
    def alone(fail: bool) -> tuple[int, int]:
        import torch.distributed as dist

        if fail:
            raise ValueError("in the middle")
        return dist.get_rank(), dist.get_world_size()

    @sky.compute
    def is_begun() -> bool:
        import torch.distributed as dist

        return dist.is_initialized()

    assert alone(False) >> pool == (0, 1)
    with pytest.raises(ValueError, match="in the middle"):
        alone(True) >> pool
    assert not any(is_begun() @ pool)
    assert sky.gather(*(alone(False) for _ in range(6))) >> pool == ((0, 1),) * 6


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_of_one_rank_is_raised_though_others_wait_for_it(pool: sky.ComputePool, rank: int) -> None:
    @sky.integrations.torch
    @sky.compute
    def fail(rank: int) -> None:
        import torch.distributed as dist

        dist.all_reduce(torch.ones(1))
        if dist.get_rank() == rank:
            raise ValueError(f"rank {rank} diverged")
        dist.all_reduce(torch.ones(1))

    with pytest.raises(ValueError, match=f"rank {rank} diverged"):
        fail(rank) @ pool

    x, y = data()
    assert len(train(x, y) @ pool) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_in_training_is_told_of_within_ten_seconds(
    pool: sky.ComputePool, rank: int, tmp_path: Path
) -> None:
    @sky.integrations.torch
    @sky.compute
    def train_for_ever(folder: Path) -> None:
        import torch.distributed as dist

        net = torch.nn.parallel.DistributedDataParallel(model())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for step in range(10_000):
            net(torch.ones(4, FEATURES)).sum().backward()
            optimizer.step()
            if step == 5:
                (folder / str(dist.get_rank())).write_text(str(os.getpid()))
            time.sleep(0.01)

    future = pool_in_thread(lambda: train_for_ever(tmp_path) @ pool)
    victim = tmp_path / str(rank)
    deadline = time.monotonic() + 60
    while not (victim.exists() and victim.read_text()):
        assert time.monotonic() < deadline
        assert not future.done(), future
        time.sleep(0.02)
    os.kill(int(victim.read_text()), signal.SIGKILL)
    killed = time.monotonic()

    with pytest.raises(sky.WorkerDiedError, match=f"rank {rank} of 3 ended with SIGKILL"):
        future.result(timeout=60)

    assert time.monotonic() - killed < 10  # what is promised
    x, y = data()
    assert len(train(x, y) @ pool) == 3


def pool_in_thread(job: Any) -> Any:
    from concurrent.futures import ThreadPoolExecutor

    threads = ThreadPoolExecutor(1)
    try:
        return threads.submit(job)
    finally:
        threads.shutdown(wait=False)


def test_training_goes_on_from_a_checkpoint_after_a_rank_was_lost(pool: sky.ComputePool, tmp_path: Path) -> None:
    @sky.integrations.torch
    @sky.compute
    def train_on(folder: Path, epochs: int) -> list[int]:
        import torch.distributed as dist

        net = model()
        state = folder / "state.pt"
        first = 0
        if state.exists():
            saved = torch.load(state)
            net.load_state_dict(saved["model"])
            first = saved["epoch"]
        dist.barrier()  # nobody writes before all have read
        trained = []
        for epoch in range(first, epochs):
            if epoch == 2 and dist.get_rank() == 1 and not (folder / "lost").exists():
                (folder / "lost").touch()
                os.kill(os.getppid(), signal.SIGKILL)  # as a machine that is taken away
                time.sleep(60)
            trained.append(epoch)
            if dist.get_rank() == 0:
                partial = state.with_suffix(".part")
                torch.save({"model": net.state_dict(), "epoch": epoch + 1}, partial)
                partial.replace(state)
            dist.barrier()
        return trained

    with pytest.raises(sky.MachineLostError):
        train_on(tmp_path, 4) @ pool

    results = train_on(tmp_path, 4) @ pool

    # Rank 0 may or may not have written the epoch in which the other was lost; nobody begins anew, and all agree.
    assert results in (([2, 3],) * 3, ([3],) * 3)


def test_nccl_without_a_gpu_is_refused_with_what_to_do(pool: sky.ComputePool) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")

    @sky.integrations.torch(backend="nccl")
    @sky.compute
    def train() -> None: ...

    with pytest.raises(sky.SpecError, match=r"backend='nccl': torch .* sees no GPU"):
        train() @ pool
    with pytest.raises(sky.SpecError, match=r"backend='nccl': torch .* sees no GPU"):
        train() >> pool


def test_shards_of_tensors_are_tensors_and_samplers_feed_data_loaders(pool: sky.ComputePool) -> None:
    @sky.integrations.torch
    @sky.compute
    def seen(length: int, drop_last: bool) -> tuple[list[int], list[list[int]], int]:
        from torch.utils.data import DataLoader, TensorDataset

        part = sky.shard(torch.arange(7))
        assert isinstance(part, torch.Tensor)
        dataset = TensorDataset(torch.arange(length))
        sampler = sky.DistributedSampler(dataset, drop_last=drop_last)
        loader = DataLoader(dataset, batch_size=2, sampler=sampler)
        epochs = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            epochs.append([int(v) for (batch,) in loader for v in batch])
        return part.tolist(), epochs, len(sampler)

    filled, dropped = seen(10, False) @ pool, seen(10, True) @ pool

    assert [f[0] for f in filled] == [[0, 3, 6], [1, 4], [2, 5]]
    for results, length in ((filled, 4), (dropped, 3)):
        assert all(r[2] == length and all(len(e) == length for e in r[1]) for r in results)
        for epoch in range(2):
            everything = sorted(v for r in results for v in r[1][epoch])
            assert set(everything) == set(range(10)) if length == 4 else len(set(everything)) == 9
        assert results[0][1][0] != results[0][1][1], "epochs have orders of their own"
