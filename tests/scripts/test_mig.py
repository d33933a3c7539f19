"""The script that partitions GPUs, run by a shell with a stand-in for ``nvidia-smi``; partitions as workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from skyward.scripts.mig import partition_script
from skyward.scripts.steps import Progress, read_progress

GPU = sky.Accelerator.NVIDIA
ROOT = Path(__file__).parents[2]
SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]
OFF: dict[str, Any] = {"mode": "Disabled", "parts": []}


class Box:
    """A folder that stands for a machine with GPUs: its ``nvidia-smi``, and whether its user is root."""

    def __init__(self, folder: Path, *gpus: dict[str, Any], root: bool = True) -> None:
        self.folder, self.state = folder, folder / "gpus.json"
        self.state.write_text(json.dumps({"gpus": gpus, "log": []}))
        self._command("nvidia-smi", f'exec {sys.executable} {ROOT}/tests/fake_nvidia_smi.py "$@"')
        self._command("id", "echo 0" if root else "echo 1000")
        self._command("sudo", "exit 1")

    def _command(self, name: str, text: str) -> None:
        (self.folder / "bin").mkdir(exist_ok=True)
        (self.folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def partition(
        self, accelerator: sky.Accelerator, *, keep: bool = False, shell: str = "sh"
    ) -> tuple[int, Progress | None]:
        done = subprocess.run(
            [shell],
            input=partition_script(accelerator, keep=keep),
            env={
                "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
                "HOME": str(self.folder),
                "SKYWARD_HOME": str(self.folder / "home"),
                "PYTHONPATH": str(ROOT),
                "FAKE_NVIDIA_SMI": str(self.state),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stderr == ""
        return done.returncode, read_progress(done.stdout.splitlines())

    def parts(self) -> list[list[str]]:
        return [sorted(profile for profile, _ in gpu["parts"]) for gpu in json.loads(self.state.read_text())["gpus"]]

    def changes(self) -> list[str]:
        """Return the commands so far that change something."""
        log: list[str] = json.loads(self.state.read_text())["log"]
        return [line for line in log if line != "-L" and "--query-gpu" not in line]


def failure(found: tuple[int, Progress | None]) -> tuple[int | None, str]:
    """Return the status and the words of a step that failed, as they must have."""
    status, progress = found
    assert status == 1
    assert progress is not None
    assert progress.step == "mig"
    return progress.status, " ".join(progress.lines)


@pytest.mark.parametrize("shell", SHELLS)
def test_all_gpus_are_partitioned_once(tmp_path: Path, shell: str) -> None:
    box, accelerator = Box(tmp_path, OFF, OFF), GPU.A100(2, mig="3g.40gb")

    first = box.partition(accelerator, shell=shell)
    done = box.changes()
    second = box.partition(accelerator, shell=shell)

    assert first == second == (0, Progress("done"))
    assert box.parts() == [["3g.40gb", "3g.40gb"]] * 2
    assert [line for line in done if "-cgi" in line] == [f"mig -i {i} -cgi 3g.40gb:4,3g.40gb:0 -C" for i in (0, 1)]
    assert box.changes() == done


@pytest.mark.parametrize(
    "mig",
    [
        ["4g.40gb", "1g.20gb", "1g.10gb", "1g.10gb"],
        ["2g.20gb", "2g.20gb", "3g.40gb"],
        ["1g.10gb"] * 4 + ["3g.40gb"],
        "1g.10gb",
        "7g.80gb",
    ],
)
def test_any_mix_that_fits_is_placed_so_that_it_fits(tmp_path: Path, mig: str | Sequence[str]) -> None:
    box, accelerator = Box(tmp_path, OFF), GPU.A100(mig=mig)

    assert box.partition(accelerator)[0] == 0
    assert box.parts() == [sorted(accelerator.mig)]


def test_only_the_gpu_that_differs_is_partitioned_again(tmp_path: Path) -> None:
    ready = {"mode": "Enabled", "parts": [["3g.40gb", 0], ["3g.40gb", 4]]}
    half = {"mode": "Enabled", "parts": [["3g.40gb", 4]]}
    box = Box(tmp_path, ready, half)

    assert box.partition(GPU.A100(2, mig="3g.40gb"))[0] == 0

    assert box.parts() == [["3g.40gb", "3g.40gb"]] * 2
    assert box.changes() == ["mig -i 1 -dci", "mig -i 1 -dgi", "mig -i 1 -cgi 3g.40gb:4,3g.40gb:0 -C"]


def test_on_somebodys_host_other_partitions_stay_and_the_way_out_is_told(tmp_path: Path) -> None:
    box = Box(tmp_path, {"mode": "Enabled", "parts": [["7g.80gb", 0]]})

    status, text = failure(box.partition(GPU.A100(mig="3g.40gb"), keep=True))

    assert status == 84
    assert "partitioned into 7g.80gb" in text
    assert "nvidia-smi mig -i 0 -dgi" in text
    assert (box.parts(), box.changes()) == ([["7g.80gb"]], [])


def test_without_root_it_is_told_what_to_run_before(tmp_path: Path) -> None:
    box = Box(tmp_path, OFF, root=False)

    status, text = failure(box.partition(GPU.A100(mig="3g.40gb")))

    assert status == 77
    assert "nvidia-smi mig -i 0 -cgi 3g.40gb:4,3g.40gb:0 -C" in text
    assert box.changes() == []


def test_a_gpu_that_is_partitioned_already_needs_no_root(tmp_path: Path) -> None:
    box = Box(tmp_path, {"mode": "Enabled", "parts": [["3g.40gb", 0], ["3g.40gb", 4]]}, root=False)

    assert box.partition(GPU.A100(mig="3g.40gb"), keep=True)[0] == 0


def test_a_gpu_in_use_is_reset_when_it_is_free(tmp_path: Path) -> None:
    box = Box(tmp_path, {**OFF, "busy": "for a moment"})

    assert box.partition(GPU.A100(mig="7g.80gb"))[0] == 0
    assert "-i 0 --gpu-reset" in box.changes()


@pytest.mark.parametrize("gpu", [{**OFF, "busy": "for long"}, {"mode": "[N/A]", "parts": []}])
def test_a_mode_that_cannot_be_turned_on_is_told_with_what_to_do(tmp_path: Path, gpu: dict[str, Any]) -> None:
    status, text = failure(Box(tmp_path, gpu).partition(GPU.A100(mig="7g.80gb")))

    assert status == 82
    assert "End what nvidia-smi shows" in text


# --- partitions as workers ----------------------------------------------------------------------------------


@sky.compute
def place() -> tuple[int, int, int, int, str]:
    info = sky.instance_info()
    assert info is not None
    return info.node, info.worker, info.workers_per_node, info.accelerators, os.environ["CUDA_VISIBLE_DEVICES"]


@sky.compute
def part_of(items: list[int]) -> list[int]:
    found: list[int] = sky.shard(items)
    return found


def test_a_broadcast_reaches_every_partition_once_and_slots_reach_more() -> None:
    accelerator = GPU.A100(mig="3g.40gb")

    with sky.ComputePool(
        sky.Local(gpus=1), nodes=2, concurrency=2, accelerator=accelerator, display="quiet"
    ) as pool:
        workers, slots = place() @ pool, place() @ pool.slots
        shards = part_of(list(range(8))) @ pool
        alone = part_of([1, 2, 3]) >> pool
        resources = [w["resources"] for w in pool.client.scheduler_info(n_workers=-1)["workers"].values()]
        total = pool.total_slots

    assert workers == tuple((n, w, 2, 1, f"MIG-0-{w}") for n in (0, 1) for w in (0, 1))
    assert [s[4] for s in slots] == ["MIG-0-0", "MIG-0-0", "MIG-0-1", "MIG-0-1"] * 2
    assert {s[2] for s in slots} == {4}
    assert shards == ([0, 4], [1, 5], [2, 6], [3, 7])
    assert alone == [1, 2, 3]
    assert {r["GPU"] for r in resources} == {0.5}
    assert total == 8
