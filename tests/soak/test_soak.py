"""Random parts of a pool are killed at random moments, again and again: nothing may be left, lost or doubled.

``make soak``. SOAK_RUNS is how often (50), SOAK_SEED where it begins, SOAK_REPORT a file for the table.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.cloudbox import Machine, why_not
from tests.machines.conftest import IMAGE, Site
from tests.soak.client import expected

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

CALLS = 300
NODES = 3
_HUNG_S = 150.0
_CLEAN_S = 60.0
_BLIP_S = 4.0
_CLIENT = Path(__file__).with_name("client.py")


@dataclass
class Run:
    """One run of the client, and what is done to it."""

    site: Site
    machines: list[Machine]
    folder: Path
    random: random.Random
    client: subprocess.Popen[bytes] = field(init=False)
    was_up: bool = False

    def start(self) -> None:
        job = {
            "hosts": [f"root@{m.address}" for m in self.machines],
            "key": str(self.site.key),
            "known_hosts": str(self.site.known_hosts),
            "pip": list(IMAGE.pip),
            "calls": CALLS,
        }
        (self.folder / "job.json").write_text(json.dumps(job))
        with (self.folder / "output").open("wb") as output:
            self.client = subprocess.Popen(
                [sys.executable, str(_CLIENT), str(self.folder)],
                stdout=output,
                stderr=output,
                env={**os.environ, "SKYWARD_DATA_DIR": str(self.folder / "data")},
            )

    @property
    def head(self) -> Machine:
        return self.machines[0]

    @property
    def other(self) -> Machine:
        return self.random.choice(self.machines[1:])

    def guardians(self) -> list[psutil.Process]:
        pools = [path.stem for path in (self.folder / "data").glob("pools/*.json")]
        return [
            p
            for p in psutil.process_iter(["cmdline"])
            if "skyward.cluster.guardian" in (p.info["cmdline"] or ()) and p.info["cmdline"][-1] in pools
        ]

    def kill_guardians(self) -> None:
        for guardian in self.guardians():
            guardian.kill()

    def results(self) -> list[tuple[int, int]]:
        path = self.folder / "results"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may have been cut short
        return [tuple(json.loads(line)) for line in lines]

    def end(self) -> tuple[bool, str | None]:
        """Return whether it ended in a way that a user understands, and the error if any."""
        path = self.folder / "end"
        if not path.exists():
            return False, f"killed ({self.client.returncode})"
        said = json.loads(path.read_text())
        return said["clear"], said["error"]


def kill_one(machine: Machine, pattern: str) -> None:
    """Kill the oldest process whose command line has `pattern`; there may be none yet, or no longer."""
    machine.run(f"pkill -KILL -o -f {pattern}", check=False)


def kill_worker(run: Run) -> None:
    # Forked from the forkserver, so the newest of its kind are workers.
    run.random.choice(run.machines).run("pkill -KILL -n -f multiprocessing.forkserve[r]", check=False)


def blip(run: Run, machine: Machine) -> None:
    machine.unplug()
    time.sleep(_BLIP_S)  # the fault itself, not a wait for something
    machine.plug()


def kill_both(run: Run) -> None:
    run.kill_guardians()
    run.client.kill()


AGENT = "skyward.cluster.nod[e]"
FAULTS: dict[str, Callable[[Run], None]] = {
    "client killed": lambda run: run.client.kill(),
    "client terminated": lambda run: run.client.terminate(),
    "client interrupted": lambda run: run.client.send_signal(signal.SIGINT),
    "guardian killed": Run.kill_guardians,
    "client and guardian killed": kill_both,
    "agent of node 0 killed": lambda run: kill_one(run.head, AGENT),
    "agent of another node killed": lambda run: kill_one(run.other, AGENT),
    "worker killed": kill_worker,
    "node 0 destroyed": lambda run: run.head.destroy(),
    "another node destroyed": lambda run: run.other.destroy(),
    "node 0 cut off for good": lambda run: run.head.unplug(),
    "another node cut off for good": lambda run: run.other.unplug(),
    f"node 0 cut off for {_BLIP_S:g} s": lambda run: blip(run, run.head),
    f"another node cut off for {_BLIP_S:g} s": lambda run: blip(run, run.other),
}
CLIENT_ENDS = {"client killed", "client terminated", "client interrupted", "client and guardian killed"}
MAY_FAIL = {"agent of node 0 killed", "node 0 destroyed", "node 0 cut off for good"}


def is_clean(machine: Machine) -> bool:
    return not machine.processes() and not machine.run("ls -d /tmp/skyward-* 2>/dev/null; true")


def seconds_until_clean(machines: list[Machine]) -> float:
    began = time.monotonic()
    while not all(map(is_clean, machines)):
        if time.monotonic() - began > _CLEAN_S:
            left = {m.name: (m.processes(), m.run("ls -d /tmp/skyward-*", check=False)) for m in machines}
            raise AssertionError(f"not clean after {_CLEAN_S:g} s: {left}")
        time.sleep(0.2)
    return time.monotonic() - began


def one_run(run: Run, fault: str, delay: float) -> tuple[str, float]:
    """Return how the run ended, and the seconds until the machines that are left were clean."""
    run.start()
    try:
        time.sleep(delay)
        run.was_up = (run.folder / "up").exists()
        FAULTS[fault](run)
        try:
            run.client.wait(_HUNG_S)
        except subprocess.TimeoutExpired:
            raise AssertionError("hung") from None
    finally:
        run.client.kill()
        run.client.wait()
    results = run.results()
    indices = [i for i, _ in results]
    assert len(set(indices)) == len(indices), "results doubled"
    assert all(value == expected(i) for i, value in results), "results wrong"
    clear, error = run.end()
    if error is None:
        assert indices == list(range(CALLS)), "results lost"
        outcome = "survived"
    elif fault in CLIENT_ENDS:
        outcome = "ended"
    else:
        assert clear, f"not a clear failure: {error}"
        assert fault in MAY_FAIL or not run.was_up, f"should have survived: {error}"
        outcome = "clear failure"
    left = [m for m in run.machines if m.is_running]
    return outcome, seconds_until_clean(left)


def test_random_parts_die_at_random_moments(site: Site, baked: Path, tmp_path: Path) -> None:
    runs = int(os.environ.get("SOAK_RUNS", "50"))
    seed = int(os.environ.get("SOAK_SEED", "1"))
    dice = random.Random(seed)
    faults = (list(FAULTS) * (runs // len(FAULTS) + 1))[:runs]
    dice.shuffle(faults)
    table: dict[str, Counter[str]] = {fault: Counter() for fault in FAULTS}
    slowest = dict.fromkeys(FAULTS, 0.0)
    failures = []
    machines: list[Machine] = []
    for number, fault in enumerate(faults):
        sound = [m for m in machines if m.is_running]
        machines = sound + site.boot(NODES - len(sound), baked=baked)
        folder = tmp_path / str(number)
        folder.mkdir()
        run = Run(site, machines, folder, dice)
        delay = dice.uniform(0.1, 4.5)
        try:
            outcome, seconds = one_run(run, fault, delay)
        except AssertionError as exc:
            outcome, seconds = "FAILED", 0.0
            failures.append(f"run {number}, {fault} after {delay:.2f} s: {exc}; see {folder}/output")
        table[fault][outcome] += 1
        slowest[fault] = max(slowest[fault], seconds)
        print(f"{number:3} {fault:32} after {delay:.2f} s: {outcome}, clean in {seconds:.1f} s", flush=True)
        run.kill_guardians()
        if outcome == "FAILED" or "cut off" in fault or not all(m.is_running for m in machines):
            for machine in machines:
                machine.destroy()
    report(table, slowest, runs, seed)
    assert not failures, "\n".join(failures)


def report(table: dict[str, Counter[str]], slowest: dict[str, float], runs: int, seed: int) -> None:
    columns = ("survived", "clear failure", "ended", "FAILED")
    lines = [
        f"{runs} runs of {CALLS} calls on {NODES} machines with 2 slots each, seed {seed}.",
        "",
        f"| fault | runs | {' | '.join(columns)} | clean within |",
        f"|---|---|{'---|' * len(columns)}---|",
    ]
    for fault, counts in table.items():
        cells = " | ".join(str(counts[c]) for c in columns)
        lines.append(f"| {fault} | {counts.total()} | {cells} | {slowest[fault]:.1f} s |")
    text = "\n".join(lines) + "\n"
    print(text)
    if path := os.environ.get("SOAK_REPORT"):
        Path(path).write_text(text)


@pytest.fixture(autouse=True, scope="session")
def _has_machines() -> None:
    if reason := why_not():
        pytest.skip(reason)
