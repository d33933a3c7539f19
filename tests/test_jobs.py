"""Jobs: broadcasts whose parts run in processes of their own. With a set-up that needs no framework."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import skyward as sky
from skyward.integrations.frameworks import Distributed
from skyward.integrations.setup.torch import device_of
from skyward.transfer.wire import Isolation
from skyward.worker import participant
from skyward.worker.context import Peer, World

PLAIN = Isolation("tests.plain_setup", {}, ())


def job(fn):
    return sky.compute(Distributed(fn, PLAIN))


@pytest.fixture(scope="module")
def pool() -> Iterator[sky.ComputePool]:
    with sky.ComputePool(nodes=3, display="quiet") as pool:
        yield pool


def test_every_part_has_a_process_of_its_own_and_knows_the_others(pool: sky.ComputePool) -> None:
    @job
    def who() -> tuple[int, int, dict[str, str], tuple[int, ...], list[int]]:
        info = sky.instance_info()
        assert info is not None
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
        here = {name: os.environ[name] for name in names}
        return os.getpid(), os.getppid(), here, (info.node, info.total_nodes), sky.shard(list(range(7)))

    @sky.compute
    def worker() -> int:
        return os.getpid()

    first, second = who() @ pool, who() @ pool

    assert [w[1] for w in first] == list(worker() @ pool)
    assert not {w[0] for w in first} & {w[0] for w in second}
    assert [w[2]["RANK"] for w in first] == ["0", "1", "2"]
    assert {(w[2]["WORLD_SIZE"], w[2]["LOCAL_RANK"], w[2]["LOCAL_WORLD_SIZE"]) for w in first} == {("3", "0", "1")}
    assert [w[2]["NODE_RANK"] for w in first] == ["0", "1", "2"]
    assert len({(w[2]["MASTER_ADDR"], w[2]["MASTER_PORT"]) for w in first}) == 1
    assert [w[3] for w in first] == [(0, 3), (1, 3), (2, 3)]
    assert [w[4] for w in first] == [[0, 3, 6], [1, 4], [2, 5]]


def test_large_arguments_and_results_travel(pool: sky.ComputePool) -> None:
    data = np.arange(500_000, dtype=np.float64)

    @job
    def scaled(x: np.ndarray) -> np.ndarray:
        return x * int(os.environ["RANK"])

    results = scaled(data) @ pool

    assert [float(r[-1]) for r in results] == [0.0, 499_999.0, 999_998.0]


def test_what_a_part_prints_arrives() -> None:
    lines: list[str] = []

    @job
    def speak() -> None:
        print("rank", os.environ["RANK"])

    with sky.ComputePool(
        nodes=2, display="quiet", on_event=lambda e: lines.append(e.line) if isinstance(e, sky.LogLine) else None
    ) as own:
        speak() @ own

    assert sorted(lines) == ["rank 0", "rank 1"]


def test_the_exception_of_one_part_is_raised_and_the_others_end(pool: sky.ComputePool, tmp_path: Path) -> None:
    @job
    def fail(folder: Path) -> None:
        rank = os.environ["RANK"]
        (folder / rank).write_text(str(os.getpid()))
        if rank == "1":
            raise ValueError("diverged")
        time.sleep(600)

    with pytest.raises(ValueError, match="diverged") as info:
        fail(tmp_path) @ pool

    assert "fail" in str(info.value.__cause__)
    assert (who_is_there() @ pool) == (0, 1, 2)
    assert all(_is_gone(int(p.read_text())) for p in tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_part_that_dies_is_told_of_with_its_signal(pool: sky.ComputePool, number: signal.Signals) -> None:
    @job
    def die(number: int) -> None:
        if os.environ["RANK"] == "2":
            os.kill(os.getpid(), number)
        time.sleep(1.5)
        raise ConnectionError("connection closed by peer")  # what the others see of it

    with pytest.raises(sky.WorkerDiedError, match=f"rank 2 of 3 ended with {number.name}"):
        die(number) @ pool

    assert (who_is_there() @ pool) == (0, 1, 2)


def test_a_worker_that_dies_takes_its_part_along_and_is_told_of(pool: sky.ComputePool) -> None:
    @job
    def die() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)

    with pytest.raises(sky.MachineLostError):
        die() @ pool

    assert (who_is_there() @ pool) == (0, 1, 2)


def test_a_time_limit_ends_a_job(pool: sky.ComputePool) -> None:
    def hang() -> None:
        time.sleep(600)

    limited = sky.compute(Distributed(hang, PLAIN))
    limited.timeout = 1.0

    with pytest.raises(TimeoutError, match="within its timeout of 1 s"):
        limited() @ pool

    assert (who_is_there() @ pool) == (0, 1, 2)


def test_sys_exit_is_told_as_such(pool: sky.ComputePool) -> None:
    @job
    def leave() -> None:
        sys.exit(3)

    with pytest.raises(sky.TaskExitError, match=r"sys\.exit"):
        leave() @ pool


def test_processes_leave_in_good_order_when_all_are_done(pool: sky.ComputePool, tmp_path: Path) -> None:
    @job
    def train(folder: Path) -> None:
        import atexit

        rank = os.environ["RANK"]
        atexit.register(lambda: (folder / rank).write_text("written at exit"))
        if rank == "0":
            return
        time.sleep(0.5)
        assert not (folder / "0").exists(), "rank 0 left before the others were done"

    train(tmp_path) @ pool

    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 3:
        assert time.monotonic() < deadline, list(tmp_path.iterdir())
        time.sleep(0.05)


def test_a_package_that_is_not_there_is_named_with_what_to_do(pool: sky.ComputePool) -> None:
    missing = sky.compute(Distributed(lambda: None, Isolation("tests.plain_setup", {}, ("no_such_framework",))))

    with pytest.raises(sky.SpecError, match=r"no_such_framework is not installed .*image=sky.Image\(pip="):
        missing() @ pool


def test_a_generator_function_is_no_part_of_a_job() -> None:
    def losses() -> Iterator[float]:
        yield 1.0

    for decorate in (sky.integrations.torch, sky.integrations.keras(backend="jax")):
        for fn in (losses, sky.compute(losses)):
            with pytest.raises(TypeError, match=r"is a generator function, and each part .* gives one value"):
                decorate(fn)


def test_a_single_call_runs_in_its_worker_as_a_world_of_one(pool: sky.ComputePool) -> None:
    @job
    def alone() -> tuple[str, str, int]:
        return os.environ["RANK"], os.environ["WORLD_SIZE"], os.getpid()

    @sky.compute
    def variable() -> str | None:
        return os.environ.get("WORLD_SIZE")

    rank, size, _ = alone() >> pool

    assert (rank, size) == ("0", "1")
    assert set(variable() @ pool) == {None}, "what was set for the call must not stay"
    assert alone.local()[:2] == ("0", "1")


def test_every_slot_is_a_rank_under_slots() -> None:
    @job
    def who() -> tuple[str, str, str]:
        return os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["NODE_RANK"]

    with sky.ComputePool(nodes=2, concurrency=2, display="quiet") as pool:
        assert who() @ pool.slots == (("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1"), ("3", "1", "1"))
        assert who() @ pool == (("0", "0", "0"), ("1", "0", "1"))


@pytest.mark.parametrize(
    ("local_rank", "local_size", "gpus", "device"), [(0, 1, 8, 0), (3, 4, 1, 0), (3, 4, 4, 3), (5, 7, 1, 0)]
)
def test_a_rank_has_the_first_gpu_it_sees_unless_all_see_all(
    local_rank: int, local_size: int, gpus: int, device: int
) -> None:
    peers = (Peer("127.0.0.1", 1),)
    world = World(rank=0, size=8, local_rank=local_rank, local_size=local_size, node_rank=0, peers=peers)

    assert device_of(world, gpus) == device


@sky.compute
def who_is_there() -> int:
    info = sky.instance_info()
    assert info is not None
    return info.node


def _is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_versions_that_differ_between_ranks_are_shown_with_a_remedy() -> None:
    with pytest.raises(sky.VersionMismatchError, match=r"rank 0: 2\.7, rank 1: 2\.7, rank 2: 2\.6") as info:
        participant.check_versions(("numpy", "torch"), [["2.4", "2.7"], ["2.4", "2.7"], ["2.4", "2.6"]])

    assert "sky.Image(pip=['torch==2.7'])" in str(info.value)
    participant.check_versions(("torch",), [["2.7"], ["2.7"]])
