"""Lines that workers print, at the caller: in order, once, and bounded."""

from __future__ import annotations

import logging
import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from skyward.console.output import LINES_KEPT, Output
from skyward.worker.capture import DROPPED
from tests.waiting import wait_until


def message(first: int, *lines: str, process: str = "p", node: int = 0, dropped: int = 0) -> dict[str, Any]:
    stamped = [(float(i), "stdout", line) for i, line in enumerate(lines)]
    if dropped:
        stamped.insert(0, (0.0, DROPPED, str(dropped)))
    return {"node": node, "process": process, "first": first, "lines": stamped}


@pytest.fixture
def heard() -> list[sky.LogLine]:
    return []


@pytest.fixture
def output(heard: list[sky.LogLine]) -> Output:
    return Output(lambda node: f"i-{node}", heard.append)


def test_the_end_of_a_storm_is_kept(output: Output, heard: list[sky.LogLine]) -> None:
    output.receive(message(0, *map(str, range(100_000))))
    for i in range(1_000):
        output.receive(message(100_000 + i, f"end {i}"))

    assert [e.line for e in heard[-1_000:]] == [f"end {i}" for i in range(1_000)]
    assert heard[0].line == f"... {100_000 - len(heard[1:-1_000])} lines dropped ..."


def test_lines_that_come_twice_are_taken_once(output: Output, heard: list[sky.LogLine]) -> None:
    output.receive(message(0, "a", "b"))
    output.receive(message(0, "a", "b", "c"))
    output.receive(message(1, "b"))
    output.receive(message(0, "x", process="other", node=1))

    assert [(e.node, e.instance_id, e.line) for e in heard] == [
        (0, "i-0", "a"), (0, "i-0", "b"), (0, "i-0", "c"), (1, "i-1", "x")
    ]  # fmt: skip
    assert output.lines() == ["a", "b", "c", "x"]
    assert output.lines(1) == ["x"]
    assert output.lines(2) == []


def test_lines_that_are_overtaken_by_later_ones_are_taken(output: Output, heard: list[sky.LogLine]) -> None:
    output.receive(message(0, "a"))
    output.receive(message(4, "e"))
    output.receive(message(1, "b", "c"))
    output.receive(message(2, "c", "d", "e", "f"))
    assert [event.line for event in heard] == ["a", "e", "b", "c", "d", "f"]


def test_what_the_worker_dropped_is_told_once_in_its_place(output: Output) -> None:
    output.receive(message(0, "a"))
    output.receive(message(1, "f", "g", dropped=4))
    output.receive(message(1, "f", dropped=4))

    assert output.lines() == ["a", "... 4 lines dropped ...", "f", "g"]


def test_a_storm_is_cut_down_to_its_newest_lines_and_counted(output: Output, heard: list[sky.LogLine]) -> None:
    total = 200_000
    for first in range(0, total, 2000):
        output.receive(message(first, *(f"line {i}" for i in range(first, first + 2000))))

    dropped = sum(int(e.line.split()[1]) for e in heard if e.line.endswith("lines dropped ..."))
    arrived = [e.line for e in heard if e.line.startswith("line ")]
    assert dropped + len(arrived) == total
    assert len(arrived) < 60_000
    assert arrived == sorted(arrived, key=lambda line: int(line.split()[1]))
    assert len(output.lines()) == LINES_KEPT


def test_all_that_a_worker_says_arrives_in_order_with_its_node(pool: sky.ComputePool) -> None:
    def speak() -> int:
        import logging
        import sys as there
        import threading
        import traceback

        print("printed")
        print("to standard error", file=there.stderr)
        logging.getLogger("mine").warning("logged")
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            traceback.print_exc()
        thread = threading.Thread(target=print, args=["from a thread"])
        thread.start()
        thread.join()
        info = sky.instance_info()
        assert info is not None
        return info.node

    heard: list[sky.LogLine] = []
    pool.on(sky.LogLine, heard.append)

    node = sky.compute(speak)() >> pool

    lines = [e.line for e in heard]
    assert lines[:3] == ["printed", "to standard error", "WARNING mine: logged"]
    assert lines[3] == "Traceback (most recent call last):"
    assert lines[-2:] == ["ZeroDivisionError: division by zero", "from a thread"]
    assert {e.node for e in heard} == {node}


def printed(pool: sky.ComputePool, work: Callable[[], Any]) -> list[tuple[str, str]]:
    """Run `work` on a pool, and return the streams and lines that had arrived when its outcome did."""
    heard: list[tuple[str, str]] = []

    def hear(event: sky.LogLine) -> None:
        heard.append((event.stream, event.line))

    pool.on(sky.LogLine, hear)
    sky.compute(work)() >> pool
    return heard


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # from Python 3.12 on
def test_programs_and_c_code_and_descriptors_are_heard_in_order(pool: sky.ComputePool) -> None:
    def speak() -> None:
        import ctypes
        import subprocess

        print("printed")
        subprocess.run(["echo", "by a program"], check=True)
        os.write(1, b"to the descriptor\n")
        ctypes.CDLL(None).printf(b"by C\n")
        print("wrong", file=sys.stderr)
        subprocess.run(["echo", "into sys.stdout"], stdout=sys.stdout, check=True)
        if (child := os.fork()) == 0:
            print("by a child")
            os._exit(0)
        os.waitpid(child, 0)
        subprocess.run(["sh", "-c", "echo by a program >&2"], check=True)

    assert printed(pool, speak) == [
        ("stdout", "printed"), ("stdout", "by a program"), ("stdout", "to the descriptor"), ("stdout", "by C"),
        ("stderr", "wrong"), ("stdout", "into sys.stdout"), ("stdout", "by a child"), ("stderr", "by a program"),
    ]  # fmt: skip


def test_streams_of_a_call_are_those_of_a_process(pool: sky.ComputePool) -> None:
    def speak() -> None:
        import faulthandler

        faulthandler.dump_traceback(all_threads=False)
        sys.stdout.reconfigure(errors="strict")  # type: ignore[union-attr]
        sys.stdout.buffer.write(b"bytes\n")
        print(sys.stdout.fileno(), sys.stderr.fileno(), sys.stdout.isatty(), sys.stdout is sys.__stdout__)
        sys.stdout.write("half a line")

    heard = printed(pool, speak)

    assert [line for stream, line in heard if stream == "stdout"] == ["bytes", "1 2 False True", "half a line"]
    assert any(line.startswith("  File") for stream, line in heard if stream == "stderr")


def test_standard_error_that_a_call_turns_elsewhere_goes_there(pool: sky.ComputePool, tmp_path: Path) -> None:
    path = tmp_path / "errors"

    def speak() -> None:
        kept = os.dup(2)
        with path.open("w") as file:
            os.dup2(file.fileno(), 2)
        print("silenced", file=sys.stderr)
        os.dup2(kept, 2)
        print("heard", file=sys.stderr)

    assert printed(pool, speak) == [("stderr", "heard")]
    assert path.read_text() == "silenced\n"


def test_logging_that_a_call_sets_up_is_heard_in_later_calls_too() -> None:
    def set_up() -> None:
        logging.basicConfig(level=logging.INFO)
        logging.info("the first")

    with sky.ComputePool("local", display="quiet") as pool:
        assert printed(pool, set_up) == [("stderr", "INFO:root:the first")]
        assert printed(pool, lambda: logging.info("another")) == [("stderr", "INFO:root:another")]
        assert printed(pool, lambda: logging.getLogger("distributed").warning("of Dask")) == []


def test_a_line_without_end_is_heard_while_its_call_runs(pool: sky.ComputePool, tmp_path: Path) -> None:
    go = tmp_path / "go"
    heard: list[str] = []
    pool.on(sky.LogLine, lambda event: heard.append(event.line))

    @sky.compute
    def step() -> None:
        sys.stderr.write("\r 10%|#  |\r 20%|## |")
        sys.stderr.flush()
        while not go.exists():
            threading.Event().wait(0.01)

    stepping = pool.submit(step())
    wait_until(lambda: heard == [" 20%|## |"])

    go.touch()
    stepping.result(30)


def test_a_program_that_outlives_its_call_holds_nothing_up(pool: sky.ComputePool, tmp_path: Path) -> None:
    go = tmp_path / "go"

    def start() -> None:
        import subprocess

        subprocess.run(["sh", "-c", f"(until test -e {go}; do sleep 0.05; done; echo later) &"], check=True)

    assert printed(pool, start) == []

    heard: list[str] = []
    pool.on(sky.LogLine, lambda event: heard.append(event.line))
    go.touch()
    wait_until(lambda: heard == ["later"])


def test_last_lines_of_a_worker_that_dies_come_before_its_error() -> None:
    def die() -> None:
        print("printed")
        print("wrong", file=sys.stderr)
        os.write(1, b"half a line")
        os._exit(3)

    def crash() -> None:
        import ctypes
        import faulthandler

        faulthandler.enable()
        print("before")
        ctypes.string_at(0)

    heard: list[tuple[str, str]] = []
    with sky.ComputePool("local", display="quiet", retries=0) as pool:
        pool.on(sky.LogLine, lambda event: heard.append((event.stream, event.line)))
        with pytest.raises(sky.WorkerDiedError):
            sky.compute(die)() >> pool
        assert heard == [("stdout", "printed"), ("stderr", "wrong"), ("stdout", "half a line")]
        heard.clear()
        with pytest.raises(sky.WorkerDiedError):
            sky.compute(crash)() >> pool
        assert heard[:2] == [("stdout", "before"), ("stderr", "Fatal Python error: Segmentation fault")]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_storm_of_lines_blocks_no_task_and_fills_no_memory() -> None:
    def storm(lines: int) -> str:
        for i in range(lines):
            print("line", i, "of a storm that nobody reads, with some more words to make it as long as lines are")
        return "done"

    def arrived() -> int:
        return sum(line.startswith("line ") for line in heard)

    def dropped() -> int:
        return sum(int(line.split()[1]) for line in heard if line.endswith("lines dropped ..."))

    heard: list[str] = []
    peak_mb = _peak_mb()
    with sky.ComputePool("local", concurrency=2, display="quiet") as pool:
        pool.on(sky.LogLine, lambda event: heard.append(event.line))
        storming = pool.submit(sky.compute(storm)(300_000))
        quick = [sky.compute(abs)(-1) >> pool for _ in range(50)]
        assert storming.result(timeout=60) == "done"
        wait_until(lambda: arrived() + dropped() == 300_000)
        kept = len(pool.logs())
        events = pool.client.get_events("skyward-logs")

    assert quick == [1] * 50
    assert any(line.startswith("line 299999") for line in heard)
    assert kept <= LINES_KEPT
    assert len(events) == 0  # the scheduler keeps none
    assert _peak_mb() - peak_mb < 300  # Dask and the engine are loaded meanwhile


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
