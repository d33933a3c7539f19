"""Ask for GPUs: each slot sees its own.

On this machine, the pool declares GPUs even if they don't exist, so that you can try the code anywhere;
`SKYWARD_PROVIDER=aws python 3_gpu_accelerators.py` asks for real ones. See what they cost first:
`skyward offers --accelerator T4:4`.
"""

from __future__ import annotations

import os

import skyward as sky


@sky.compute
def which() -> tuple[str | None, str | None]:
    return sky.current_accelerator(), os.environ.get("CUDA_VISIBLE_DEVICES")


def main() -> None:
    provider = os.environ.get("SKYWARD_PROVIDER", "local")
    with sky.ComputePool(
        sky.Local(gpus=4) if provider == "local" else provider,  # type: ignore[arg-type]
        accelerator="T4:4",
        concurrency=2,
        max_price=8.0,  # USD per node and hour: nothing dearer is launched
    ) as pool:
        for slot, (model, devices) in enumerate(which() @ pool.slots):
            print(f"slot {slot}: {model}, devices {devices}")


if __name__ == "__main__":
    main()
