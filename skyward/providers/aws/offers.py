"""What AWS offers: types of machines, the zones that have them, and their prices, live or from the table."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, TypeVar

from skyward.accelerators.catalog import memory_sizes
from skyward.accelerators.model import Accelerator
from skyward.errors import CredentialsError, ProviderError, SpecError
from skyward.providers import prices
from skyward.providers.aws.api import Api, pages
from skyward.providers.base import Need, Offer
from skyward.providers.billing import BILLING
from skyward.spec.instance import InstanceSpec

T = TypeVar("T")
logger = logging.getLogger(__name__)

_PRICING_REGION = "us-east-1"  # one of the three that have the Pricing API; each knows the prices of all


def offers_in(api: Api, region: str, need: Need, zones: Sequence[str], *, endpoint: str | None) -> list[Offer]:
    """Return the types of a region, those in `zones` alone where some are named."""
    place = f"aws:{api.account_key()}:{endpoint or ''}:{region}"
    with ThreadPoolExecutor(4, thread_name_prefix="skyward-aws-offers") as threads:
        asked = threads.submit(_types, api, region, place, need.machine)
        at = threads.submit(_zones, api, region, place, need.machine)
        priced = threads.submit(_on_demand, api, region, place, need.machine)
        spot = threads.submit(_spot, api, region, place, need.machine)
        types, zones_of = asked.result(), at.result()
        (on_demand, said), (by_zone, said_of_spot) = priced.result(), spot.result()
    only = "spot" if said == "live" else "on-demand"
    words = said if said == said_of_spot else f"{only} price: {prices.FROM_TABLE}"
    found = []
    for name, facts in types.items():
        here = tuple(z for z in zones_of.get(name, ()) if not zones or z in zones)
        if here and (name == need.machine or facts["common"]):
            # "" is where the table has its price, which is for no zone in particular.
            spots = {z: p for z, p in by_zone.get(name, {}).items() if z in here or not z}
            found.append(_offer(name, facts, region, here, on_demand.get(name), spots, words))
    return found


def _offer(
    name: str,
    facts: Mapping[str, Any],
    region: str,
    zones: tuple[str, ...],
    on_demand: float | None,
    spots: Mapping[str, float],
    words: str,
) -> Offer:
    instance = InstanceSpec(
        name=name,
        vcpu=facts["vcpu"],
        memory_gb=facts["memory_gb"],
        accelerator=facts["accelerator"],
        accelerator_count=facts["count"],
        accelerator_memory_gb=facts["accelerator_memory_gb"],
        price_on_demand=on_demand,
        price_spot=min(spots.values(), default=None) if facts["spot"] else None,
        metadata={
            **BILLING["aws"].metadata(),
            "spot_by_zone": dict(spots),
            "burstable": facts["burstable"],
            "can_cluster": facts["can_cluster"],
        },
    )
    return Offer(
        provider="aws", instance=instance, region=region, zones=zones, architecture=facts["architecture"], prices=words
    )


# --- types --------------------------------------------------------------------------------------------------


def _types(api: Api, region: str, place: str, machine: str | None) -> dict[str, dict[str, Any]]:
    """Return the types that Linux runs on, by name; all of them when there is none of the name that is asked for."""

    def ask(**narrowed: Any) -> dict[str, dict[str, Any]]:
        ec2 = api.client("ec2", region)
        with api.api_errors(f"listing the types of machines in {region}"):
            raw = list(pages(ec2, "describe_instance_types", "InstanceTypes", **narrowed))
        return {t["InstanceType"]: facts for t in raw if (facts := _facts(t)) is not None}

    return _of_one_or_all(ask, f"{place}:types", machine)


def _of_one_or_all(ask: Callable[..., dict[str, T]], key: str, machine: str | None) -> dict[str, T]:
    """Return what `ask` finds of one type; of all when there is none of that name, or none is named. For a day."""
    found: dict[str, T] = {}
    if machine is not None:
        only = [{"Name": "instance-type", "Values": [machine]}]
        found = prices.cached(f"{key}:{machine}", lambda: ask(Filters=only))
    return found or prices.cached(key, ask)


def _facts(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what matters of a type; None for one that our images don't run on, or that can't be had at once."""
    architectures = raw["ProcessorInfo"]["SupportedArchitectures"]
    architecture = next((a for a in ("x86_64", "arm64") if a in architectures), None)
    classes = raw.get("SupportedUsageClasses", ["on-demand", "spot"])
    if architecture is None or "hvm" not in raw.get("SupportedVirtualizationTypes", ["hvm"]):
        return None
    if "on-demand" not in classes and "spot" not in classes:
        return None  # only in capacity blocks, which are bought ahead
    name, count, memory_gb = _accelerator(raw)
    foreign = not name and any(raw.get(k) for k in ("GpuInfo", "InferenceAcceleratorInfo", "FpgaInfo"))
    burstable = bool(raw.get("BurstablePerformanceSupported"))
    return {
        "vcpu": raw["VCpuInfo"]["DefaultVCpus"],
        "memory_gb": raw["MemoryInfo"]["SizeInMiB"] / 1024,
        "architecture": architecture,
        "accelerator": name,
        "count": count,
        "accelerator_memory_gb": memory_gb,
        "spot": "spot" in classes,
        "burstable": burstable,
        "can_cluster": "cluster" in raw.get("PlacementGroupInfo", {}).get("SupportedStrategies", ()),
        # The others are there only for who asks for them by name: bare metal boots for many minutes, a burstable
        # type's price buys a tenth to a half of its vCPUs, and our images have no drivers for others' accelerators.
        "common": not (raw.get("BareMetal") or burstable or foreign),
    }


def _accelerator(raw: Mapping[str, Any]) -> tuple[str | None, int, float]:
    """Return name, number and memory of a type's accelerators; None for those that our images have no driver for."""
    for device in raw.get("GpuInfo", {}).get("Gpus", []):
        if device.get("Manufacturer") != "NVIDIA":
            continue
        part = device.get("GpuPartitionSize", 1.0)
        name, memory_gb = _named(device["Name"].replace(" Server", ""), device["MemoryInfo"]["SizeInMiB"], part)
        return name, device.get("Count") or device.get("LogicalGpuCount", 1), memory_gb
    for device in raw.get("NeuronInfo", {}).get("NeuronDevices", []):
        name, memory_gb = _named(device["Name"], device["MemoryInfo"]["SizeInMiB"], 1.0)
        return name, device["Count"], memory_gb
    return None, 0, 0.0


def _named(name: str, memory_mib: int, part: float) -> tuple[str, float]:
    """Return our name of an accelerator, and its memory as it is sold."""
    gib = memory_mib / 1024
    if part < 1:
        return f"1/{round(1 / part)} {name}", round(gib, 1)
    try:
        model = Accelerator.parse(name).model
    except SpecError:  # one that the catalogue does not have
        return name, round(gib, 1)
    sizes = memory_sizes(model)
    # AWS counts in MiB, data sheets in GB or GiB. A model of one size is of that size, whatever the list says.
    sold = min(sizes, key=lambda size: min(abs(size - gib), abs(size - gib * 1.073741824)))
    return (model if len(sizes) == 1 else f"{model}-{sold}GB"), float(sold)


def _zones(api: Api, region: str, place: str, machine: str | None) -> dict[str, list[str]]:
    """Return the zones that each type is sold in, which is not whether there are any at present."""

    def ask(**narrowed: Any) -> dict[str, list[str]]:
        ec2 = api.client("ec2", region)
        found: dict[str, list[str]] = {}
        with api.api_errors(f"listing the zones of {region} that have each type"):
            narrowed["LocationType"] = "availability-zone"
            for pair in pages(ec2, "describe_instance_type_offerings", "InstanceTypeOfferings", **narrowed):
                found.setdefault(pair["InstanceType"], []).append(pair["Location"])
        return {name: sorted(zones) for name, zones in found.items()}

    return _of_one_or_all(ask, f"{place}:zones", machine)


# --- prices -------------------------------------------------------------------------------------------------


def _on_demand(api: Api, region: str, place: str, machine: str | None) -> tuple[dict[str, float], str]:
    """Return USD per hour by type, and where the prices are from."""

    def ask() -> dict[str, float]:
        wanted = {
            "regionCode": region, "operatingSystem": "Linux", "tenancy": "Shared", "preInstalledSw": "NA",
            "capacitystatus": "Used", "licenseModel": "No License required",
        } | ({"instanceType": machine} if machine else {})  # fmt: skip
        filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
        pricing = api.client("pricing", _PRICING_REGION)
        with api.api_errors(f"asking for prices in {region}"):
            texts = pages(pricing, "get_products", "PriceList", ServiceCode="AmazonEC2", Filters=filters)
            products = [json.loads(text) for text in texts]
        found = {p["product"]["attributes"]["instanceType"]: _hourly(p) for p in products}
        return {name: price for name, price in found.items() if price}

    def listed() -> dict[str, float]:
        rows = [r for r in prices.table("aws") if r.region == region]
        return {r.instance_type: r.price_on_demand for r in rows if r.price_on_demand is not None}

    return _or_table(lambda: prices.cached(f"{place}:on-demand:{machine or ''}", ask), listed, f"prices in {region}")


def _hourly(product: Mapping[str, Any]) -> float | None:
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term["priceDimensions"].values():
            if dimension.get("unit") == "Hrs":
                return float(dimension["pricePerUnit"].get("USD", 0)) or None
    return None


def _spot(api: Api, region: str, place: str, machine: str | None) -> tuple[dict[str, dict[str, float]], str]:
    """Return USD per hour by type and zone, and where the prices are from."""

    def ask() -> dict[str, dict[str, float]]:
        ec2 = api.client("ec2", region)
        # From now on means the price that holds now: "describe-spot-price-history", Amazon EC2 API Reference.
        wanted: dict[str, Any] = {"ProductDescriptions": ["Linux/UNIX"], "StartTime": datetime.now(UTC)}
        if machine is not None:
            wanted["InstanceTypes"] = [machine]
        found: dict[str, dict[str, float]] = {}
        latest: dict[tuple[str, str], datetime] = {}
        with api.api_errors(f"asking for spot prices in {region}"):
            for row in pages(ec2, "describe_spot_price_history", "SpotPriceHistory", **wanted):
                key = row["InstanceType"], row["AvailabilityZone"]
                if key not in latest or row["Timestamp"] > latest[key]:
                    latest[key] = row["Timestamp"]
                    found.setdefault(key[0], {})[key[1]] = float(row["SpotPrice"])
        return found

    def listed() -> dict[str, dict[str, float]]:
        rows = [r for r in prices.table("aws") if r.region == region]
        return {r.instance_type: {"": r.price_spot} for r in rows if r.price_spot is not None}

    return _or_table(lambda: prices.cached(f"{place}:spot:{machine or ''}", ask), listed, f"spot prices in {region}")


def _or_table(live: Callable[[], Any], listed: Callable[[], Any], what: str) -> tuple[Any, str]:
    try:
        return live(), "live"
    except CredentialsError:
        raise
    except ProviderError as exc:
        logger.warning("%s on AWS are from the %s: %s", what, prices.FROM_TABLE, exc)
        return listed(), prices.FROM_TABLE
