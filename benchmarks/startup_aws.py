"""How long a pool on the emulated AWS takes to its first result, beside dask-cloudprovider's `EC2Cluster` on the same.

`python benchmarks/startup.py --aws` runs it. Each start is a Python process of its own, which says when its phases
begin; the emulator and its machines belong to this one. `EC2Cluster` finds on its machines what Docker would have to
be installed for and to fetch, see `_DOCKER`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from startup import IMAGE, Bench, Timings

from skyward.cluster.requirements import recipe
from skyward.cluster.wheel import own_wheel
from tests.cloudbox import Network
from tests.clouds.emulated import Emulated

PEER = "dask-cloudprovider[aws]==2025.9.0"
KINDS = ("skyward", "EC2Cluster", "skyward, cold")
"""The first two find the environment on their machines; a cold start finds nothing, there or here."""
PHASES = ("import", "up", "first result", "all machines", "end")
_LIMIT_S = 300.0
_CLOCK = """
import sys, time

def begin(phase):
    print("::phase", time.perf_counter(), phase, flush=True)

begin("import")
"""
_OURS = """
import skyward as sky

machine, nodes, *packages = sys.argv[1:]
pool = sky.ComputePool(
    provider=sky.AWS(region="us-east-1"), machine=machine, nodes=int(nodes), image=sky.Image(pip=packages),
    allocation="on-demand", display="quiet",
)
begin("up")
with pool:
    begin("first result")
    assert sky.compute(pow)(7, 2) >> pool == 49
    begin("all machines")
    assert len(sky.compute(pow)(7, 2) @ pool) == int(nodes)
    begin("end")
begin("")
"""
_THEIRS = """
from dask_cloudprovider.aws import EC2Cluster
from distributed import Client

machine, nodes, image, group, docker = sys.argv[1:]
workers = int(nodes) - 1  # the scheduler has a machine to itself
begin("up")
with EC2Cluster(
    region="us-east-1", instance_type=machine, n_workers=workers, ami=image, security_groups=[group],
    bootstrap=False, extra_bootstrap=[docker],
) as cluster, Client(cluster) as client:
    begin("first result")
    assert client.submit(pow, 7, 2).result() == 49
    begin("all machines")
    client.wait_for_workers(workers)
    begin("end")
begin("")
"""
# Goes before `docker run OPTIONS IMAGE COMMAND` in the script that a machine boots with, and runs the command alone, in
# the environment that skyward's machines have.
_DOCKER = (
    'docker() {{ while [ "$1" != daskdev/dask:latest ]; do shift; done; shift; '
    'PATH="/root/.cache/skyward/envs/{}/bin:$PATH" "$@"; }}'
)

Key = tuple[float, str]
"""By how many seconds machines boot late, and one of `KINDS`."""


@dataclass
class Starts(Timings):
    """Starts of one kind, with the calls of AWS's API that each made from its beginning to its end."""

    calls: list[dict[str, int]] = field(default_factory=list)

    @property
    def to_first_result(self) -> float:
        return self.median("up", "first result")

    @property
    def to_all_machines(self) -> float:
        return self.median("up", "first result", "all machines")


class AwsBench:
    """The emulated AWS, and what is measured on it."""

    def __init__(self, cloud: Emulated, folder: Path, *, nodes: int) -> None:
        self._cloud, self._folder, self._nodes = cloud, folder, nodes
        self._baked = cloud.rack.baked
        self._peer = _install_peer(folder)
        self._peer_arguments = self._prepare_account()

    def _prepare_account(self) -> list[str]:
        """Return the ids of an image and a security group for `EC2Cluster`.

        It looks for Ubuntu 20.04, which the emulated cloud lacks; and the group that it would make it can't:
        github.com/dask/dask-cloudprovider/issues/481.
        """
        import boto3

        ec2 = boto3.client("ec2")
        images = ec2.describe_images(Filters=[{"Name": "name", "Values": ["ubuntu-noble-24.04-amd64-server"]}])
        group = ec2.create_security_group(GroupName="dask", Description="for EC2Cluster")["GroupId"]
        ec2.authorize_security_group_ingress(
            GroupId=group, IpProtocol="tcp", FromPort=8786, ToPort=8787, CidrIp="0.0.0.0/0"
        )
        return [images["Images"][0]["ImageId"], group]

    def start(self, boot_s: float, kind: str, starts: Starts) -> None:
        """Measure a start and add it to `starts`."""
        is_cold, machines = kind == "skyward, cold", [self._cloud.type, str(self._nodes)]
        if kind == "EC2Cluster":
            docker = _DOCKER.format(recipe(IMAGE, own_wheel()).key)
            command = [self._peer, "-c", _CLOCK + _THEIRS, *machines, *self._peer_arguments, docker]
        else:
            command = [sys.executable, "-c", _CLOCK + _OURS, *machines, *IMAGE.pip]
        self._cloud.rack.baked = None if is_cold else self._baked
        self._cloud.rack.boot_delay_s = boot_s
        with tempfile.TemporaryDirectory(dir=self._folder) as nothing:
            cache = nothing if is_cold else str(self._folder / "cache")
            environment = {**os.environ, "SKYWARD_CACHE_DIR": cache}
            before = Counter(self._cloud.cloud.calls)
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S)
        if done.returncode:
            raise RuntimeError(f"{kind} could not be measured:\n{done.stdout}{done.stderr}")
        if left := self._cloud.machines():
            raise RuntimeError(f"{kind} has left {', '.join(left)}")
        starts.starts.append(_phases(done.stdout))
        starts.calls.append(dict(Counter(self._cloud.cloud.calls) - before))


def _phases(output: str) -> dict[str, float]:
    """Return the seconds of each phase, from what a start has said."""
    said = [line.split(" ", 2) for line in output.splitlines() if line.startswith("::phase ")]
    begins = [(phase, float(at)) for _, at, phase in said]
    return {phase: end - begin for (phase, begin), (_, end) in itertools.pairwise(begins)}


def _install_peer(folder: Path) -> str:
    """Make a virtual environment with dask-cloudprovider and our versions of what both need; return its Python."""
    ours = recipe(IMAGE, own_wheel())
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([*ours.requirements, *ours.constraints]))
    python = str(folder / "peer" / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", folder / "peer"], check=True)
    # It encrypts unless told otherwise, and does not require what it encrypts with.
    wanted = [PEER, "cryptography"]
    subprocess.run([python, "-m", "pip", "install", "-qq", "-c", constraints, *wanted], check=True)
    return python


def _bake(folder: Path) -> Path:
    """Return a folder with what a start of `IMAGE` leaves on a machine, compiled, as a baked image would have it."""
    network = Network()
    try:
        bench = Bench(network, folder)
        machine = bench.boot()
        bench.skyward(machine)
        # That start has compiled what it imported, not what EC2Cluster's machines import.
        machine.run("cd ~/.cache/skyward/envs/* && bin/python -m compileall -q -j 0 lib", check=False)
        there, unneeded = f"/proc/{machine.pid}/root/root/.cache/skyward", shutil.ignore_patterns("uv-cache")
        baked: Path = shutil.copytree(there, folder / "baked", symlinks=True, ignore=unneeded)
        machine.destroy()
    finally:
        network.close()
    return baked


def measure(rounds: int, report: Callable[[str], None], *, nodes: int, boot_s: Sequence[float]) -> dict[Key, Starts]:
    """Return the starts of each kind, after one of the first two that does not count."""
    found = {(late_s, kind): Starts() for late_s in boot_s for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SKYWARD_DATA_DIR"] = str(folder / "data")
        cloud = Emulated("aws", baked=_bake(folder))
        os.environ |= cloud.environment
        try:
            bench = AwsBench(cloud, folder, nodes=nodes)
            for kind in KINDS[:2]:
                bench.start(0.0, kind, Starts())
            for number in range(rounds):
                for key in found if number % 2 else reversed(found):
                    bench.start(*key, found[key])
                    first = sum(found[key].starts[-1][phase] for phase in ("up", "first result"))
                    report(f"round {number + 1}, {key[1]}, booting +{key[0]:g} s: first result after {first:.2f} s")
        finally:
            cloud.close()
    return found


def print_table(found: dict[Key, Starts], rounds: int, *, nodes: int) -> None:
    print(
        f"\nMedians of {rounds} rounds, in seconds; {nodes} machines each; a host with {os.cpu_count()} cores that is "
        "client, cloud and machines\n"
    )
    print("| booting | | first result | ratio | all machines | ratio | calls |")
    print("|---" * 7 + "|")
    for (late_s, kind), starts in found.items():
        peer, calls = found[late_s, "EC2Cluster"], sum(starts.calls[-1].values())
        first, every = starts.to_first_result, starts.to_all_machines
        ratios = first / peer.to_first_result, every / peer.to_all_machines
        print(f"| +{late_s:g} | {kind} | {first:.2f} | {ratios[0]:.2f} | {every:.2f} | {ratios[1]:.2f} | {calls} |")
    print(f"\n| booting | | {' | '.join(PHASES)} |")
    print("|---" * (len(PHASES) + 2) + "|")
    for (late_s, kind), starts in found.items():
        print(f"| +{late_s:g} | {kind} | " + " | ".join(f"{starts.median(phase):.2f}" for phase in PHASES) + " |")
    for (late_s, kind), starts in found.items():
        calls_made = ", ".join(f"{count} {name}" for name, count in sorted(starts.calls[-1].items()))
        print(f"\n{kind}, +{late_s:g}: {calls_made}")
