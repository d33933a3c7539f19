"""How long skyward itself takes to plan and record a large launch, and what it asks AWS for meanwhile.

Usage: python benchmarks/scale.py [--nodes 1000] [--regions 20]

No machines: an emulated AWS (see tests/clouds) gives the offers and counts the calls. Then the same plan and journal
are timed against a cloud that has those offers and answers at once, so what is left is skyward's own time.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests.clouds

import boto3

import skyward as sky
from skyward.cleanup import journal
from skyward.cleanup.pool_record import PoolRecord
from skyward.launch.plan import make_plan
from skyward.launch.provisioner import Provisioner
from skyward.providers.base import LaunchOrder, Machine, Need, Offer
from skyward.spec.pool import PoolSpec
from tests.clouds.emulated import TYPES, Emulated


@dataclass(frozen=True)
class Instant:
    """A cloud that has given offers and whose machines are there at once."""

    found: tuple[Offer, ...]
    name: str = "instant"

    def settings(self) -> Mapping[str, Any]:
        return {}

    def check(self, spec: PoolSpec) -> None:
        pass

    def offers(self, need: Need) -> Sequence[Offer]:  # noqa: ARG002 - it has what it has
        return self.found

    def launch(self, offer: Offer, order: LaunchOrder) -> list[Machine]:
        return [
            Machine(
                id=f"i-{order.token}-{number:05}", provider=self.name, login=order.login, pool_id=order.pool_id,
                region=offer.region, instance_type=offer.instance.name, spot=order.spot, public_ip="192.0.2.1",
                price=offer.instance.price_on_demand, price_on_demand=offer.instance.price_on_demand,
            )
            for number in range(order.count)
        ]  # fmt: skip

    def machines(self, pool_id: str | None = None) -> list[Machine]:  # noqa: ARG002 - nothing stays
        return []

    def terminate(self, machines: Sequence[Machine]) -> None:
        pass

    def admit(self, pool_id: str, region: str) -> None:
        pass

    def end(self, pool_id: str, regions: Sequence[str]) -> None:
        pass


def launch(provider: Any, spec: PoolSpec, pool_id: str) -> tuple[dict[str, float], Provisioner, PoolRecord]:
    """Plan, launch and record a pool; return seconds by phase."""
    began = time.perf_counter()
    plan = make_plan([provider], spec)
    planned = time.perf_counter()
    expires = time.time() + spec.timeout
    record = PoolRecord(pool_id, "clouds", expires)
    provisioner = Provisioner(plan, spec, pool_id, record, lambda _: None, expires)
    machines = provisioner.launch()
    ended = time.perf_counter()
    (entry,) = journal.entries()
    assert len(entry.machines) == len(machines) == spec.nodes
    return {"plan": planned - began, "launch and journal": ended - planned}, provisioner, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--regions", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SKYWARD_DATA_DIR"], os.environ["SKYWARD_CACHE_DIR"] = f"{folder}/data", f"{folder}/cache"
        aws = Emulated("aws", boots=False)
        try:
            os.environ.update(aws.environment)
            there = boto3.client("ec2", "us-east-1").describe_regions()["Regions"]
            provider = sky.AWS(regions=[r["RegionName"] for r in there][: options.regions])
            found = tuple(provider.offers(Need()))
            print(f"offers: {len(found)} in {options.regions} regions, from {sum(aws.cloud.calls.values())} calls")
            provider.offers(Need(machine=TYPES["aws"]))  # kept for a day, as those above
            for number, count in enumerate((1, options.nodes)):
                spec = PoolSpec(nodes=count, machine=TYPES["aws"], allocation="on-demand")
                aws.cloud.calls.clear()
                _, provisioner, record = launch(provider, spec, f"scale{number:03}")
                launched = sum(aws.cloud.calls.values())
                record.left = provisioner.end()
                record.close()
                print(f"{count} nodes: {launched} calls to launch, {sum(aws.cloud.calls.values()) - launched} to end")
        finally:
            aws.close()
        spec = PoolSpec(nodes=options.nodes, cpu=2, selection="cheapest")
        took, provisioner, record = launch(Instant(found), spec, "scale999")
        record.close()
        print(f"{options.nodes} nodes of any of {len(found)} offers, answers at once:")
        for phase, seconds in took.items():
            print(f"  {phase}: {seconds:.2f} s")
        print(f"  total: {sum(took.values()):.2f} s (Python {platform.python_version()}, {os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
