"""The program whose parts the soak kills: a pool on machines, a stream of calls, every result written down at once.

``python client.py FOLDER`` reads ``job.json`` there, appends to ``results`` and says in ``end`` how it ended.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import skyward as sky
from skyward.cluster import remote, ssh


@sky.compute
def work(i: int, data: Any = None) -> tuple[int, int]:
    import random
    import time

    time.sleep(random.Random(i).uniform(0.005, 0.1))
    return i, i * i if data is None else int(data.sum())


def expected(i: int) -> int:
    return i * i if i % 25 else 300_000


def calls(count: int) -> Any:
    import numpy as np

    data = np.ones(300_000)  # 2.4 MB
    for i in range(count):
        yield work(i) if i % 25 else work(i, data)


def main(folder: Path) -> None:
    # A soak has not got the minutes that users give a network to come back.
    remote.UNREACHABLE_S = 8.0
    remote.HEARTBEAT_LOSS_S = 15.0
    remote._STOP_S = 5.0
    ssh._KEEPALIVE_S = 1
    job = json.loads((folder / "job.json").read_text())
    provider = sky.SSH(job["hosts"], key=job["key"], known_hosts=job["known_hosts"])
    image = sky.Image(pip=job["pip"])
    with (
        (folder / "results").open("a", buffering=1) as results,
        sky.ComputePool(provider, nodes=len(job["hosts"]), concurrency=2, image=image, display="quiet") as pool,
    ):
        (folder / "up").touch()
        for result in sky.gather(calls(job["calls"]), stream=True) >> pool:
            results.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    try:
        main(where)
    except BaseException as exc:
        text = f"{type(exc).__name__}: {exc}"
        (where / "end").write_text(json.dumps({"clear": isinstance(exc, sky.SkywardError), "error": text}))
        traceback.print_exc()
        raise
    (where / "end").write_text(json.dumps({"clear": True, "error": None}))
