"""A bucket as a folder on every machine: read data from it, write results to it.

`BUCKET=my-bucket python 8_s3_volumes.py` mounts `s3://my-bucket/results` at /results on AWS, with the machines' own
role and no keys on them. Without it, the example uses a plain folder on this machine.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import skyward as sky


@sky.compute
def write(folder: Path) -> str:
    info = sky.instance_info()
    assert info is not None
    path = folder / f"node-{info.node}.txt"
    path.write_text(f"written by node {info.node}\n")
    return path.name


def main() -> None:
    bucket = os.environ.get("BUCKET")
    if bucket is None:
        with tempfile.TemporaryDirectory() as folder, sky.ComputePool("local", nodes=2) as pool:
            print("written:", *(write(Path(folder)) @ pool))
            print("read here:", *(p.read_text().strip() for p in sorted(Path(folder).iterdir())), sep="\n  ")
        return
    volume = sky.S3Volume("/results", bucket, prefix="results", read_only=False)
    with sky.ComputePool(sky.AWS(), nodes=2, volume=[volume]) as pool:
        print("written:", *(write(Path("/results")) @ pool))


if __name__ == "__main__":
    main()
