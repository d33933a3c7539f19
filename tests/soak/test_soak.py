"""Pools on machines, damaged in one random place at a random moment; again and again.

SOAK_RUNS says how often (50), SOAK_SEED what happens: the same seed brings the same faults at the same moments. One run
alone: ``SOAK_SEED=... pytest -m soak 'tests/soak/test_soak.py::test_a_damaged_pool_ends_well[7]'``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cloudbox import Machine
from tests.machines.conftest import IMAGE, Site
from tests.soak import client as client_program
from tests.soak.faults import Fault, Plan, guardians, inject, plan
from tests.soak.outcome import Outcome

RUNS = int(os.environ.get("SOAK_RUNS", "50"))
NODES = 3
"""Most nodes of a pool, and all hosts that it has: those that are no nodes are spare."""
CALLS = 600

# A run is to take seconds where a user would wait for minutes: 45, 120, 120 and 5 are the library's own.
UNREACHABLE_S = 15.0
HEARTBEAT_TIMEOUT_S = 30.0
START_TIMEOUT_S = 100.0  # more than the minute after which a scheduler that hangs is noticed
KEEPALIVE_S = 2

START_S = 60.0
"""Seconds in which a pool on machines that have its environment is up, on a host that has much else to do."""
HANGS_S = 120.0
"""Seconds after the fault in which a client has done its work or given up."""
CLEAN_S = 30.0
"""Seconds after a client's end in which its guardian has cleaned up, where the client itself could not."""
HEADROOM_S = 15.0
NOISE = ("Exception in callback", "never retrieved", "Task was destroyed", "Exception ignored", "never awaited")
NOT_DONE = "not done: the client had ended"

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


class Machines:
    """Machines that are used again as long as nothing has happened to them."""

    def __init__(self, boot: Callable[[int], list[Machine]]) -> None:
        self._boot = boot
        self._machines: list[Machine] = []

    def whole(self) -> list[Machine]:
        """Return machines that are up, reachable and clean, in place of those that are not."""
        kept = []
        for machine in self._machines:
            with contextlib.suppress(RuntimeError, OSError, IndexError):
                if machine.is_running and not left_on(machine) and not litter_on(machine):
                    machine.plug()
                    kept.append(machine)
                    continue
            machine.destroy()
        self._machines = [*kept, *self._boot(NODES - len(kept))]
        return self._machines

    def discard(self, machine: Machine) -> None:
        machine.destroy()
        self._machines.remove(machine)

    def close(self) -> None:
        for machine in self._machines:
            machine.destroy()


@pytest.fixture(scope="module")
def machines(site: Site, baked: Path) -> Iterator[Machines]:
    machines = Machines(lambda count: site.boot(count, baked=baked))
    yield machines
    machines.close()


def left_on(machine: Machine) -> list[str]:
    """Return the processes and files that a machine has of any pool."""
    files = machine.run("ls -d /tmp/skyward-* /dev/shm/skyward-* 2>/dev/null; true").split()
    return [f"{machine.name}: {what}" for what in (*machine.processes(), *files)]


def litter_on(machine: Machine) -> list[str]:
    """Return what lies about in a machine's folders for what is temporary, which nothing but a pool has written to."""
    return [f"{machine.name}: {path}" for path in machine.run("find /tmp /dev/shm -mindepth 1 -maxdepth 1").split()]


class Client:
    """The client's process, and what it has written down."""

    def __init__(self, site: Site, machines: list[Machine], folder: Path, plan: Plan) -> None:
        self.data_folder = folder / "data"
        self._record = folder / "record"
        self._stacks = folder / "stacks"
        self._output = folder / "output"
        config = {
            "hosts": [f"root@{m.address}" for m in machines],
            "key": str(site.key),
            "known_hosts": str(site.known_hosts),
            "pip": list(IMAGE.pip),
            "record": str(self._record),
            "stacks": str(self._stacks),
            "calls": CALLS,
            "nodes": plan.nodes,
            "seed": plan.seed,
            "unreachable_s": UNREACHABLE_S,
            "heartbeat_timeout": HEARTBEAT_TIMEOUT_S,
            "start_timeout_s": START_TIMEOUT_S,
            "keepalive_s": KEEPALIVE_S,
        }
        (folder / "config").write_text(json.dumps(config))
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, client_program.__file__, str(folder / "config")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "SKYWARD_DATA_DIR": str(self.data_folder)},
                start_new_session=True,
            )

    def said(self) -> list[dict[str, Any]]:
        """Return what it has written down until now."""
        with contextlib.suppress(FileNotFoundError):
            lines = self._record.read_text().split("\n")[:-1]  # the last may be half written
            return [json.loads(line) for line in lines]
        return []

    @property
    def phase(self) -> str:
        phases = [line["phase"] for line in self.said() if "phase" in line]
        return phases[-1] if phases else "loading"

    @property
    def results(self) -> int:
        return sum("result" in line for line in self.said())

    @property
    def pools(self) -> set[str]:
        """The ids of pools in its journal."""
        return {path.stem for path in self.data_folder.glob("pools/*.json")}

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def stacks(self) -> str:
        """Return what each of its threads is doing."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        return self._stacks.read_text()

    def close(self) -> None:
        if not self.has_ended:
            self.process.kill()
        self.process.wait()


def wait_until(condition: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wait_for_moment(client: Client, plan: Plan) -> None:
    moment = plan.moment
    phases = ("loading", "starting", "working", "ending", "done")
    wait_until(lambda: client.has_ended or phases.index(client.phase) >= phases.index(moment.phase), 2 * START_S)
    if moment.phase == "working":
        wait_until(lambda: client.has_ended or client.results >= moment.amount, START_S)
    else:
        wait_until(lambda: client.has_ended, moment.amount)


def damage(plan: Plan, client: Client, machines: list[Machine]) -> str:
    """Do what is planned, as soon as there is something to do it to; return what the client was at then."""
    deadline = time.monotonic() + START_S
    while not client.has_ended and time.monotonic() < deadline:
        phase = client.phase
        if inject(plan, client.process, machines, client.data_folder):
            return phase
        time.sleep(0.02)
    return NOT_DONE


def judge(outcome: Outcome, client: Client) -> None:
    """Note how the client has ended, whether it may, and whether its results are right."""
    fault = outcome.plan.fault
    said = client.said()
    results = [tuple(line["result"]) for line in said if "result" in line]
    errors = [line for line in said if "error" in line]
    counts = Counter(i for i, _, _ in results)
    outcome.doubled = sum(n - 1 for n in counts.values())
    outcome.wrong = sum(result != client_program.expected(result[0]) for result in results)
    status = client.process.poll()
    if status is None:
        outcome.end = "hung"
        outcome.problems.append(f"hangs, {client.results} results, phase {client.phase}:\n{client.stacks()}")
    elif status == 0 and client.phase == "done":
        outcome.end = "survived"
        outcome.lost = CALLS - len(counts)
    elif fault.of_client and outcome.phase != NOT_DONE:
        outcome.end = "ended"
        if errors and errors[-1]["error"] not in ("KeyboardInterrupt", "SystemExit"):
            outcome.problems.append(f"was interrupted and raised {errors[-1]['traceback']}")
    elif errors and errors[-1]["clear"]:
        outcome.end = "clear failure"
        outcome.said = f"{errors[-1]['error']}: {errors[-1]['text']}"
    else:
        outcome.end = "unclear failure"
        outcome.problems.append(f"status {status}, {errors[-1]['traceback'] if errors else client.output[-8000:]}")
    has_spare = outcome.plan.nodes < NODES
    may_fail = fault.of_node and outcome.phase in ("loading", "starting") and not has_spare
    if outcome.end == "clear failure" and not may_fail:
        outcome.problems.append(f"should have survived: {errors[-1]['traceback']}")
    if outcome.lost or outcome.doubled or outcome.wrong:
        outcome.problems.append(f"{outcome.lost} results lost, {outcome.doubled} doubled, {outcome.wrong} wrong")
    if any(noise in client.output for noise in NOISE) or ("Traceback" in client.output and not errors):
        outcome.problems.append(f"printed\n{client.output[-6000:]}")


class CutOff:
    """A machine that nobody can reach, looked at from outside until it has cleaned itself."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._since = time.monotonic()
        self.clean_s: float | None = None

    def look(self) -> bool:
        """Return whether it is clean by now."""
        if self.clean_s is None and not left_on(self._machine):
            self.clean_s = time.monotonic() - self._since
        return self.clean_s is not None

    @property
    def left_s(self) -> float:
        return self._since + HEARTBEAT_TIMEOUT_S + HEADROOM_S - time.monotonic()


def client_has_ended(client: Client, cut_off: CutOff | None) -> bool:
    if cut_off is not None:
        cut_off.look()
    return client.has_ended


def look_for_remains(outcome: Outcome, client: Client, machines: list[Machine], cut_off: CutOff | None) -> None:
    """Wait until everything is clean, and note what is not within the time that it is promised."""
    fault = outcome.plan.fault
    began = time.monotonic()
    happened = outcome.phase != NOT_DONE
    lost = machines[outcome.plan.node] if fault.loses_machine and happened else None
    alone = fault is Fault.CLIENT_AND_GUARDIAN_KILLED and happened
    limit = (HEARTBEAT_TIMEOUT_S + HEADROOM_S) if alone else CLEAN_S
    for machine in machines:
        if machine is lost:
            continue
        if not wait_until(lambda m=machine: not left_on(m), began + limit - time.monotonic()):
            outcome.left += left_on(machine)
        outcome.left += [what for what in litter_on(machine) if what not in outcome.left]
    outcome.clean_s = time.monotonic() - began
    if cut_off is not None and lost is not None:
        if wait_until(cut_off.look, cut_off.left_s) and cut_off.clean_s is not None:
            outcome.clean_s = max(outcome.clean_s, cut_off.clean_s)
        else:
            outcome.left += left_on(lost)
        lost.plug()
    if alone or lost is not None:
        # Whoever could close the entry is gone, or waits for a machine: the command does it.
        gone = lost if cut_off is None and client.pools else None
        take_down(outcome, client, gone)
        if gone is not None:
            return
    if not wait_until(lambda: not client.pools, CLEAN_S):
        outcome.left += [f"journal: {pool}" for pool in client.pools]
    if lost is None and not wait_until(lambda: not guardians(client.data_folder), CLEAN_S):
        outcome.left.append("a guardian")


def take_down(outcome: Outcome, client: Client, gone: Machine | None) -> None:
    """Let ``skyward down`` end what is left, which it can't confirm where a machine is gone."""
    down = subprocess.run(
        [sys.executable, "-m", "skyward.cli", "down", "--all", "--yes"],
        env={**os.environ, "SKYWARD_DATA_DIR": str(client.data_folder)},
        capture_output=True,
        text=True,
    )
    right = down.returncode == 0 if gone is None else down.returncode == 1 and gone.address in down.stderr
    if not right:
        outcome.problems.append(f"skyward down: status {down.returncode}, {down.stdout}{down.stderr}")


@pytest.mark.parametrize("number", range(RUNS))
def test_a_damaged_pool_ends_well(
    number: int, seed: str, site: Site, machines: Machines, outcomes: list[Outcome], tmp_path: Path
) -> None:
    if number == 0:
        print(f"\nSOAK_SEED={seed}", flush=True)
    run = plan(seed, number, most_nodes=NODES, calls=CALLS)
    outcome = Outcome(run)
    outcomes.append(outcome)
    used = list(machines.whole())
    began = time.monotonic()
    client = Client(site, used, tmp_path, run)

    try:
        wait_for_moment(client, run)
        outcome.phase = damage(run, client, used)
        pools = client.pools
        cut_off = CutOff(used[run.node]) if run.fault.cuts_off and outcome.phase != NOT_DONE else None
        wait_until(lambda: client_has_ended(client, cut_off), HANGS_S)
        outcome.seconds = time.monotonic() - began
        judge(outcome, client)
        if outcome.end == "hung":
            client.close()
        look_for_remains(outcome, client, used, cut_off)
    finally:
        client.close()
        for guardian in guardians(client.data_folder):
            guardian.kill()
        if run.fault.loses_machine:
            machines.discard(used[run.node])
    outcome.left += [f"here: {path}" for pool in pools for path in Path("/dev/shm").glob(f"skyward-{pool}-*")]
    if outcome.left:
        outcome.problems.append("left behind: " + "; ".join(outcome.left))

    print(f"\n{outcome}", flush=True)
    assert not outcome.problems
