"""What the emulated AWS sells: types of the price table with moto's facts on them, zones that have them, prices."""

from __future__ import annotations

import copy
import functools
import json
import zlib
from collections.abc import Iterator
from typing import Any

from moto.ec2.models.availability_zones_and_regions import RegionsAndZonesBackend
from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS, INSTANCE_TYPES, InstanceType

from skyward.providers import prices
from skyward.providers.prices import TableRow

HOME = "us-east-1"


@functools.cache
def _rows() -> dict[str, dict[str, TableRow]]:
    found: dict[str, dict[str, TableRow]] = {}
    for row in prices.table("aws"):
        found.setdefault(row.region, {})[row.instance_type] = row
    return found


def rows(region: str) -> dict[str, TableRow]:
    """Return what is sold in a region, by type; regions that the table lacks sell what us-east-1 does."""
    return _rows().get(region, _rows()[HOME])


def regions() -> list[str]:
    return [r.name for r in RegionsAndZonesBackend.regions if not r.name.startswith(("cn-", "us-gov-"))]


def zones(region: str) -> list[str]:
    return [zone.name for zone in RegionsAndZonesBackend.zones.get(region, [])]


@functools.cache
def offered(region: str) -> dict[str, list[str]]:
    """Return the zones of each type; all of the region for types that moto does not place in it."""
    found: dict[str, list[str]] = {}
    for offering in INSTANCE_TYPE_OFFERINGS["availability-zone"].get(region, []):
        if offering["InstanceType"] in rows(region) and offering["Location"] in zones(region):
            found.setdefault(offering["InstanceType"], []).append(offering["Location"])
    return {name: sorted(found.get(name, zones(region))) for name in rows(region)}


@functools.cache
def described(region: str) -> dict[str, InstanceType]:
    """Return the types of a region as DescribeInstanceTypes shows them."""
    return {name: _described(row) for name, row in rows(region).items()}


def _described(row: TableRow) -> InstanceType:
    found = InstanceType.__new__(InstanceType)
    found.update(copy.deepcopy(INSTANCE_TYPES.get(row.instance_type) or _built(row)))
    sold = {"on-demand": row.price_on_demand, "spot": row.price_spot}
    found["SupportedUsageClasses"] = [name for name, price in sold.items() if price is not None]
    return found


def _built(row: TableRow) -> dict[str, Any]:
    """Return the facts of a type that moto's data lacks, from the table."""
    device = {
        "Name": row.accelerator,
        "Manufacturer": "NVIDIA",
        "Count": row.accelerator_count,
        "MemoryInfo": {"SizeInMiB": int(row.accelerator_memory_gb * 1024)},
    }
    total = int(row.accelerator_count * row.accelerator_memory_gb * 1024)
    return {
        "InstanceType": row.instance_type,
        "CurrentGeneration": False,
        "BareMetal": False,
        "BurstablePerformanceSupported": False,
        "SupportedRootDeviceTypes": ["ebs"],
        "SupportedVirtualizationTypes": ["hvm"],
        "PlacementGroupInfo": {"SupportedStrategies": ["cluster", "partition", "spread"]},
        "ProcessorInfo": {"SupportedArchitectures": [row.architecture]},
        "VCpuInfo": {"DefaultVCpus": row.vcpus},
        "MemoryInfo": {"SizeInMiB": int(row.memory_gb * 1024)},
        **({"GpuInfo": {"Gpus": [device], "TotalGpuMemoryInMiB": total}} if row.accelerator else {}),
    }


# --- prices -------------------------------------------------------------------------------------------------


def price_on_demand(name: str, region: str) -> float | None:
    return rows(region)[name].price_on_demand


def price_spot(name: str, zone: str) -> float | None:
    """Return what a spot machine costs in a zone: the table's price in one of them, a little more in the others."""
    region = zone[:-1]
    price, places = rows(region)[name].price_spot, offered(region)[name]
    if price is None or zone not in places:
        return None
    after = (places.index(zone) - zlib.crc32(name.encode())) % len(places)
    return round(price * (1 + 0.03 * after), 6)


def price(name: str, zone: str, *, spot: bool) -> float:
    found = price_spot(name, zone) if spot else price_on_demand(name, zone[:-1])
    return float("inf") if found is None else found


# --- the Pricing API ----------------------------------------------------------------------------------------

# What else there is for a machine, and a filter that is too wide finds: its own price, relative to Linux.
_OTHERS: list[tuple[dict[str, str], float]] = [
    ({}, 1.0),
    ({"capacitystatus": "AllocatedCapacityReservation"}, 0.0),
    ({"capacitystatus": "UnusedCapacityReservation"}, 1.0),
    ({"tenancy": "Dedicated"}, 1.1),
    ({"operatingSystem": "Windows"}, 1.9),
    ({"preInstalledSw": "SQL Web"}, 1.4),
]


@functools.cache
def _products() -> list[tuple[dict[str, str], float]]:
    return list(_all_products())


def _all_products() -> Iterator[tuple[dict[str, str], float]]:
    for region in regions():
        for row in rows(region).values():
            if row.price_on_demand is None:
                continue
            common = {
                "instanceType": row.instance_type,
                "regionCode": region,
                "location": location(region),
                "locationType": "AWS Region",
                "operatingSystem": "Linux",
                "tenancy": "Shared",
                "preInstalledSw": "NA",
                "capacitystatus": "Used",
                "licenseModel": "No License required",
                "marketoption": "OnDemand",
                "operation": "RunInstances",
                "servicecode": "AmazonEC2",
                "vcpu": str(row.vcpus),
                "memory": f"{row.memory_gb:g} GiB",
                **({"gpu": str(row.accelerator_count)} if row.accelerator else {}),
            }
            for other, factor in _OTHERS:
                yield {**common, **other}, row.price_on_demand * factor


@functools.cache
def location(region: str) -> str:
    """Return a region's name as the Pricing API has it, which calls Europe EU."""
    import botocore.session

    data = botocore.session.get_session().get_data("endpoints")
    names = {r: facts["description"] for part in data["partitions"] for r, facts in part["regions"].items()}
    return str(names[region]).replace("Europe (", "EU (")


def products(asked: dict[str, Any]) -> dict[str, Any]:
    """Answer GetProducts."""
    wanted = {f["Field"]: f["Value"] for f in asked.get("Filters", [])}
    found = [p for p in _products() if all(p[0].get(field) == value for field, value in wanted.items())]
    start, most = int(asked.get("NextToken") or 0), int(asked.get("MaxResults") or 100)
    page = [json.dumps(_product(*p)) for p in found[start : start + most]]
    more = {"NextToken": str(start + most)} if start + most < len(found) else {}
    return {"FormatVersion": "aws_v1", "PriceList": page, **more}


def _product(attributes: dict[str, str], price: float) -> dict[str, Any]:
    sku = f"{zlib.crc32(json.dumps(attributes).encode()):08X}".ljust(16, "X")
    term, rate = f"{sku}.JRTCKXETXF", f"{sku}.JRTCKXETXF.6YS6EN2CT7"
    dimension = {
        "unit": "Hrs",
        "beginRange": "0",
        "endRange": "Inf",
        "description": f"${price:g} per {attributes['operatingSystem']} {attributes['instanceType']} Instance Hour",
        "appliesTo": [],
        "rateCode": rate,
        "pricePerUnit": {"USD": f"{price:.10f}"},
    }
    return {
        "product": {"productFamily": "Compute Instance", "attributes": attributes, "sku": sku},
        "serviceCode": "AmazonEC2",
        "terms": {
            "OnDemand": {
                term: {
                    "priceDimensions": {rate: dimension},
                    "sku": sku,
                    "effectiveDate": "2025-07-01T00:00:00Z",
                    "offerTermCode": "JRTCKXETXF",
                    "termAttributes": {},
                }
            }
        },
        "version": "20250701000000",
        "publicationDate": "2025-07-01T00:00:00Z",
    }
