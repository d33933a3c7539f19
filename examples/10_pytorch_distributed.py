"""PyTorch on two nodes that train together: the usual DistributedDataParallel, without torchrun.

Needs `pip install torch`. Runs on this machine; with ``provider=sky.AWS(), accelerator="T4"`` in the pool, on GPUs that
exist only for the training.
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

import skyward as sky


@sky.integrations.torch
@sky.compute
def train(x: np.ndarray, y: np.ndarray, epochs: int) -> tuple[int, float]:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, TensorDataset

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)).to(device)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    dataset = TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(y))
    sampler = sky.DistributedSampler(dataset)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, labels in DataLoader(dataset, batch_size=64, sampler=sampler):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        images, labels = dataset.tensors
        right = (model(images.to(device)).argmax(1).cpu() == labels).float().mean()
    return dist.get_rank(), float(right)


def main() -> None:
    x, y = load_digits(return_X_y=True)
    with sky.ComputePool(nodes=2, image=sky.Image(pip=["torch", "scikit-learn"])) as pool:
        for rank, accuracy in train(x / 16, y, epochs=10) @ pool:
            print(f"rank {rank}: accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
