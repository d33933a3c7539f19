"""CreateFleet of type ``instant``, which moto knows only in outline: pools, strategies, all-or-none, and its errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moto.ec2.exceptions import EC2ClientError
from moto.ec2.utils import random_fleet_id

from tests.clouds.aws import catalog
from tests.clouds.aws.faults import Market, Place
from tests.clouds.aws.launch import Pool, check, launch, resolve, subnets, too_low

if TYPE_CHECKING:
    from tests.clouds.aws.cloud import AwsCloud


@dataclass(frozen=True, slots=True)
class _Option:
    """A pool with the template and the override that lead to it."""

    pool: Pool
    template: Mapping[str, Any]
    override: Mapping[str, Any]
    spec: Mapping[str, Any]

    @property
    def weight(self) -> float:
        return float(self.override.get("WeightedCapacity") or 1)

    def described(self) -> dict[str, Any]:
        return {"LaunchTemplateSpecification": self.template, "Overrides": self.override}


@dataclass(slots=True)
class _Plan:
    """How many of which option; `errors` are those of options that were tried and had too few."""

    market: Market
    counts: list[tuple[_Option, int]] = field(default_factory=list)
    errors: list[tuple[_Option, EC2ClientError]] = field(default_factory=list)

    @property
    def capacity(self) -> float:
        return sum(option.weight * count for option, count in self.counts)


def create(cloud: AwsCloud, backend: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Launch what there is and answer as CreateFleet does."""
    shares = _shares(request["TargetCapacitySpecification"])
    options = {"spot": request.get("SpotOptions", {}), "on-demand": request.get("OnDemandOptions", {})}
    plans: list[_Plan] = []
    for market, target in shares.items():
        if target:
            _check_options(options[market])
            planned = [place for plan in plans for place in _places(plan)]
            plans.append(_plan(cloud, backend, request, market, target, options[market], planned))
    fleet_id = random_fleet_id()
    instances = [
        _start(cloud, backend, request, fleet_id, plan.market, option, count)
        for plan in plans
        for option, count in plan.counts
    ]
    errors = [
        {
            "LaunchTemplateAndOverrides": option.described(),
            "Lifecycle": plan.market,
            "ErrorCode": exc.code,
            "ErrorMessage": exc.message,
        }
        for plan in plans
        for option, exc in plan.errors
    ]
    return {"FleetId": fleet_id, "Instances": instances, "Errors": errors}


def _shares(target: Mapping[str, Any]) -> dict[Market, int]:
    total = int(target["TotalTargetCapacity"])
    spot, steady = int(target.get("SpotTargetCapacity") or 0), int(target.get("OnDemandTargetCapacity") or 0)
    if spot + steady > total:
        raise EC2ClientError(
            "InvalidTargetCapacitySpecification", "The sum of the target capacities exceeds TotalTargetCapacity."
        )
    rest = total - spot - steady
    if target.get("DefaultTargetCapacityType", "on-demand") == "spot":
        return {"on-demand": steady, "spot": spot + rest}
    return {"on-demand": steady + rest, "spot": spot}


def _check_options(options: Mapping[str, Any]) -> None:
    if options.get("MinTargetCapacity") and not _is_single(options):
        # SpotOptionsRequest and OnDemandOptionsRequest, Amazon EC2 API Reference; the code is a guess.
        raise EC2ClientError(
            "InvalidParameterCombination",
            "MinTargetCapacity needs at least one of SingleAvailabilityZone and SingleInstanceType",
        )


def _is_single(options: Mapping[str, Any]) -> bool:
    return bool(options.get("SingleInstanceType") or options.get("SingleAvailabilityZone"))


# --- what to take of what -----------------------------------------------------------------------------------


def _plan(
    cloud: AwsCloud,
    backend: Any,
    request: Mapping[str, Any],
    market: Market,
    target: float,
    options: Mapping[str, Any],
    planned: list[Place],
) -> _Plan:
    found = _options(backend, request, market)
    plan = _Plan(market)
    usable = []
    for option in found:
        try:
            check(cloud, backend, option.spec, option.pool.subnet)
            if refusal := cloud.faults.refusal(option.pool.place()):
                raise EC2ClientError(*refusal)
            limit = option.override.get("MaxPrice") or options.get("MaxPrice")
            if market == "spot" and limit and float(limit) < option.pool.price:
                raise too_low(float(limit), option.pool)
            usable.append(option)
        except EC2ClientError as exc:
            plan.errors.append((option, exc))
    groups = _groups(_sorted(usable, options), options)
    tried = [_fill(cloud, group, market, target, options, planned) for group in groups]
    best = max(tried, key=lambda p: min(p.capacity, target), default=_Plan(market))
    if best.capacity < target:
        plan.errors += [error for p in tried for error in p.errors]
    else:
        plan.errors += best.errors
    if best.capacity >= float(options.get("MinTargetCapacity") or 0):
        plan.counts = best.counts
    return plan


def _options(backend: Any, request: Mapping[str, Any], market: Market) -> list[_Option]:
    found = []
    for config in request["LaunchTemplateConfigs"]:
        template = config["LaunchTemplateSpecification"]
        if not template.get("Version"):
            raise EC2ClientError("MissingParameter", "The request must contain the launch template's Version")
        for override in config.get("Overrides") or [{}]:
            changes = {k: v for k, v in override.items() if k in ("InstanceType", "SubnetId", "ImageId", "Placement")}
            spec = resolve(backend, template, changes)
            if zone := override.get("AvailabilityZone"):
                spec["Placement"] = {**spec.get("Placement", {}), "AvailabilityZone": zone}
            spec["TagSpecifications"] = [
                *spec.get("TagSpecifications", []),
                *(t for t in request.get("TagSpecifications", []) if t["ResourceType"] != "fleet"),
            ]
            for subnet in subnets(backend, spec):
                kind = spec.get("InstanceType", "")
                if kind not in catalog.rows(backend.region_name):
                    raise EC2ClientError("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
                found.append(_Option(Pool(kind, subnet, market), template, override, spec))
    # Two subnets of one zone are the same pool: GitHub aws-samples/aws-plugin-for-slurm 19, 2020-12-05.
    names = [(o.pool.instance_type, o.pool.zone) for o in found]
    if len(set(names)) < len(names):
        raise EC2ClientError("InvalidFleetConfig", "The fleet configuration contains duplicate instance pools.")
    return found


def _sorted(found: Sequence[_Option], options: Mapping[str, Any]) -> list[_Option]:
    strategy = str(options.get("AllocationStrategy") or "lowest-price")
    if "prioritized" in strategy:
        return sorted(found, key=lambda o: float(o.override.get("Priority") or math.inf))
    return sorted(found, key=lambda o: o.pool.price / o.weight)


def _groups(found: Sequence[_Option], options: Mapping[str, Any]) -> list[list[_Option]]:
    """Return the options that may be used together, the best first."""

    def key(option: _Option) -> tuple[str, str]:
        pool = option.pool
        return (
            pool.instance_type if options.get("SingleInstanceType") else "",
            pool.zone if options.get("SingleAvailabilityZone") else "",
        )

    order = list(dict.fromkeys(map(key, found)))
    by_key = sorted(found, key=lambda o: order.index(key(o)))
    return [list(group) for _, group in itertools.groupby(by_key, key)]


def _fill(
    cloud: AwsCloud,
    group: Iterable[_Option],
    market: Market,
    target: float,
    options: Mapping[str, Any],
    planned: Sequence[Place],
) -> _Plan:
    plan = _Plan(market)
    budget = float(options.get("MaxTotalPrice") or math.inf)
    for option in group:
        wanted = math.ceil((target - plan.capacity) / option.weight)
        if wanted <= 0:
            break
        spent = sum(o.pool.price * n for o, n in plan.counts)
        room, problem = option.pool.room(cloud, [*planned, *_places(plan)])
        if (budget - spent) / option.pool.price < min(room, wanted):
            room, problem = int((budget - spent) / option.pool.price), too_low(budget, option.pool)
        if room < wanted:
            plan.errors.append((option, problem))
        if room:
            plan.counts.append((option, min(room, wanted)))
    return plan


def _places(plan: _Plan) -> list[Place]:
    return [option.pool.place() for option, count in plan.counts for _ in range(count)]


def _start(
    cloud: AwsCloud,
    backend: Any,
    request: Mapping[str, Any],
    fleet_id: str,
    market: Market,
    option: _Option,
    count: int,
) -> dict[str, Any]:
    spec = {**option.spec, "ClientToken": request.get("ClientToken")}
    reservation = launch(cloud, backend, option.template, spec, option.pool, count)
    for instance in reservation.instances:
        instance.add_tags({"aws:ec2:fleet-id": fleet_id})
    return {
        "LaunchTemplateAndOverrides": option.described(),
        "Lifecycle": market,
        "InstanceIds": [instance.id for instance in reservation.instances],
        "InstanceType": option.pool.instance_type,
        "AvailabilityZone": option.pool.zone,
    }
