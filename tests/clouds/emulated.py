"""The emulated clouds behind one face, for tests that are the same for all of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import skyward as sky
from tests.clouds.rack import Rack
from tests.waiting import wait_until

NAMES = ("aws", "digitalocean", "verda")
TYPES = {"aws": "m6i.large", "digitalocean": "s-4vcpu-8gb", "verda": "CPU.4V.16G"}
"""A type of machine that each has in several regions, without an accelerator."""
_REGIONS = {"aws": "us-east-1", "digitalocean": "nyc1", "verda": "FIN-01"}
_CREATE = {"aws": "CreateFleet", "digitalocean": ("POST", "/v2/droplets"), "verda": ("POST", "/instances")}
_END = {"aws": "TerminateInstances", "digitalocean": ("DELETE", "/v2/droplets"), "verda": ("PUT", "/instances")}


class Emulated:
    """One emulated cloud, with machines that boot unless told otherwise. Owns its rack."""

    def __init__(self, name: str, *, baked: Path | None = None, boots: bool = True) -> None:
        self.name = name
        self.rack = Rack(baked=baked, boots=boots)
        self.cloud: Any = _start(name, self.rack)

    @property
    def environment(self) -> Mapping[str, str]:
        """What its SDK and ours look for."""
        variables: Mapping[str, str] = self.cloud.environment
        return variables

    @property
    def type(self) -> str:
        return TYPES[self.name]

    @property
    def region(self) -> str:
        return _REGIONS[self.name]

    def provider(self, **options: Any) -> Any:
        """Return skyward's provider for it, in one region unless told otherwise."""
        kind = {"aws": sky.AWS, "digitalocean": sky.DigitalOcean, "verda": sky.Verda}[self.name]
        return kind(**{"region": self.region, **options})

    def left(self) -> list[str]:
        """Return what was made in the account for pools; DigitalOcean's tags that all pools share may stay."""
        found: list[str] = self.cloud.left()
        return [line for line in found if line != "tag skyward" and not line.startswith("tag skyward:owner:")]

    def machines(self) -> list[str]:
        """Return the machines that cost."""
        return [line for line in self.left() if line.startswith(("instance", "droplet"))]

    def calls(self) -> int:
        """Return how many requests there have been so far."""
        return sum(self.cloud.calls.values()) if self.name == "aws" else len(self.cloud.calls)

    def bill(self) -> float:
        """Return USD so far, for machines alone."""
        cost: float = self.cloud.bill(volumes=False) if self.name == "verda" else self.cloud.bill()
        return cost

    def close(self) -> None:
        self.cloud.close()
        self.rack.close()

    # --- faults ---------------------------------------------------------------------------------------------

    @property
    def faults(self) -> Any:
        return self.cloud.faults

    def sell_out(self, machine: str | None = None, region: str | None = None) -> None:
        """Have none of a type in a region."""
        machine, region = machine or self.type, region or self.region
        match self.name:
            case "aws":
                self.faults.no_capacity.add((machine, region))
            case "digitalocean":
                self.faults.sold_out.add((machine, region))
            case _:
                self.faults.capacity |= {(machine, region, spot): 0 for spot in (True, False)}

    def refuse_creates(self) -> None:
        """Have none of the type, as seen only when it is tried."""
        if self.name == "verda":
            self.faults.end_as += ["no_capacity"] * 50
        else:
            self.sell_out()

    def have_only(self, count: int) -> None:
        """Have no more than so many machines of the type."""
        match self.name:
            case "aws":
                self.faults.capacity[self.type, self.region] = count
            case "digitalocean":
                self.faults.only = count
            case _:
                self.faults.capacity |= {(self.type, self.region, spot): count for spot in (True, False)}

    def throttle(self, calls: int) -> None:
        """Answer so many calls of any kind with a refusal to be asked so often."""
        if self.name == "aws":
            self.faults.throttled["*"] = calls
        else:
            self.faults.throttled = calls

    def lose_create_answer(self) -> None:
        """Launch what is asked for next, but lose the answer."""
        if self.name == "aws":
            self.faults.lost[_CREATE["aws"]] = 1
        else:
            self.faults.lost[_CREATE[self.name]] = 1

    def list_late(self, seconds: float) -> None:
        """List machines only so many seconds after they were made."""
        self.cloud.unlisted_s = seconds

    def take_mark(self, pool_id: str) -> None:
        """Take from a pool's machines what they are found by first: their tags, on Verda their names."""
        match self.name:
            case "aws":
                self.cloud.untag(pool_id)
            case "digitalocean":
                self.cloud.delete_tag(f"skyward:pool:{pool_id}")
            case _:
                self.cloud.rename(pool_id)

    def take_long_to_start(self) -> None:
        """Have the next machines take an hour until they have an address."""
        match self.name:
            case "aws":
                self.cloud.pending_s = 3600.0
            case "digitalocean":
                self.cloud.new_s = 3600.0
            case _:
                wait_until(self.cloud.is_settled)  # or those that are being provisioned would take long too
                self.cloud.ordered_s = 3600.0

    def break_end(self, broken: bool) -> None:
        """Have no machine destroyed, until that is taken back."""
        if self.name == "aws":
            self.faults.unavailable[_END["aws"]] = math.inf if broken else 0
        elif broken:
            self.faults.down.add(_END[self.name])
        else:
            self.faults.down.discard(_END[self.name])

    def take_away(self, machine_id: str, notice_s: float = 20.0) -> None:
        """Take a machine back as the cloud does: with notice on AWS, without elsewhere."""
        match self.name:
            case "aws":
                self.cloud.interrupt(machine_id, notice_s=notice_s)
            case "digitalocean":
                self.cloud.lose(machine_id, gone=True)
            case _:
                self.cloud.reclaim(machine_id)


@contextmanager
def emulated_aws() -> Iterator[Emulated]:
    """Emulate AWS for a program that is no test; its own SDK asks it from then on."""
    aws = Emulated("aws")
    try:
        os.environ.update(aws.environment)
        yield aws
    finally:
        aws.close()


def _start(name: str, rack: Rack) -> Any:
    match name:
        case "aws":
            from tests.clouds.aws import AwsCloud

            return AwsCloud(rack)
        case "digitalocean":
            from tests.clouds.digitalocean import DigitalOceanCloud

            return DigitalOceanCloud(rack)
        case _:
            from tests.clouds.verda import VerdaCloud

            return VerdaCloud(rack)
