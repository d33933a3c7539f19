"""The program whose pool is damaged: sends a stream of small calls and writes down what comes of them.

Run as ``python client.py CONFIG``, a file of JSON that the soak has written. What happens goes line by line into the
file that it names, each line whole or, where the process is killed in between, missing.
"""

from __future__ import annotations

import faulthandler
import json
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import skyward as sky
from skyward.cluster import cluster, remote, ssh
from skyward.spec.image import Image

_LARGE_EVERY = 60
_SHARED_EVERY = 12
_LARGE_BYTES = 3 << 20


@sky.compute
def square(i: int, pause_s: float, data: Any = None) -> tuple[int, int, int]:
    time.sleep(pause_s)
    return i, i * i, 0 if data is None else int(data.sum())


@sky.compute
def full(number: int) -> Any:
    return np.full(_LARGE_BYTES // 8, number, dtype=np.int64)


def calls(count: int, rng: random.Random) -> Iterator[Any]:
    shared: Any = None
    for i in range(count):
        pause_s = rng.choice([0.002, 0.01, 0.03, 0.1])
        if i % _LARGE_EVERY == 0:
            shared = full(i)  # a call, which runs where the first of the others needs it
        if i % _LARGE_EVERY == 7:
            yield square(i, pause_s, full.local(i))
        elif i % _SHARED_EVERY == 5:
            yield square(i, pause_s, shared)
        else:
            yield square(i, pause_s)


def expected(i: int) -> tuple[int, int, int]:
    """Return what call `i` has to give."""
    number = i if i % _LARGE_EVERY == 7 else i - i % _LARGE_EVERY if i % _SHARED_EVERY == 5 else 0
    return i, i * i, number * (_LARGE_BYTES // 8)


def main(config: dict[str, Any]) -> None:
    rng = random.Random(config["seed"])
    remote.UNREACHABLE_S = config["unreachable_s"]
    cluster.START_TIMEOUT_S = config["start_timeout_s"]
    ssh._KEEPALIVE_S = config["keepalive_s"]
    record = Path(config["record"]).open("a", buffering=1)  # noqa: SIM115 - both for as long as we live
    stacks = Path(config["stacks"]).open("w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)

    def say(**facts: Any) -> None:
        record.write(json.dumps(facts) + "\n")

    provider = sky.SSH(config["hosts"], key=config["key"], known_hosts=config["known_hosts"])
    image = Image(pip=config["pip"])
    pool = sky.ComputePool(
        provider, nodes=config["nodes"], concurrency=2, image=image, display="quiet",
        heartbeat_timeout=config["heartbeat_timeout"],
    )  # fmt: skip
    try:
        say(phase="starting")
        with pool:
            say(phase="working")
            stream = sky.gather(calls(config["calls"], rng), stream=True, ordered=rng.random() < 0.5) >> pool
            for result in stream:
                say(result=result)
            say(phase="ending")
        say(phase="done")
    except BaseException as exc:
        say(
            error=type(exc).__name__,
            clear=isinstance(exc, sky.SkywardError),
            text=str(exc),
            traceback=traceback.format_exc()[-8000:],
        )
        raise


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
