"""Machines of Amazon EC2, through boto3: launched in one fleet request, found by their tags, terminated with the pool.

Types and prices are in `offers`, a launch in `launch`, what a pool has in a region in `pool`, clients and errors in
`api`.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from skyward.accelerators.catalog import sold_by
from skyward.errors import CredentialsError, ProviderError
from skyward.providers.aws import pool as of
from skyward.providers.aws.api import DENIED, Api, api, attempt, code_of
from skyward.providers.aws.firewall import caller_ranges, open_firewall
from skyward.providers.aws.launch import Access, Launch, image_of, wrong_image
from skyward.providers.aws.offers import offers_in
from skyward.providers.aws.tags import EXPIRES, OWNER
from skyward.providers.base import LaunchOrder, Login, Machine, Need, Offer, check_files
from skyward.providers.caller import check_cidrs, check_variable
from skyward.spec.pool import PoolSpec
from skyward.spec.validation import Problems, check_bool, check_count, check_index_url, check_strings, check_text

T = TypeVar("T")
logger = logging.getLogger(__name__)

_REGION = r"[a-z]{2,4}(-[a-z]+)+-\d+"


@dataclass(frozen=True, slots=True, init=False)
class AWS:
    """Machines of Amazon EC2.

    The machines of a launch are in one zone, in the default VPC of their region. Only this computer can reach them over
    SSH. Several machines with accelerators are placed close together; EFA is not set up. Prices are those of machines;
    disks, public addresses and traffic are billed separately. Bare metal and burstable types (T) are used only if
    `machine` names one.

    Parameters
    ----------
    region
        None: AWS_REGION, AWS_DEFAULT_REGION, the profile's, or us-east-1.
    use_ssm
        Log in through Session Manager; no port is open. Needs the AWS CLI and its Session Manager plugin on this
        computer, and the permission to create roles.
    regions
        Several regions to choose from, or ``"any"``: all that the account has enabled.
    zones, subnets
        Use only these availability zones (names) or subnets (ids). Subnets of one region must be in one VPC; of several
        subnets in a zone, the one with the most free addresses is used.
    private_ip
        Log in by the private address, from a VPN or a machine in the VPC; SSH is open to the VPC's addresses.
    caller_cidrs
        Addresses and ranges that may connect to SSH, such as ``["203.0.113.7", "198.51.100.0/24"]``; empty: those in
        SKYWARD_CALLER_IP, or this computer's address. With `private_ip`, the VPC's addresses may connect too.
    profile
        A profile of ``~/.aws/config``; None: the one of the environment.
    endpoint_url
        URL of a service with AWS's protocol, instead of AWS.
    ami
        Id of an image with cloud-init and sshd, instead of Ubuntu or AWS's images with drivers.
    disk_gib
        Size of each machine's disk in GiB; None: 64, or what the image needs.

    Raises
    ------
    SpecError
        Some options can't work.
    """

    region: str | None
    use_ssm: bool
    regions: tuple[str, ...] | str | None
    zones: tuple[str, ...]
    subnets: tuple[str, ...]
    private_ip: bool
    caller_cidrs: tuple[str, ...]
    profile: str | None
    endpoint_url: str | None
    ami: str | None
    disk_gib: int | None

    def __init__(
        self,
        region: str | None = None,
        use_ssm: bool = False,
        *,
        regions: Sequence[str] | str | None = None,
        zones: Sequence[str] = (),
        subnets: Sequence[str] = (),
        private_ip: bool = False,
        caller_cidrs: Sequence[str] = (),
        profile: str | None = None,
        endpoint_url: str | None = None,
        ami: str | None = None,
        disk_gib: int | None = None,
    ) -> None:
        problems = Problems("AWS")
        many = _texts(_REGION, "names of regions such as ['us-east-1'], or 'any'", least=1)
        checked = {
            "region": problems.check("region", region, _text(_REGION, "a region such as 'us-east-1'"), optional=True),
            "use_ssm": problems.check("use_ssm", use_ssm, check_bool),
            "regions": regions if regions == "any" else problems.check("regions", regions, many, optional=True),
            "zones": problems.check("zones", zones, _texts(rf"{_REGION}[a-z-].*", "zones such as ['us-east-1a']")),
            "subnets": problems.check("subnets", subnets, _texts(r"subnet-[0-9a-f]+", "ids such as ['subnet-0ab1']")),
            "private_ip": problems.check("private_ip", private_ip, check_bool),
            "caller_cidrs": problems.check("caller_cidrs", caller_cidrs, check_cidrs),
            "profile": problems.check("profile", profile, check_text, optional=True),
            "endpoint_url": problems.check("endpoint_url", endpoint_url, check_index_url, optional=True),
            "ami": problems.check("ami", ami, _text(r"ami-[0-9a-f]+", "an id such as 'ami-0ab1'"), optional=True),
            "disk_gib": problems.check("disk_gib", disk_gib, check_count(8), optional=True),
        }
        if region is not None and regions is not None:
            problems.note("regions", regions, f"None beside region={region!r}: name all of them in regions")
        if use_ssm is True and private_ip is True:
            problems.note("private_ip", private_ip, "False with use_ssm, which logs in by no address")
        if use_ssm is True and caller_cidrs:
            problems.note("caller_cidrs", caller_cidrs, "() with use_ssm, which opens no port")
        problems.raise_if_any()
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        return "aws"

    def settings(self) -> Mapping[str, Any]:
        return {
            "region": self.region,
            "use_ssm": self.use_ssm,
            "regions": list(self.regions) if isinstance(self.regions, tuple) else self.regions,
            "zones": list(self.zones),
            "subnets": list(self.subnets),
            "private_ip": self.private_ip,
            "caller_cidrs": list(self.caller_cidrs),
            "profile": self.profile,
            "endpoint_url": self.endpoint_url,
            "ami": self.ami,
            "disk_gib": self.disk_gib,
        }

    def check(self, spec: PoolSpec) -> None:
        problems = Problems()
        wanted = spec.accelerator
        if wanted is not None and wanted.model not in (models := sold_by(self.name)):
            problems.note("accelerator", str(wanted), f"with sky.AWS one of {', '.join(sorted(models))}")
        if spec.machine is not None and not re.fullmatch(r"[a-z][a-z0-9-]*\.[a-z0-9-]+", spec.machine):
            problems.note("machine", spec.machine, "a type of EC2's such as 'm7i.xlarge'")
        if spec.nodes > of.MOST:
            problems.note("nodes", spec.nodes, f"up to {of.MOST} with sky.AWS, as many as one request may ask for")
        if self.use_ssm and (lacking := [p for p in ("aws", "session-manager-plugin") if not shutil.which(p)]):
            problems.note(
                "use_ssm",
                True,
                f"False while {' and '.join(lacking)} can't be found in PATH: get the AWS CLI at "
                "https://docs.aws.amazon.com/cli/latest/userguide/getting-started-install.html and its plugin at "
                "https://docs.aws.amazon.com/systems-manager/latest/userguide/"
                "session-manager-working-with-install-plugin.html",
            )
        check_variable(problems)
        check_files(spec, problems)
        problems.raise_if_any()

    # --- offers ---------------------------------------------------------------------------------------------

    def offers(self, need: Need) -> list[Offer]:
        api = self._api()

        def ask(region: str) -> list[Offer]:
            found = offers_in(api, region, need, self.zones, endpoint=self.endpoint_url)
            if self.ami is None:
                return found
            built_for = image_of(api, region, self.ami)["Architecture"]
            if need.architecture not in (None, built_for):
                raise wrong_image(self.ami, built_for, str(need.architecture))
            return [offer for offer in found if offer.architecture == built_for]

        found = _each(self._regions(api), ask, leave_out=lambda _: True)
        return [offer for _, offers in found for offer in offers]

    def _api(self) -> Api:
        return api(self.profile, self.endpoint_url)

    def _regions(self, api: Api) -> list[str]:
        """Return the regions to look for machines in."""
        if self.regions == "any":
            return self._enabled(api)
        regions = list(self.regions or [self.region or api.default_region()])
        for region in regions:
            api.check_region(region)
        return regions

    def _enabled(self, api: Api) -> list[str]:
        ec2 = api.client("ec2", api.default_region())
        enabled = [{"Name": "opt-in-status", "Values": ["opt-in-not-required", "opted-in"]}]
        with api.api_errors("listing the regions"):
            return sorted(r["RegionName"] for r in ec2.describe_regions(Filters=enabled)["Regions"])

    # --- machines -------------------------------------------------------------------------------------------

    def launch(self, offer: Offer, order: LaunchOrder) -> list[Machine]:
        launch = Launch(self._api(), self._access(), offer, order)
        found = [self._machine(raw, offer.region, offer=offer, order=order) for raw in launch.run()]
        return [replace(machine, ssh_cidrs=launch.ssh_cidrs) for machine in found]

    def _access(self) -> Access:
        return Access(
            zones=self.zones, subnets=self.subnets, private_ip=self.private_ip, cidrs=self.caller_cidrs,
            use_ssm=self.use_ssm, ami=self.ami, disk_gib=self.disk_gib, endpoint_url=self.endpoint_url,
        )  # fmt: skip

    def machines(self, pool_id: str | None = None) -> list[Machine]:
        api = self._api()

        def ask(region: str) -> list[Machine]:
            ec2 = api.client("ec2", region)
            with api.api_errors(f"listing machines in {region}"):
                return [self._machine(raw, region) for raw in of.machines_of(ec2, pool_id)]

        # Another shell may have launched them, with another region in its environment.
        regions = self._regions(api) if self.region or self.regions else self._enabled(api)
        # Where the account may not look it has launched nothing either.
        found = _each(regions, ask, leave_out=lambda exc: code_of(exc) in DENIED)
        return [machine for _, machines in found for machine in machines]

    def _machine(
        self, raw: Mapping[str, Any], region: str, *, offer: Offer | None = None, order: LaunchOrder | None = None
    ) -> Machine:
        tags = {tag["Key"]: tag["Value"] for tag in raw.get("Tags", ())}
        zone, spot = raw.get("Placement", {}).get("AvailabilityZone"), raw.get("InstanceLifecycle") == "spot"
        login = order.login if order is not None else Login(host="", port=22, user="root")
        host = self._access().host(raw) or ""
        login = replace(login, host=host, proxy_command=self._tunnel(host, region) if self.use_ssm else ())
        on_demand = offer.instance.price_on_demand if offer is not None else None
        price = _spot_price(offer, zone) if spot and offer is not None else on_demand
        return Machine(
            id=raw["InstanceId"],
            provider=self.name,
            login=login,
            private_ip=raw.get("PrivateIpAddress"),
            public_ip=raw.get("PublicIpAddress"),
            instance_type=raw["InstanceType"],
            region=region,
            zone=zone,
            spot=spot,
            price=price,
            price_on_demand=on_demand,
            launched=raw["LaunchTime"].timestamp(),
            pool_id=of.pool_of(raw),
            owner=tags.get(OWNER),
            expires=_number(tags.get(EXPIRES)),
        )

    def _tunnel(self, machine: str, region: str) -> tuple[str, ...]:
        profile = ("--profile", self.profile) if self.profile else ()
        endpoint = ("--endpoint-url", self.endpoint_url) if self.endpoint_url else ()
        return (
            "aws", "ssm", "start-session", "--target", machine, "--document-name", "AWS-StartSSHSession",
            "--parameters", "portNumber=22", "--region", region, *profile, *endpoint,
        )  # fmt: skip

    def terminate(self, machines: Sequence[Machine]) -> None:
        api = self._api()
        by_region: dict[str, list[str]] = {}
        recent = of.recent(machines)
        for machine in machines:
            by_region.setdefault(machine.region or api.default_region(), []).append(machine.id)

        def end(region: str) -> list[str]:
            ids, ec2 = by_region[region], api.client("ec2", region)
            return attempt(api, [(f"{len(ids)} machines in {region}", lambda: of.terminate(ec2, ids, recent=recent))])

        _everywhere(list(by_region), end)

    def end(self, pool_id: str, regions: Sequence[str]) -> None:
        api = self._api()

        _everywhere(sorted(set(regions)), lambda region: of.end(api, pool_id, region), pool_id)

    def open_firewall(self, pool_id: str, region: str) -> None:
        """Let this computer's present address reach a pool's machines over SSH, besides those that could before."""
        if self.use_ssm or (self.private_ip and not self.caller_cidrs):
            return
        api = self._api()
        ec2 = api.client("ec2", region)
        with api.api_errors(f"opening the firewall of pool {pool_id} in {region}"):
            open_firewall(ec2, pool_id, caller_ranges(ec2, self.caller_cidrs))


def _each(
    regions: Sequence[str], ask: Callable[[str], T], *, leave_out: Callable[[ProviderError], bool]
) -> list[tuple[str, T]]:
    """Return what `ask` returns for each region, all asked at once.

    Regions that fail in a way that may be left out are, unless all of them do.
    """

    def answer(region: str) -> T | ProviderError:
        try:
            return ask(region)
        except ProviderError as exc:
            if isinstance(exc, CredentialsError) or not leave_out(exc):
                raise
            return exc

    with ThreadPoolExecutor(min(len(regions), 32) or 1, thread_name_prefix="skyward-aws") as threads:
        answers = list(zip(regions, threads.map(answer, regions), strict=True))
    failed = [found for _, found in answers if isinstance(found, ProviderError)]
    if failed and len(failed) == len(regions):
        raise failed[0]
    for error in failed:
        logger.warning("skipped: %s", error)
    return [(region, found) for region, found in answers if not isinstance(found, ProviderError)]


def _everywhere(regions: Sequence[str], end: Callable[[str], list[str]], pool_id: str | None = None) -> None:
    """End things in all regions at once, whatever becomes of each, and raise once for what may be left."""

    def attempt(region: str) -> list[str]:
        try:
            return end(region)
        except ProviderError as exc:
            return [f"machines in {region} ({exc})"]

    with ThreadPoolExecutor(min(len(regions), 32) or 1, thread_name_prefix="skyward-aws") as threads:
        left = [what for some in threads.map(attempt, regions) for what in some]
    if left:
        again = f"`skyward down {pool_id}`" if pool_id else "`skyward down`"
        raise ProviderError(f"AWS: may be left, and may cost money: {'; '.join(left)}. Try {again}")


# --- facts --------------------------------------------------------------------------------------------------


def _spot_price(offer: Offer, zone: str | None) -> float | None:
    price: float | None = offer.instance.metadata.get("spot_by_zone", {}).get(zone, offer.instance.price_spot)
    return price


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _text(pattern: str, accepted: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(accepted)
        return value

    return check


def _texts(pattern: str, accepted: str, *, least: int = 0) -> Callable[[Any], tuple[str, ...]]:
    def check(value: Any) -> tuple[str, ...]:
        texts = check_strings(value)
        if len(texts) < least or not all(re.fullmatch(pattern, text) for text in texts):
            raise ValueError(accepted)
        return texts

    return check
