"""Prices that providers ask for rarely: kept for a day, and a table of this release for when they can't be had."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from skyward.spec.instance import InstanceSpec

logger = logging.getLogger(__name__)

FROM_TABLE = "table of this release"
"""What `Offer.prices` says of prices that are not live."""
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """A type of machine in a region, in USD per hour; None: not listed. Accelerator memory is per accelerator."""

    instance_type: str
    region: str
    accelerator: str | None
    accelerator_count: int
    accelerator_memory_gb: float
    vcpus: int
    memory_gb: float
    architecture: str
    price_on_demand: float | None
    price_spot: float | None

    def instance(self, **metadata: Any) -> InstanceSpec:
        """Return the type, at this region's prices."""
        return InstanceSpec(
            self.instance_type,
            vcpu=self.vcpus,
            memory_gb=self.memory_gb,
            accelerator=self.accelerator,
            accelerator_count=self.accelerator_count,
            accelerator_memory_gb=self.accelerator_memory_gb,
            price_on_demand=self.price_on_demand,
            price_spot=self.price_spot,
            metadata=metadata,
        )


def table(provider: str) -> list[TableRow]:
    """Return the rows of ``"aws"``, ``"digitalocean"`` or ``"verda"`` in the table that comes with this release.

    Source: GitHub skypilot-org/skypilot-catalog, ``catalogs/v8/aws/vms.csv`` at
    00148f2af3672e2229b4f7bf8157d5a3f36e3c35, ``catalogs/v8/verda/vms.csv`` at
    000c1d0bf24621f4ac37cfa585f0897c1aa1d9cf, ``catalogs/v5/do/vms.csv`` at
    0e419765cebfa932a1bbae66a74996f68c83e96e: a choice of types; the day of its prices is not known.
    """
    listed = "do" if provider == "digitalocean" else provider
    with Path(__file__).with_name("prices.csv").open(newline="") as file:
        return [_row(raw) for raw in csv.DictReader(file) if raw["provider"] == listed]


def _row(raw: dict[str, str]) -> TableRow:
    def price(name: str) -> float | None:
        return float(raw[name]) if raw[name] else None

    return TableRow(
        instance_type=raw["instance_type"],
        region=raw["region"],
        accelerator=raw["accelerator"] or None,
        accelerator_count=int(raw["accelerator_count"] or 0),
        accelerator_memory_gb=float(raw["accelerator_memory_gb"] or 0),
        vcpus=int(raw["vcpus"]),
        memory_gb=float(raw["memory_gb"]),
        architecture=raw["arch"] or "x86_64",
        price_on_demand=price("price_on_demand"),
        price_spot=price("price_spot"),
    )


def cached(key: str, make: Callable[[], Any]) -> Any:
    """Return what `make` returns, fit for JSON, or what it returned under the same `key` within the last day.

    `key` has all that the value depends on: provider, region, account, endpoint. A cache that can't be read or written
    is done without.
    """
    path = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        kept = json.loads(path.read_text())
        if kept["key"] == key and 0 <= time.time() - kept["at"] < _DAY_S:
            return kept["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    value = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.{time.monotonic_ns()}")
        part.write_text(json.dumps({"key": key, "at": time.time(), "value": value}))
        part.replace(path)
    except OSError as exc:
        logger.warning("prices can't be kept in %s: %s", path.parent, exc)
    return value


def _folder() -> Path:
    return Path(os.environ.get("SKYWARD_CACHE_DIR") or platformdirs.user_cache_path("skyward")) / "prices"
