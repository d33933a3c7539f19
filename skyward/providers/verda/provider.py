"""Machines of Verda (formerly DataCrunch), through its SDK: created side by side, found by name, deleted with the pool.

What a pool has there is in `machines`; services, retries and errors are in `api`. Both import the SDK.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from skyward.accelerators.model import known_name
from skyward.errors import CredentialsError, ProviderError
from skyward.providers import prices
from skyward.providers.base import LaunchOrder, Machine, Need, Offer, check_files, check_no_volumes, needs_sdk
from skyward.providers.billing import BILLING
from skyward.spec.instance import InstanceSpec
from skyward.spec.pool import PoolSpec
from skyward.spec.validation import Problems, check_choice, check_index_url

if TYPE_CHECKING:
    from skyward.providers.verda.api import Api

logger = logging.getLogger(__name__)

REGIONS = ("FIN-01", "FIN-02", "FIN-03", "ICE-01")


@dataclass(frozen=True, slots=True)
class Verda:
    """Machines of Verda, formerly DataCrunch.

    There is no firewall and no private network. The machines have public addresses, where sshd accepts keys only and
    Dask's ports require the pool's TLS certificates. Prices are those of machines; their disks are billed separately.
    Verda charges 10 minutes in advance and refunds unused time after the end. A machine that is switched off is billed
    until it is deleted.

    Credentials are VERDA_CLIENT_ID and VERDA_CLIENT_SECRET, or VERDA_API_KEY as ``"id:secret"``.

    Parameters
    ----------
    region
        FIN-01, FIN-02, FIN-03 or ICE-01; None: the best one.
    endpoint_url
        URL of a service with Verda's API; None: VERDA_BASE_URL, or Verda.

    Raises
    ------
    SpecError
        An option can't work.
    """

    region: str | None = None
    endpoint_url: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        problems = Problems("Verda")
        region = problems.check("region", self.region, _check_region, optional=True)
        problems.check("endpoint_url", self.endpoint_url, check_index_url)
        problems.raise_if_any()
        object.__setattr__(self, "region", region)

    @property
    def name(self) -> str:
        return "verda"

    def settings(self) -> Mapping[str, Any]:
        return {"region": self.region, "endpoint_url": self.endpoint_url}

    def check(self, spec: PoolSpec) -> None:
        problems = Problems()
        check_no_volumes(spec, problems, "sky.Verda")
        if spec.architecture == "arm64":
            problems.note("architecture", spec.architecture, "'x86_64' with sky.Verda")
        check_files(spec, problems)
        problems.raise_if_any()

    def offers(self, need: Need) -> Sequence[Offer]:  # noqa: ARG002 - there are few types, and one list of them
        client_id, url, api = self._account()
        there = {spot: _available(api, spot, self.region) for spot in (False, True)}
        shown = "live"
        try:
            types = prices.cached(f"verda {url} {client_id}", lambda: _live_types(api))
        except CredentialsError:
            raise
        except ProviderError as exc:
            logger.warning("using the prices of this release: %s", exc)
            types, shown = _table_types(), prices.FROM_TABLE
        regions = [self.region] if self.region else sorted({*REGIONS, *there[False], *there[True]})
        return [
            Offer(
                provider=self.name,
                instance=InstanceSpec(**facts, metadata=BILLING["verda"].metadata()),
                region=region,
                architecture="arm64" if re.match(r"G[BH]\d", facts["accelerator"] or "") else "x86_64",
                available=facts["name"] in there[False].get(region, ()),
                available_spot=facts["name"] in there[True].get(region, ()),
                prices=shown,
            )
            for facts in types
            for region in regions
        ]

    def launch(self, offer: Offer, order: LaunchOrder) -> Sequence[Machine]:
        _, _, api = self._account()
        from skyward.providers.verda import machines as of

        return of.launch(api, offer, order)

    def machines(self, pool_id: str | None = None) -> Sequence[Machine]:
        _, _, api = self._account()
        from skyward.providers.verda import machines as of

        return [machine for machine in of.found(api) if pool_id in (None, machine.pool_id)]

    def terminate(self, machines: Sequence[Machine]) -> None:
        _, _, api = self._account()
        from skyward.providers.verda import machines as of

        of.terminate(api, {machine.id for machine in machines})

    def open_firewall(self, pool_id: str, region: str) -> None:
        """Do nothing: there is no firewall that would keep the caller out."""

    def end(self, pool_id: str, regions: Sequence[str]) -> None:
        _, _, api = self._account()
        from skyward.providers.verda import machines as of

        of.end(api, pool_id, set(regions))

    def _account(self) -> tuple[str, str, Api]:
        """Return the id of the credentials, the API's URL and its services."""
        with needs_sdk("Verda", "Verda's SDK"):
            from skyward.providers.verda.api import DEFAULT_URL, LOOKED_FOR, api
        client_id, secret = _credentials(LOOKED_FOR)
        url = (self.endpoint_url or os.environ.get("VERDA_BASE_URL") or DEFAULT_URL).rstrip("/")
        return client_id, url, api(client_id, secret, url)


def _check_region(value: Any) -> str:
    found: str = value.upper() if isinstance(value, str) and value.upper() in REGIONS else check_choice(REGIONS)(value)
    return found


def credentials_variables() -> str:
    """Return the names of the variables that credentials are taken from, where there are some."""
    pair = ("VERDA_CLIENT_ID", "VERDA_CLIENT_SECRET")
    return " and ".join(pair) if all(map(os.environ.get, pair)) else "VERDA_API_KEY"


def _credentials(looked_for: str) -> tuple[str, str]:
    client_id, secret = os.environ.get("VERDA_CLIENT_ID", ""), os.environ.get("VERDA_CLIENT_SECRET", "")
    if client_id and secret:
        return client_id, secret
    only = "; only VERDA_CLIENT_ID is set" if client_id else "; only VERDA_CLIENT_SECRET is set" if secret else ""
    key = os.environ.get("VERDA_API_KEY", "")
    client_id, _, secret = key.partition(":")
    if client_id and secret:
        return client_id, secret
    if key:
        raise CredentialsError("VERDA_API_KEY is not 'id:secret': create a pair at console.verda.com, Keys")
    raise CredentialsError(
        f"there are no credentials for Verda: looked for {looked_for}{only}. Create them at console.verda.com, Keys",
        missing=not only,
    )


# --- offers -------------------------------------------------------------------------------------------------


def _available(api: Api, spot: bool, region: str | None) -> dict[str, set[str]]:
    """Return the types that can be had now, by location."""
    from skyward.providers.verda.api import explained

    with explained("see what is available"):
        rows = api.instances.get_availabilities(is_spot=spot, location_code=region)
        return {row["location_code"]: set(row["availabilities"]) for row in rows}


def _live_types(api: Api) -> list[dict[str, Any]]:
    from skyward.providers.verda.api import explained

    with explained("list types of machines"):
        return [
            _facts(
                InstanceSpec(
                    found.instance_type,
                    vcpu=found.cpu["number_of_cores"],
                    memory_gb=found.memory["size_in_gigabytes"],
                    accelerator=_accelerator(found.gpu["description"]) if found.gpu["number_of_gpus"] else None,
                    accelerator_count=found.gpu["number_of_gpus"],
                    # The API gives the memory of all accelerators together.
                    accelerator_memory_gb=found.gpu_memory["size_in_gigabytes"] / max(1, found.gpu["number_of_gpus"]),
                    price_on_demand=found.price_per_hour or None,
                    price_spot=found.spot_price_per_hour or None,
                )
            )
            for found in api.instance_types.get()
        ]


def _table_types() -> list[dict[str, Any]]:
    """Return the types of this release's table; their prices are the same in every location."""
    types: dict[str, dict[str, Any]] = {}
    for row in prices.table("verda"):
        facts = types.setdefault(row.instance_type, _facts(row.instance()))
        facts["price_on_demand"] = facts["price_on_demand"] or row.price_on_demand
        facts["price_spot"] = facts["price_spot"] or row.price_spot
    return list(types.values())


def _facts(instance: InstanceSpec) -> dict[str, Any]:
    """Return arguments of `InstanceSpec`, fit for JSON."""
    return {name: value for name, value in asdict(instance).items() if name != "metadata"}


def _accelerator(description: str) -> str:
    """Return skyward's name of a GPU as Verda describes it, such as ``"2x RTX PRO 6000 96GB"``; else Verda's."""
    text = re.sub(r"^\d+x ((NVIDIA|Tesla|AMD) )*", "", description)
    # B300s are listed with less memory than they were made with.
    return known_name(text, re.sub(r" \d+GB$", "", text)) or text
