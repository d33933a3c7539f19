"""One launch on AWS: all machines of an order in one fleet request, or none and nothing left of it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from skyward.errors import CapacityError, ProviderError, SpecError, invalid
from skyward.providers import retry
from skyward.providers.aws import pool as of
from skyward.providers.aws.api import Api, attempt, call, pages, quota_of
from skyward.providers.aws.firewall import caller_ranges, make_group, remove_groups
from skyward.providers.aws.iam import is_unready_profile, make_profile, remove_profile, role_name
from skyward.providers.aws.tags import of_order, tags_of
from skyward.providers.base import LaunchOrder, Offer
from skyward.providers.launches import Launches, under_way, undone_by

# Public parameters with the newest images. Ubuntu: "Find Ubuntu images with the AWS Systems Manager Parameter Store",
# documentation.ubuntu.com/aws; NVIDIA: AWS Deep Learning AMIs Developer Guide, release notes of each AMI; Neuron:
# awsdocs-neuron.readthedocs-hosted.com, "Neuron DLAMI User Guide", 2026-01.
_UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/{}/hvm/ebs-gp3/ami-id"
_NVIDIA = "/aws/service/deeplearning/ami/{}/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
# NVIDIA's open driver begins with the generation after V100's.
_NVIDIA_OLD = "/aws/service/deeplearning/ami/{}/base-proprietary-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
_NEURON = "/aws/service/neuron/dlami/base/ubuntu-24.04/latest/image_id"

_PROFILE_S = 60.0  # until EC2 knows a new instance profile, which takes ten seconds or so
_UNDO_S = 15.0  # for a failed launch: what is in use for longer is left to the pool's end


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How machines are reached, and where they may be: what `sky.AWS` was told."""

    zones: tuple[str, ...] = ()
    subnets: tuple[str, ...] = ()
    private_ip: bool = False
    cidrs: tuple[str, ...] = ()
    use_ssm: bool = False
    ami: str | None = None
    disk_gib: int | None = None
    endpoint_url: str | None = None

    def host(self, raw: Mapping[str, Any]) -> str | None:
        """Return what a machine is logged in to by; None while it has no address."""
        if self.use_ssm:
            return str(raw["InstanceId"])
        return raw.get("PrivateIpAddress" if self.private_ip else "PublicIpAddress")


class Launch:
    """A launch that is under way."""

    def __init__(self, api: Api, access: Access, offer: Offer, order: LaunchOrder) -> None:
        self._api, self._access, self._offer, self._order = api, access, offer, order
        self._region = offer.region
        self._ec2 = api.client("ec2", offer.region)
        self._doing = f"launching {order.count} {offer.instance.name} in {offer.region}"
        self._quota = quota_of(offer.instance.name, spot=order.spot, region=offer.region)
        self._doubtful: set[str] = set()  # what was asked for, and it is not known whether it was made
        self._ids: list[str] = []
        self._group: str | None = None
        self.ssh_cidrs: tuple[str, ...] = ()
        """Ranges of addresses from which SSH is let in."""

    def run(self) -> list[dict[str, Any]]:
        """Return the machines, which have their addresses, as AWS describes them."""
        with under_way(self._order.pool_id, self._region, self._access.endpoint_url) as others:
            errors = self._api.api_errors(self._doing, quota=self._quota, spot=self._order.spot)
            with undone_by(lambda: self._undo(others)), errors:
                with others.lock:
                    overrides = self._prepare()
                self._order.on_prepared()
                answer = self._ask(overrides)
                self._ids = [i for some in answer.get("Instances", ()) for i in some["InstanceIds"]]
                if len(self._ids) < self._order.count:
                    raise self._shortage(answer.get("Errors", ()))
                arrived = self._arrived()
                others.has_machines = True
                return arrived

    # --- before -----------------------------------------------------------------------------------------

    def _prepare(self) -> list[dict[str, Any]]:
        """Make what the machines need, and return the places where the fleet may launch them."""
        order, ec2 = self._order, self._ec2
        with ThreadPoolExecutor(1, thread_name_prefix="skyward-aws-image") as thread:
            image = thread.submit(self._image)
            subnets = self._subnets()
            vpc = subnets[0]["VpcId"]
            self.ssh_cidrs = tuple(self._sources(vpc))
            with self._maybe_made("group"):
                self._group = make_group(ec2, vpc, order, self.ssh_cidrs)
        data = self._template(image.result(), self._group)
        if order.volumes or self._access.use_ssm:
            profile = make_profile(self._api, self._region, order, use_ssm=self._access.use_ssm)
            data["IamInstanceProfile"] = {"Name": profile}
        instance = self._offer.instance
        if order.count > 1 and instance.accelerator and instance.metadata.get("can_cluster"):
            data["Placement"] = {"GroupName": of.make_placement(ec2, order)}
        of.make_template(ec2, order, data)
        limit = {"MaxPrice": f"{order.max_price:f}"} if order.spot and order.max_price is not None else {}
        return [{"SubnetId": subnet["SubnetId"], **limit} for subnet in subnets]

    def _template(self, image: Mapping[str, Any], group: str) -> dict[str, Any]:
        access, order = self._access, self._order
        disks = [d["Ebs"].get("VolumeSize", 0) for d in image.get("BlockDeviceMappings", ()) if "Ebs" in d]
        disk = {"VolumeType": "gp3", "VolumeSize": max([access.disk_gib or order.disk_gib, *disks])}
        interface: dict[str, Any] = {"DeviceIndex": 0, "Groups": [group], "DeleteOnTermination": True}
        if not access.private_ip and not access.use_ssm:
            interface["AssociatePublicIpAddress"] = True
        data: dict[str, Any] = {
            "ImageId": image["ImageId"],
            "InstanceType": self._offer.instance.name,
            "UserData": base64.b64encode(order.user_data.cloud_config().encode()).decode(),
            "InstanceInitiatedShutdownBehavior": "terminate",
            # Containers on the machine are one hop further away.
            "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled", "HttpPutResponseHopLimit": 2},
            "NetworkInterfaces": [interface],
            "BlockDeviceMappings": [
                {"DeviceName": image["RootDeviceName"], "Ebs": {**disk, "DeleteOnTermination": True}}
            ],
            "TagSpecifications": [
                {"ResourceType": kind, "Tags": tags_of(order)} for kind in ("instance", "volume")
            ],
        }
        if order.max_price is not None and self._offer.instance.metadata.get("burstable"):
            # Otherwise a busy machine is billed for more than its price: "Unlimited mode", Amazon EC2 User Guide.
            data["CreditSpecification"] = {"CpuCredits": "standard"}
        return data

    def _subnets(self) -> list[dict[str, Any]]:
        """Return the subnets to launch in, of one VPC."""
        access, offer = self._access, self._offer
        if access.subnets:
            filters = [{"Name": "subnet-id", "Values": list(access.subnets)}]
        else:
            filters = [{"Name": "default-for-az", "Values": ["true"]}]
        there = list(pages(self._ec2, "describe_subnets", "Subnets", Filters=filters))
        if not there and access.subnets:
            raise ProviderError(f"AWS: none of {', '.join(access.subnets)} is in {self._region}")
        if not there:
            raise ProviderError(
                f"AWS: there is no default VPC in {self._region}: make one with `aws ec2 create-default-vpc "
                f"--region {self._region}`, or give sky.AWS(subnets=[...])"
            )
        if len({subnet["VpcId"] for subnet in there}) > 1:
            raise ProviderError(f"AWS: subnets {', '.join(access.subnets)} are not all of one VPC")
        zones = {str(s["AvailabilityZone"]) for s in there}
        fit = zones.intersection(offer.zones or zones).intersection(access.zones or zones)
        if not fit:
            raise CapacityError(
                f"AWS: {offer.instance.name} is in {', '.join(offer.zones)}, the subnets are in "
                f"{', '.join(sorted(zones))}{f', but zones={list(access.zones)} is set' if access.zones else ''}",
                rules_out="type",
            )
        # A fleet takes one subnet of each zone: the one with most room is the last here.
        by_room = sorted(there, key=lambda subnet: int(subnet["AvailableIpAddressCount"]))
        by_zone = {str(s["AvailabilityZone"]): s for s in by_room}
        return [by_zone[zone] for zone in sorted(fit)]

    def _sources(self, vpc: str) -> list[str]:
        """Return the ranges of addresses that may reach the machines over SSH."""
        if self._access.use_ssm:
            return []
        private: list[str] = []
        if self._access.private_ip:
            found = self._ec2.describe_vpcs(VpcIds=[vpc])["Vpcs"][0]
            private = [b["CidrBlock"] for b in found.get("CidrBlockAssociationSet", ())] or [found["CidrBlock"]]
        return caller_ranges(self._ec2, self._access.cidrs, private=private)

    def _image(self) -> dict[str, Any]:
        ami, offer = self._access.ami, self._offer
        if ami is None:
            name = _parameter(offer)
            with self._api.api_errors(f"looking up the image {name} in {self._region}; sky.AWS(ami=...) names another"):
                ssm = self._api.client("ssm", self._region)
                ami = str(ssm.get_parameter(Name=name)["Parameter"]["Value"])
        image = image_of(self._api, self._region, ami)
        if image["Architecture"] != offer.architecture:
            raise wrong_image(ami, image["Architecture"], f"{offer.architecture}, which {offer.instance.name} is")
        return image

    # --- the request --------------------------------------------------------------------------------------

    def _ask(self, overrides: list[dict[str, Any]]) -> Mapping[str, Any]:
        """Ask for all machines in one request, all or none, in one zone.

        One zone, as nodes talk to each other: between zones that takes longer, and each GB is billed. The fleet takes
        one of all zones that has room for all of them.
        """
        order = self._order
        options: dict[str, Any] = {
            "SingleInstanceType": True, "SingleAvailabilityZone": True, "MinTargetCapacity": order.count,
            "AllocationStrategy": "price-capacity-optimized" if order.spot else "lowest-price",
        }  # fmt: skip
        template = {"LaunchTemplateName": of.name_of(order), "Version": "$Default"}
        request = {
            "Type": "instant",
            "LaunchTemplateConfigs": [{"LaunchTemplateSpecification": template, "Overrides": overrides}],
            "TargetCapacitySpecification": {
                "TotalTargetCapacity": order.count,
                "DefaultTargetCapacityType": "spot" if order.spot else "on-demand",
            },
            "SpotOptions" if order.spot else "OnDemandOptions": options,
        }
        for number, _ in enumerate(retry.looks(_PROFILE_S, order.pause)):
            # A request that has its answer is not made again under the same token: the answer would be the same.
            token = order.token if not number else f"{order.token}-{number}"
            order.creating()
            with self._maybe_made("machines"):
                answer: Mapping[str, Any] = self._ec2.create_fleet(ClientToken=token, **request)
            errors = answer.get("Errors", ())
            is_early = any(is_unready_profile(e.get("ErrorCode", ""), e.get("ErrorMessage", "")) for e in errors)
            if answer.get("Instances") or not is_early:
                break
        return answer

    @contextmanager
    def _maybe_made(self, what: str) -> Iterator[None]:
        """Note that something may have been made, unless the block ends with an answer."""
        from botocore.exceptions import ClientError

        self._doubtful.add(what)
        try:
            yield
        except ClientError as exc:
            # A refusal is an answer; that something broke at AWS's end is none.
            if exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) < 500:
                self._doubtful.discard(what)
            raise
        self._doubtful.discard(what)

    def _shortage(self, errors: Sequence[Mapping[str, Any]]) -> ProviderError:
        """Return why there are too few machines: what keeps every zone from having them, before what one lacks."""
        causes = dict.fromkeys((e.get("ErrorCode", ""), e.get("ErrorMessage", "")) for e in errors)
        failures = [self._failure(code, message) for code, message in causes]
        graver = [failure for failure in failures if not isinstance(failure, CapacityError)]
        if graver:
            # A quota or a key that lacks a right is the same in all zones; anything else may be of one zone.
            return min(graver, key=lambda failure: type(failure) is ProviderError)
        said = "; ".join(f"{message} ({code})" for code, message in causes) or "AWS gives no reason"
        # What holds of the type in one zone may not hold in the next.
        is_type = bool(failures) and all(failure.rules_out == "type" for failure in failures)
        return CapacityError(
            f"AWS: {self._doing}: {len(self._ids)} can be had: {said}", rules_out="type" if is_type else "offer"
        )

    def _failure(self, code: str, message: str) -> ProviderError:
        return self._api.failure(code, message, self._doing, quota=self._quota, spot=self._order.spot)

    def _arrived(self) -> list[dict[str, Any]]:
        """Return what is known of the machines, once all have their addresses."""
        for _ in retry.looks(self._order.boot_s, self._order.pause):
            found = {raw["InstanceId"]: raw for raw in of.find(self._ec2, of_order(self._order))}
            ours = [found[i] for i in self._ids if i in found]
            for raw in ours:
                self._check_state(raw)
            if len(ours) == len(self._ids) and all(self._access.host(r) and r.get("PrivateIpAddress") for r in ours):
                return ours
        raise ProviderError(
            f"AWS: {self._doing}: machines have no address after {self._order.boot_s:g} s. Raise boot_timeout="
        )

    def _check_state(self, raw: Mapping[str, Any]) -> None:
        state, reason = raw["State"]["Name"], raw.get("StateReason", {})
        if state not in ("pending", "running"):
            said = f"machine {raw['InstanceId']} is {state}: {reason.get('Message') or 'AWS gives no reason'}"
            raise self._failure(reason.get("Code", state), said)

    # --- after a failure ----------------------------------------------------------------------------------

    def _undo(self, others: Launches) -> None:
        """Destroy what was made; also what launches share, unless there are others.

        Raises
        ------
        ProviderError
            Something may be left; the message says what, and why.
        """
        ec2, order, region = self._ec2, self._order, self._region
        ours = of_order(order)

        def machines() -> None:
            of.terminate(ec2, self._ids, recent=self._ids)
            ended = set(self._ids)
            for _ in retry.looks(retry.LISTED_S if "machines" in self._doubtful else 0.0):
                found = {raw["InstanceId"] for raw in of.find(ec2, ours, of.COSTS)} - ended
                of.terminate(ec2, found, recent=found)
                ended |= found
                if len(ended) >= order.count:
                    break

        def shared() -> None:
            if others.count == 1 and not others.has_machines and not of.machines_of(ec2, order.pool_id):
                if order.volumes or self._access.use_ssm:
                    remove_profile(self._api.client("iam", region), role_name(order.pool_id, region))
                known = [self._group] if self._group else []
                for _ in retry.looks(retry.LISTED_S if "group" in self._doubtful else 0.0):
                    remove_groups(ec2, order.pool_id, patience_s=_UNDO_S, known=known)

        name = of.name_of(order)
        steps: list[tuple[str, Callable[[], None]]] = [
            (f"machines in {region}", machines),
            (f"launch template {name} in {region}", lambda: of.remove_template(ec2, name)),
            (f"placement group {name} in {region}", lambda: of.remove_placement(ec2, name, patience_s=_UNDO_S)),
            (f"security group skyward-{order.pool_id} in {region}", shared),
        ]
        with others.lock:
            left = attempt(self._api, steps)
        if left:
            raise ProviderError("; ".join(left))


# --- images -------------------------------------------------------------------------------------------------


def _parameter(offer: Offer) -> str:
    """Return the name of the public parameter that has the image for a type."""
    accelerator = offer.instance.accelerator
    if not accelerator:
        return _UBUNTU.format("amd64" if offer.architecture == "x86_64" else "arm64")
    if accelerator.startswith(("Trainium", "Inferentia")):
        return _NEURON
    return (_NVIDIA_OLD if accelerator.startswith("V100") else _NVIDIA).format(offer.architecture)


def image_of(api: Api, region: str, ami: str) -> dict[str, Any]:
    """Return what AWS knows of an image.

    Raises
    ------
    SpecError
        There is none of this id in the region.
    """
    ec2 = api.client("ec2", region)
    none = ["InvalidAMIID.NotFound", "InvalidAMIID.Malformed", "InvalidAMIID.Unavailable"]
    with api.api_errors(f"looking up image {ami} in {region}"):
        answer = call(ec2.describe_images, unless=none, ImageIds=[ami])
    if not answer or not answer["Images"]:
        accepted = f"the id of an image in {region}"
        raise invalid("ami", ami, accepted, shown=f"AWS(ami={ami!r})")
    return dict(answer["Images"][0])


def wrong_image(ami: str, architecture: str, wanted: str) -> SpecError:
    accepted = f"an image for {wanted}; this one is for {architecture}"
    return invalid("ami", ami, accepted, shown=f"AWS(ami={ami!r})")
