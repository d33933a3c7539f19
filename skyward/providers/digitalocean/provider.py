"""Machines of DigitalOcean, through its SDK pydo: created ten at a time, found by their tags, deleted with the pool.

What a pool has there is in `pool`; client, retries and errors are in `api`. Both import the
SDK.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skyward.accelerators.model import known_name
from skyward.errors import CredentialsError
from skyward.providers import prices
from skyward.providers.base import LaunchOrder, Machine, Need, Offer, check_files, check_no_volumes, needs_sdk
from skyward.providers.billing import BILLING
from skyward.providers.caller import check_cidrs, check_variable
from skyward.spec.instance import InstanceSpec
from skyward.spec.pool import PoolSpec
from skyward.spec.validation import Problems, check_bool, check_choice, check_index_url

if TYPE_CHECKING:
    from skyward.providers.digitalocean.client import Client

logger = logging.getLogger(__name__)

# API reference, "List All Data Center Regions", and slugs that became known since; some take only old customers.
REGIONS = (
    "nyc1", "nyc2", "nyc3", "sfo1", "sfo2", "sfo3", "ams2", "ams3", "sgp1", "lon1", "fra1", "tor1", "blr1", "syd1",
    "atl1", "ric1", "mkc1", "mem1",
)  # fmt: skip
_URL = "https://api.digitalocean.com"
_VARIABLES = ("DIGITALOCEAN_TOKEN", "DIGITALOCEAN_ACCESS_TOKEN")

# With drivers: docs.digitalocean.com/products/droplets/getting-started/recommended-gpu-setup, "AI/ML-Ready Image". All
# of NVIDIA's GPUs share images named after the first.
_UBUNTU = "ubuntu-24-04-x64"
_NVIDIA, _NVIDIA_8, _AMD = "gpu-h100x1-base", "gpu-h100x8-base", "gpu-amd-base"


@dataclass(frozen=True, slots=True)
class DigitalOcean:
    """Machines of DigitalOcean: droplets, and those with GPUs.

    A pool's machines are in the default VPC of their region. The pool's firewall allows only this computer to connect,
    over SSH. There are no spot machines. The size determines the disk. A droplet that is switched off is billed until
    it is deleted.

    The token is DIGITALOCEAN_TOKEN or DIGITALOCEAN_ACCESS_TOKEN.

    Parameters
    ----------
    region
        A region such as ``"nyc3"``; None: any region that has the machines.
    endpoint_url
        URL of a service with DigitalOcean's API; None: DIGITALOCEAN_API_URL, or DigitalOcean.
    private_ip
        Log in by the private address, from a machine in the VPC.
    caller_cidrs
        Addresses and ranges that may connect to SSH, such as ``["203.0.113.7", "198.51.100.0/24"]``; empty: those in
        SKYWARD_CALLER_IP, or this computer's address. With `private_ip`, private addresses may connect too.

    Raises
    ------
    SpecError
        An option is invalid.
    """

    region: str | None = None
    endpoint_url: str | None = field(default=None, kw_only=True)
    private_ip: bool = field(default=False, kw_only=True)
    caller_cidrs: Sequence[str] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        problems = Problems("DigitalOcean")
        region = problems.check("region", self.region, _check_region, optional=True)
        problems.check("endpoint_url", self.endpoint_url, check_index_url, optional=True)
        problems.check("private_ip", self.private_ip, check_bool)
        cidrs = problems.check("caller_cidrs", self.caller_cidrs, check_cidrs)
        problems.raise_if_any()
        object.__setattr__(self, "region", region)
        object.__setattr__(self, "caller_cidrs", cidrs)

    @property
    def name(self) -> str:
        return "digitalocean"

    def settings(self) -> Mapping[str, Any]:
        return {
            "region": self.region,
            "endpoint_url": self.endpoint_url,
            "private_ip": self.private_ip,
            "caller_cidrs": list(self.caller_cidrs),
        }

    def check(self, spec: PoolSpec) -> None:
        problems = Problems()
        allocation = spec.allocation
        if allocation.kind == "always-spot" or allocation.spot > 0:
            accepted = (
                "'on-demand', 'cheapest' or 'spot-if-available' with sky.DigitalOcean, which has no spot machines"
            )
            problems.note("allocation", allocation, accepted)
        check_no_volumes(spec, problems, "sky.DigitalOcean")
        if spec.architecture == "arm64":
            problems.note("architecture", spec.architecture, "'x86_64' with sky.DigitalOcean")
        check_variable(problems)
        check_files(spec, problems)
        problems.raise_if_any()

    def offers(self, need: Need) -> Sequence[Offer]:  # noqa: ARG002 - one list has all sizes
        with self._client() as client:
            from skyward.providers.digitalocean.api import explained, pages

            try:
                with explained("list sizes and regions"):
                    sizes = pages(client.do.sizes.list, "sizes")
                    regions = {raw["slug"]: raw for raw in pages(client.do.regions.list, "regions")}
                    return [
                        _offer(size, regions[slug])
                        for size in sizes
                        for slug in size["regions"]
                        if slug in regions and self.region in (None, slug)
                    ]
            except CredentialsError as exc:
                # A token may be let create droplets and not list sizes.
                if getattr(exc.__cause__, "status_code", None) != 403:
                    raise
                logger.warning("using the prices of this release: %s", exc)
        return [_tabled(row) for row in prices.table(self.name) if self.region in (None, row.region)]

    def launch(self, offer: Offer, order: LaunchOrder) -> Sequence[Machine]:
        with self._client() as client:
            from skyward.providers.digitalocean import pool as of

            return of.launch(client, offer, order, _image(offer.instance))

    def machines(self, pool_id: str | None = None) -> Sequence[Machine]:
        with self._client() as client:
            from skyward.providers.digitalocean import pool as of
            from skyward.providers.digitalocean.api import explained

            with explained("list droplets"):
                return of.machines(client, pool_id)

    def terminate(self, machines: Sequence[Machine]) -> None:
        with self._client() as client:
            from skyward.providers.digitalocean import pool as of

            of.destroy(client.do, (int(machine.id) for machine in machines))

    def open_firewall(self, pool_id: str, region: str) -> None:  # noqa: ARG002 - a firewall has no region
        with self._client() as client:
            from skyward.providers.digitalocean.firewall import open_firewall

            open_firewall(client, pool_id)

    def end(self, pool_id: str, regions: Sequence[str]) -> None:  # noqa: ARG002 - tags have no region
        with self._client() as client:
            from skyward.providers.digitalocean import pool as of

            of.end(client, pool_id)

    @contextmanager
    def _client(self) -> Iterator[Client]:
        token = _token()
        with needs_sdk("DigitalOcean", "pydo"):
            from skyward.providers.digitalocean.api import client
            from skyward.providers.digitalocean.client import Client

            url = (self.endpoint_url or os.environ.get("DIGITALOCEAN_API_URL") or _URL).rstrip("/")
            url = url.removesuffix("/v2")  # the SDK has it in its paths
            do = client(token, url)
        try:
            yield Client(do=do, url=url, private_ip=self.private_ip, cidrs=tuple(self.caller_cidrs))
        finally:
            do.close()


def _check_region(value: Any) -> str:
    found: str = check_choice(REGIONS)(value.lower() if isinstance(value, str) else value)
    return found


def token_variable() -> str:
    """Return the name of the variable that has the token; empty when none has."""
    return next((name for name in _VARIABLES if os.environ.get(name, "").strip()), "")


def _token() -> str:
    found = os.environ[name].strip() if (name := token_variable()) else None
    if found is None:
        raise CredentialsError(
            f"there is no token for DigitalOcean: looked for {' and '.join(_VARIABLES)}. Make one at "
            "https://cloud.digitalocean.com/account/api/tokens",
            missing=True,
        )
    return found


# --- offers -------------------------------------------------------------------------------------------------


def _offer(size: Mapping[str, Any], region: Mapping[str, Any]) -> Offer:
    gpus = size.get("gpu_info") or {}
    count = int(gpus.get("count") or 0)
    memory = float((gpus.get("vram") or {}).get("amount") or 0) / max(1, count)  # of all together, in the list
    return Offer(
        provider="digitalocean",
        instance=InstanceSpec(
            size["slug"],
            vcpu=size["vcpus"],
            memory_gb=size["memory"] / 1024,
            accelerator=_accelerator(str(gpus.get("model")), memory) if count else None,
            accelerator_count=count,
            accelerator_memory_gb=memory,
            price_on_demand=size["price_hourly"],
            metadata={
                **BILLING["digitalocean"].metadata(),
                "maximum_usd_per_month": size["price_monthly"],
                "disk_gb": size["disk"],
            },
        ),
        region=region["slug"],
        available=bool(size["available"] and region["available"]),
        available_spot=False,
    )


def _tabled(row: prices.TableRow) -> Offer:
    return Offer(
        provider="digitalocean",
        instance=row.instance(**BILLING["digitalocean"].metadata()),
        region=row.region,
        available_spot=False,
        prices=prices.FROM_TABLE,
    )


def _accelerator(model: str, memory_gb: float) -> str:
    """Return skyward's name of a GPU that DigitalOcean names as in ``"nvidia_rtx4000_ada"``; else what it says."""
    text = model.partition("_")[2] or model
    return known_name(f"{text.replace('_', '-')}-{memory_gb:g}GB", text.replace("_", "-")) or text


def _image(instance: InstanceSpec) -> str:
    if not instance.accelerator:
        return _UBUNTU
    if instance.name.startswith("gpu-mi"):
        return _AMD
    return _NVIDIA_8 if instance.accelerator_count == 8 else _NVIDIA
