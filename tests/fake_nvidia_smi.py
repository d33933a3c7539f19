"""A stand-in for ``nvidia-smi`` that keeps the state of its GPUs in a file: MIG modes, partitions, what may fail.

Knows the commands that partition GPUs, and fails at any other. Creating instances is refused where NVIDIA's driver
refuses it: without MIG mode, at a place that is taken, of a profile that there is not.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from skyward.accelerators.catalog import find

STATE = Path(os.environ["FAKE_NVIDIA_SMI"])


def main() -> int:
    state = json.loads(STATE.read_text())
    state["log"].append(" ".join(sys.argv[1:]))
    try:
        return run(sys.argv[1:], state)
    finally:
        STATE.write_text(json.dumps(state))


def run(arguments: list[str], state: dict[str, Any]) -> int:
    match arguments:
        case ["-L"]:
            for index, gpu in enumerate(state["gpus"]):
                print(f"GPU {index}: NVIDIA A100-SXM4-80GB (UUID: GPU-{index})")
                for number, (profile, start) in enumerate(gpu["parts"]):
                    print(f"  MIG {profile:<12}Device {number:>2}: (UUID: MIG-{index}-{start})")
        case ["-i", index, "--query-gpu=mig.mode.current", "--format=csv,noheader"]:
            print(state["gpus"][int(index)]["mode"])
        case ["-i", index, "-mig", "1"]:
            gpu = state["gpus"][int(index)]
            if gpu["mode"] == "[N/A]":
                return fail("Unable to enable MIG Mode for GPU: Not Supported")
            if gpu.get("busy"):
                print("Warning: MIG mode is in pending enable state for GPU: In use by another client")
            else:
                gpu["mode"] = "Enabled"
        case ["-i", index, "--gpu-reset"]:
            gpu = state["gpus"][int(index)]
            if gpu.get("busy") != "for a moment":
                return fail("GPU could not be reset: In use by another client")
            gpu["mode"] = "Enabled"
        case ["mig", "-i", index, "-dci"]:
            if not state["gpus"][int(index)]["parts"]:
                return fail("No compute instances found: Not Found")
        case ["mig", "-i", index, "-dgi"]:
            if not state["gpus"][int(index)]["parts"]:
                return fail("No GPU instances found: Not Found")
            state["gpus"][int(index)]["parts"] = []
        case ["mig", "-i", index, "-cgi", places, "-C"]:
            return create(state["gpus"][int(index)], places.split(","))
        case _:
            return fail(f"unknown command {arguments}")
    return 0


def create(gpu: dict[str, Any], places: list[str]) -> int:
    model = find("A100")
    assert model is not None
    profiles = model.mig[80]
    if gpu["mode"] != "Enabled":
        return fail("Unable to create a GPU instance: MIG mode is not enabled")
    for place in places:
        profile, _, start = place.partition(":")
        taken = {s for p, first in gpu["parts"] for s in range(first, first + profiles[p].memory)}
        mine = set(range(int(start), int(start) + profiles[profile].memory))
        if int(start) not in profiles[profile].starts or mine & taken:
            return fail("Unable to create a GPU instance: Insufficient Resources")
        gpu["parts"].append([profile, int(start)])
    return 0


def fail(message: str) -> int:
    print(message)
    return 6


if __name__ == "__main__":
    sys.exit(main())
