"""How long a pool on a machine reached over SSH takes to its first result, beside plain ssh, venv and pip.

Usage: python benchmarks/startup.py [--aws [--nodes N] [--boot-s S ...]] [--rounds N] [--json FILE]

Needs Linux and root: the machines are cloudbox machines on this host (see tests/cloudbox). Each round boots two, one
for skyward and one for the floor: the openssh client, `python3 -m venv`, `pip install` of the very same requirements
and constraints, and a `python` that prints. Both start cold, then with nothing but their download caches, then with
all that is there from before. With --aws: pools on the emulated AWS, beside dask-cloudprovider; see startup_aws.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests.cloudbox

import skyward as sky
from skyward.cluster.requirements import recipe
from skyward.cluster.wheel import own_wheel
from skyward.scripts.bootstrap import Recipe
from skyward.spec.image import Image
from tests.cloudbox import Machine, Network, cloud_config, why_not

IMAGE = Image(pip=["numpy", "scikit-learn"])
STATES = {
    "cold": "a machine that has just booted: nothing is there",
    "warm": "the download caches are there, no environment",
    "stamped": "the environment is there from before",
}
OURS = ("ssh", "upload", "uv", "python", "packages", "skyward", "agent", "cluster", "first result")
FLOOR = ("ssh", "venv", "pip", "result")
_FORGET = "cd ~/.cache/skyward && rm -rf envs stamps skyward wheels uv python"  # all but uv-cache; pip has its own


@dataclass
class Timings:
    """Seconds per phase of one start after another, from the same state."""

    starts: list[dict[str, float]] = field(default_factory=list)

    def median(self, *phases: str) -> float:
        """Return the median of what these phases take together."""
        return statistics.median(sum(start.get(phase, 0.0) for phase in phases) for start in self.starts)

    @property
    def total(self) -> float:
        return statistics.median(sum(start.values()) for start in self.starts)


class Clock:
    """Cuts the time since it was made into phases."""

    def __init__(self, phase: str) -> None:
        self.phases: dict[str, float] = {}
        self._phase, self._since = phase, time.perf_counter()

    def next(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[self._phase] = self.phases.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now


class Bench:
    """The network, the key, and what is measured on machines that let it in."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.key = folder / "key"
        self.known_hosts = folder / "known_hosts"
        self._booted = 0
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True)
        self._user_data = cloud_config(ssh_authorized_keys=[self.key.with_suffix(".pub").read_text()])

    def boot(self) -> Machine:
        machine = Machine(self.network, f"bench-{self._booted}", self._user_data)
        self._booted += 1
        with self.known_hosts.open("a") as known:
            known.write(f"{machine.address} {machine.host_key()}\n")
        return machine

    def skyward(self, machine: Machine) -> dict[str, float]:
        """Enter a pool, wait for its first result, and return the seconds that each phase took."""
        clock: Clock

        def hear(event: Any) -> None:
            match event:
                case sky.BootstrapProgress(step=step):
                    clock.next(step)
                case sky.BootstrapCompleted():
                    clock.next("cluster")

        provider = sky.SSH([f"root@{machine.address}"], key=self.key, known_hosts=self.known_hosts)
        pool = sky.ComputePool(provider, image=IMAGE, display="quiet", on_event=hear)
        clock = Clock("ssh")
        with pool:
            clock.next("first result")
            value = sky.compute(pow)(7, 2) >> pool
            clock.next("")
        assert value == 49
        return clock.phases

    def floor(self, machine: Machine) -> dict[str, float]:
        """Do by hand what it takes to have a result, and return the seconds that each phase took."""
        wanted: Recipe = recipe(IMAGE, own_wheel())
        files = "\n".join(
            f"printf '%s\\n' {shlex.join(lines)} > {name}"
            for name, lines in (("requirements.txt", wanted.requirements), ("constraints.txt", wanted.constraints))
        )
        script = f"""
            echo venv
            {files}
            [ -e env/complete ] || python3 -m venv env || exit 1
            echo pip
            [ -e env/complete ] || env/bin/python -m pip install -q -r requirements.txt -c constraints.txt || exit 1
            touch env/complete
            echo result
            env/bin/python -c 'print(pow(7, 2))'
        """
        options = ["-i", str(self.key), "-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "BatchMode=yes"]
        clock = Clock("ssh")
        command = ["ssh", "-F", "none", *options, f"root@{machine.address}", script]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ssh:
            assert ssh.stdout is not None
            for line in map(str.strip, ssh.stdout):
                clock.next("" if line == "49" else line)
                if line == "49":
                    break
        if ssh.returncode or line != "49":
            raise RuntimeError(f"the floor could not be measured: status {ssh.returncode}, last line {line!r}")
        return clock.phases


def measure(rounds: int, report: Callable[[str], None]) -> dict[str, tuple[Timings, Timings]]:
    """Return skyward's timings and the floor's from each state."""
    found = {state: (Timings(), Timings()) for state in STATES}
    with tempfile.TemporaryDirectory() as folder:
        # Its journal is no business of the user's.
        os.environ["SKYWARD_DATA_DIR"] = str(Path(folder) / "data")
        network = Network()
        try:
            bench = Bench(network, Path(folder))
            for number in range(rounds):
                ours, theirs = bench.boot(), bench.boot()
                for state in STATES:
                    if state == "warm":
                        ours.run(_FORGET)
                        theirs.run("rm -rf ~/env")
                    starts = [(found[state][0], bench.skyward, ours), (found[state][1], bench.floor, theirs)]
                    for timings, start, machine in starts if number % 2 else reversed(starts):
                        timings.starts.append(start(machine))
                    last = [sum(timings.starts[-1].values()) for timings in found[state]]
                    report(f"round {number + 1}, {state}: skyward {last[0]:.2f} s, floor {last[1]:.2f} s")
                ours.destroy()
                theirs.destroy()
        finally:
            network.close()
    return found


def versions() -> dict[str, str]:
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True).stderr.split(",")[0].strip()
    names = ("skyward", "dask", "distributed", "asyncssh", "numpy", "scikit-learn", "pip")
    packages = {name: importlib.metadata.version(name) for name in names}
    return {"Python": platform.python_version(), **packages, "ssh": ssh, "kernel": platform.release()}


def print_table(found: dict[str, tuple[Timings, Timings]], rounds: int) -> None:
    print(f"\nMedians of {rounds} rounds, in seconds; a host with {os.cpu_count()} cores that is client and machine\n")
    print("| state | total | floor | ratio | difference |")
    print("|---|---|---|---|---|")
    for state, (ours, floor) in found.items():
        ratio, more = ours.total / floor.total, ours.total - floor.total
        print(f"| {state} | {ours.total:.2f} | {floor.total:.2f} | {ratio:.2f} | {more:+.2f} |")
    for name, phases, index in (("skyward", OURS, 0), ("floor", FLOOR, 1)):
        print(f"\n| {name} | {' | '.join(phases)} |")
        print("|---" * (len(phases) + 1) + "|")
        for state, both in found.items():
            print(f"| {state} | " + " | ".join(f"{both[index].median(phase):.2f}" for phase in phases) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every timing into it")
    parser.add_argument("--aws", action="store_true", help="measure on the emulated AWS instead")
    parser.add_argument("--nodes", type=int, default=3, help="with --aws: machines of each pool and cluster")
    late: dict[str, Any] = {"nargs": "+", "type": float, "default": [0.0, 10.0], "metavar": "S"}
    parser.add_argument("--boot-s", **late, help="with --aws: seconds by which machines boot late, to try in turn")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(f"not measured: {reason}")
    facts: dict[str, Any] = {"versions": versions(), "cores": os.cpu_count()}
    if options.aws:
        import startup_aws

        starts = startup_aws.measure(options.rounds, _report, nodes=options.nodes, boot_s=options.boot_s)
        startup_aws.print_table(starts, options.rounds, nodes=options.nodes)
        facts["versions"] |= {"peer": startup_aws.PEER}
        facts["starts"] = [{"boot_s": late_s, "kind": kind, **asdict(a)} for (late_s, kind), a in starts.items()]
    else:
        found = measure(options.rounds, _report)
        print_table(found, options.rounds)
        timings = {state: {"skyward": asdict(a), "floor": asdict(b)} for state, (a, b) in found.items()}
        facts |= {"states": STATES, "timings": timings}
    print("\n" + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
