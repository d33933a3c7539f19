"""What a soak does to a pool, and when."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from tests.cloudbox import Machine


class Fault(Enum):
    """A part of a pool, and how it is damaged."""

    CLIENT_KILLED = "client killed (SIGKILL)"
    CLIENT_TERMINATED = "client terminated (SIGTERM)"
    CLIENT_INTERRUPTED = "client interrupted (Ctrl-C)"
    CLIENT_INTERRUPTED_TWICE = "client interrupted twice"
    GUARDIAN_KILLED = "guardian killed"
    CLIENT_AND_GUARDIAN_KILLED = "client and guardian killed"
    FIRST_SCHEDULER_KILLED = "scheduler killed"
    FIRST_SCHEDULER_STOPPED = "scheduler stopped (SIGSTOP)"
    FIRST_AGENT_KILLED = "agent of node 0 killed"
    AGENT_KILLED = "agent of another node killed"
    WORKER_KILLED = "worker process killed"
    WORKERS_PARENT_KILLED = "parent of a node's workers killed"
    FIRST_NODE_DESTROYED = "node 0 switched off"
    NODE_DESTROYED = "another node switched off"
    FIRST_NODE_CUT_OFF = "network of node 0 cut for good"
    NODE_CUT_OFF = "network of another node cut for good"
    FIRST_NODE_CUT_OFF_BRIEFLY = "network of node 0 cut for 10 s"
    NODE_CUT_OFF_BRIEFLY = "network of another node cut for 10 s"

    @property
    def of_client(self) -> bool:
        return self.name.startswith("CLIENT")

    @property
    def of_another_node(self) -> bool:
        """Whether it needs a node besides node 0."""
        return self.name.startswith(("AGENT", "NODE"))

    @property
    def of_node(self) -> bool:
        """Whether a node or its agent is lost, or its network for a while."""
        return not (self.of_client or self is Fault.GUARDIAN_KILLED)

    @property
    def loses_machine(self) -> bool:
        """Whether a machine can't be reached afterwards."""
        return self in _LOST

    @property
    def cuts_off(self) -> bool:
        """Whether a machine goes on running that can't be reached."""
        return self in (Fault.FIRST_NODE_CUT_OFF, Fault.NODE_CUT_OFF)


_LOST = (Fault.FIRST_NODE_DESTROYED, Fault.NODE_DESTROYED, Fault.FIRST_NODE_CUT_OFF, Fault.NODE_CUT_OFF)
_BRIEF_S = 10.0
_AGENT = "skyward.node.agen[t]"  # as a pattern, which does not find its own command line


@dataclass(frozen=True)
class Moment:
    """Seconds after start-up has begun, or after that many results, or seconds after the last result."""

    phase: str
    amount: float

    def __str__(self) -> str:
        match self.phase:
            case "starting":
                return f"{self.amount:.2f} s after entering"
            case "working":
                return f"after {self.amount:.0f} results"
        return f"{self.amount:.2f} s after the last result"


@dataclass(frozen=True)
class Plan:
    """One run: what happens to which of so many nodes, and when."""

    number: int
    seed: str
    nodes: int
    fault: Fault
    node: int
    moment: Moment

    def __str__(self) -> str:
        where = f" (node {self.node} of {self.nodes})" if self.fault.of_node else ""
        return f"{self.fault.value}{where}, {self.moment}"


def plan(seed: str, number: int, *, most_nodes: int, calls: int) -> Plan:
    """Return what the seed says for run `number`. Each fault comes up once before any does again."""
    faults = list(Fault)
    random.Random(f"{seed}/{number // len(faults)}").shuffle(faults)
    fault = faults[number % len(faults)]
    rng = random.Random(f"{seed}/run {number}")
    nodes = rng.randint(2 if fault.of_another_node else 1, most_nodes)
    chance = rng.random()
    if chance < 0.35:
        moment = Moment("starting", rng.uniform(0, 5))
    elif chance < 0.9:
        moment = Moment("working", rng.randrange(calls))
    else:
        moment = Moment("ending", rng.uniform(0, 0.15))
    if "FIRST" in fault.name:
        node = 0
    elif fault in (Fault.WORKER_KILLED, Fault.WORKERS_PARENT_KILLED):
        node = rng.randrange(nodes)
    else:
        node = rng.randrange(1, nodes) if nodes > 1 else 0
    return Plan(number, f"{seed}/run {number}", nodes, fault, node, moment)


def inject(plan: Plan, client: Any, machines: Sequence[Machine], data_folder: Path) -> bool:
    """Do it; return False when what is to be damaged is not there at this moment."""
    machine, fault = machines[plan.node], plan.fault
    match fault:
        case Fault.CLIENT_KILLED:
            client.send_signal(signal.SIGKILL)
        case Fault.CLIENT_TERMINATED:
            client.send_signal(signal.SIGTERM)
        case Fault.CLIENT_INTERRUPTED:
            client.send_signal(signal.SIGINT)
        case Fault.CLIENT_INTERRUPTED_TWICE:
            client.send_signal(signal.SIGINT)
            _later(0.3, lambda: client.send_signal(signal.SIGINT))
        case Fault.GUARDIAN_KILLED | Fault.CLIENT_AND_GUARDIAN_KILLED:
            found = guardians(data_folder)
            for guardian in found:
                guardian.kill()
            if found and fault is Fault.CLIENT_AND_GUARDIAN_KILLED:
                client.kill()
            return bool(found)
        case Fault.FIRST_AGENT_KILLED | Fault.AGENT_KILLED:
            return machine.run(f"pkill -KILL -f {_AGENT} && echo killed", check=False) != ""
        case Fault.FIRST_SCHEDULER_KILLED | Fault.FIRST_SCHEDULER_STOPPED:
            name = "KILL" if fault is Fault.FIRST_SCHEDULER_KILLED else "STOP"
            pid = min(_children(machine), default=None)
            return pid is not None and machine.run(f"kill -{name} {pid} && echo done", check=False) != ""
        case Fault.WORKER_KILLED | Fault.WORKERS_PARENT_KILLED:
            pids = _workers(machine, plan.node) if fault is Fault.WORKER_KILLED else _workers_parents(machine)
            pid = random.Random(plan.seed).choice(pids) if pids else None
            return pid is not None and machine.run(f"kill -KILL {pid} && echo killed", check=False) != ""
        case Fault.FIRST_NODE_DESTROYED | Fault.NODE_DESTROYED:
            machine.destroy()
        case Fault.FIRST_NODE_CUT_OFF | Fault.NODE_CUT_OFF:
            machine.unplug()
        case Fault.FIRST_NODE_CUT_OFF_BRIEFLY | Fault.NODE_CUT_OFF_BRIEFLY:
            machine.unplug()
            _later(_BRIEF_S, machine.plug)
    return True


def _later(seconds: float, do: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, do)
    timer.daemon = True
    timer.start()


def _forked(machine: Machine) -> dict[int, int]:
    """Return the parent of each process that has a fork server's command line."""
    found = {}
    for line in machine.run("ps -wweo pid,ppid,args").splitlines()[1:]:
        pid, parent, arguments = line.split(None, 2)
        if "multiprocessing.forkserver import main" in arguments:
            found[int(pid)] = int(parent)
    return found


def _children(machine: Machine) -> list[int]:
    """Return the processes that were forked for the pool: workers, and on node 0 before these the scheduler."""
    forked = _forked(machine)
    return sorted(pid for pid, parent in forked.items() if parent in forked)


def _workers(machine: Machine, node: int) -> list[int]:
    return _children(machine)[0 if node else 1 :]


def _workers_parents(machine: Machine) -> list[int]:
    forked = _forked(machine)
    return [pid for pid, parent in forked.items() if parent not in forked]


def guardians(data_folder: Path) -> list[psutil.Process]:
    """Return the guardians of pools whose journal is in `data_folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if "skyward.cleanup.guardian" not in process.cmdline():
                continue
            if process.environ().get("SKYWARD_DATA_DIR") == str(data_folder):
                found.append(process)
        except psutil.Error:
            continue  # gone meanwhile
    return found
