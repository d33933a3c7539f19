"""Launching in the emulated EC2: what a launch template and a request ask for, checked as EC2 checks it, then run."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moto.core.types import Base64EncodedString
from moto.core.utils import utcnow
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models.instances import Instance
from moto.ec2.utils import convert_tag_spec, filter_iam_instance_profiles, parse_user_data, random_spot_request_id

from tests.clouds.aws import catalog
from tests.clouds.aws.faults import Market, Place

if TYPE_CHECKING:
    from tests.clouds.aws.cloud import AwsCloud

_USER_DATA_BYTES = 16384
_NO_CAPACITY = {
    "on-demand": "We currently do not have sufficient {} capacity in the Availability Zone you requested ({}).",
    "spot": "There is no Spot capacity available that matches your request. ({} in {})",
}
_QUOTA = {
    "on-demand": (
        "VcpuLimitExceeded",
        "You have requested more vCPU capacity than your current vCPU limit allows for the instance bucket that the "
        "specified instance type belongs to. Please visit http://aws.amazon.com/contact-us/ec2-request to request an "
        "adjustment to this limit.",
    ),
    "spot": ("MaxSpotInstanceCountExceeded", "Max spot instance count exceeded"),
}


class ServerError(EC2ClientError):
    """What EC2 answers with a status of the 500s: "Server error codes" in its API Reference."""


@dataclass(frozen=True, slots=True)
class Pool:
    """One type in one subnet: what a launch takes capacity from."""

    instance_type: str
    subnet: Any
    market: Market

    @property
    def zone(self) -> str:
        return str(self.subnet.availability_zone)

    @property
    def region(self) -> str:
        return self.zone[:-1]

    @property
    def price(self) -> float:
        return catalog.price(self.instance_type, self.zone, spot=self.market == "spot")

    def place(self) -> Place:
        vcpus = catalog.rows(self.region)[self.instance_type].vcpus
        return Place(self.instance_type, self.zone, self.market, vcpus)

    def room(self, cloud: AwsCloud, planned: Iterable[Place] = ()) -> tuple[int, EC2ClientError]:
        """Return how many machines there can be, and the error for those beyond."""
        there = [*cloud.places(), *planned]
        capacity, quota = cloud.faults.room(self.place(), there), cloud.faults.quota_room(self.place(), there)
        if quota < capacity:
            return quota, EC2ClientError(*_QUOTA[self.market])
        message = _NO_CAPACITY[self.market].format(self.instance_type, self.zone)
        return capacity, ServerError("InsufficientInstanceCapacity", message)


def resolve(backend: Any, template: Mapping[str, Any] | None, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request and its launch template say together; the request comes first."""
    asked = {k: v for k, v in request.items() if v is not None}
    if not template:
        return asked
    data = backend._get_template_from_args(template).data
    tags = [*data.get("TagSpecifications", []), *asked.get("TagSpecifications", [])]
    return {**{k: v for k, v in data.items() if v is not None}, **asked, "TagSpecifications": tags}


def interface_of(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is said of the first network interface."""
    found = [nic for nic in spec.get("NetworkInterfaces", []) if int(nic.get("DeviceIndex", 0)) == 0]
    return found[0] if found else {}


def subnets(backend: Any, spec: Mapping[str, Any]) -> list[Any]:
    """Return the subnets that a launch may use: the one that is named, or the default ones of the zone or region."""
    if named := spec.get("SubnetId") or interface_of(spec).get("SubnetId"):
        return [backend.get_subnet(named)]
    defaults = backend.get_default_subnets()
    zone = spec.get("Placement", {}).get("AvailabilityZone") or spec.get("AvailabilityZone")
    if zone and zone not in catalog.zones(backend.region_name):
        raise EC2ClientError("InvalidParameterValue", f"Invalid availability zone: [{zone}]")
    places = [zone] if zone else catalog.offered(backend.region_name).get(spec.get("InstanceType", ""), defaults)
    found = [subnet for name, subnet in sorted(defaults.items()) if name in places]
    if not found:
        raise EC2ClientError("MissingInput", f"No default subnet for availability zone: '{zone}'.")
    return found


# --- checks -------------------------------------------------------------------------------------------------


def check(cloud: AwsCloud, backend: Any, spec: Mapping[str, Any], subnet: Any) -> None:
    """Refuse what EC2 refuses; codes and words are its own where they are known."""
    kind, region = spec.get("InstanceType", "m1.small"), backend.region_name
    if kind not in catalog.rows(region):
        raise EC2ClientError("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
    if subnet.availability_zone not in catalog.offered(region)[kind]:
        raise EC2ClientError(
            "Unsupported",
            f"Your requested instance type ({kind}) is not supported in your requested Availability Zone "
            f"({subnet.availability_zone}). Please retry your request by choosing another.",
        )
    _check_image(backend, spec, kind)
    _check_groups(backend, spec, subnet)
    if name := spec.get("KeyName"):
        backend.describe_key_pairs(key_names=[name])
    data = spec.get("UserData")
    if data and len(text_of(data).encode()) > _USER_DATA_BYTES:
        raise EC2ClientError("InvalidParameterValue", f"User data is limited to {_USER_DATA_BYTES} bytes")
    if profile := spec.get("IamInstanceProfile"):
        _check_profile(cloud, backend, profile)
    if group := spec.get("Placement", {}).get("GroupName"):
        _check_placement(cloud, region, group, kind)


def _check_image(backend: Any, spec: Mapping[str, Any], kind: str) -> None:
    if not spec.get("ImageId"):
        raise EC2ClientError("MissingParameter", "The request must contain the parameter ImageId")
    image = backend.describe_images(ami_ids=[spec["ImageId"]])[0]
    fits = catalog.rows(backend.region_name)[kind].architecture
    if image.architecture != fits:
        raise EC2ClientError(
            "InvalidParameterValue",
            f"The architecture '{fits}' of the specified instance type does not match the architecture "
            f"'{image.architecture}' of the specified AMI.",
        )
    smallest = image.block_device_mappings[0]["Ebs"]["VolumeSize"]
    for mapping in spec.get("BlockDeviceMappings", []):
        size = mapping.get("Ebs", {}).get("VolumeSize")
        if mapping["DeviceName"] == image.root_device_name and size is not None and int(size) < smallest:
            raise EC2ClientError(
                "InvalidBlockDeviceMapping",
                f"Volume of size {size}GB is smaller than snapshot '{image.ebs_snapshot.id}', expect size >= "
                f"{smallest}GB",
            )


def _check_groups(backend: Any, spec: Mapping[str, Any], subnet: Any) -> None:
    if spec.get("NetworkInterfaces") and (spec.get("SecurityGroupIds") or spec.get("SecurityGroups")):
        raise EC2ClientError(
            "InvalidParameterCombination",
            "Network interfaces and an instance-level security groups may not be specified on the same request",
        )
    for group in group_ids(spec):
        found = backend.get_security_group_from_id(group)
        if found is None:
            raise EC2ClientError("InvalidGroup.NotFound", f"The security group '{group}' does not exist")
        if found.vpc_id != subnet.vpc_id:
            raise EC2ClientError(
                "InvalidParameter", f"Security group {group} and subnet {subnet.id} belong to different networks."
            )


def _check_profile(cloud: AwsCloud, backend: Any, asked: Mapping[str, Any]) -> None:
    from moto.core.exceptions import ServiceException

    found = None
    with contextlib.suppress(ServiceException):
        found = _profile(backend, asked)
    age_s = (utcnow() - found.create_date.replace(tzinfo=None)).total_seconds() if found is not None else 0.0
    if found is None or age_s < cloud.faults.profile_delay_s:
        what = "name" if asked.get("Name") else "arn"
        raise EC2ClientError(
            "InvalidParameterValue",
            f"Value ({asked.get('Name') or asked.get('Arn')}) for parameter iamInstanceProfile.{what} is invalid. "
            f"Invalid IAM Instance Profile {what}",
        )


def _profile(backend: Any, asked: Mapping[str, Any]) -> Any:
    return filter_iam_instance_profiles(
        backend.account_id,
        partition=backend.partition,
        iam_instance_profile_arn=asked.get("Arn"),
        iam_instance_profile_name=asked.get("Name"),
    )


def _check_placement(cloud: AwsCloud, region: str, group: str, kind: str) -> None:
    found = cloud.placement_groups.get((region, group))
    if found is None:
        raise EC2ClientError("InvalidPlacementGroup.Unknown", f"The Placement Group '{group}' is unknown.")
    supported = catalog.described(region)[kind].get("PlacementGroupInfo", {}).get("SupportedStrategies", [])
    if found["Strategy"] not in supported:
        raise EC2ClientError(
            "InvalidParameterCombination",
            f"{found['Strategy'].capitalize()} placement groups are not supported by the '{kind}' instance type.",
        )


# --- the launch ---------------------------------------------------------------------------------------------


def group_ids(spec: Mapping[str, Any]) -> list[str]:
    return list(spec.get("SecurityGroupIds") or interface_of(spec).get("Groups") or [])


def text_of(user_data: str | Base64EncodedString) -> str:
    encoded = user_data if isinstance(user_data, Base64EncodedString) else parse_user_data(user_data)
    assert encoded is not None
    try:
        return encoded.decode()
    except UnicodeDecodeError:  # compressed: no test here sends that
        return ""


def launch(
    cloud: AwsCloud, backend: Any, template: Mapping[str, Any] | None, spec: Mapping[str, Any], pool: Pool, count: int
) -> Any:
    """Start machines and return moto's reservation."""
    image = backend.describe_images(ami_ids=[spec["ImageId"]])[0]
    groups = group_ids(spec)
    if not groups and not spec.get("SecurityGroups"):
        groups = [backend.get_security_group_from_name("default", pool.subnet.vpc_id).id]
    tags = convert_tag_spec(spec.get("TagSpecifications", []))
    user_data = spec.get("UserData")
    reservation = backend.run_instances(
        spec["ImageId"],
        count,
        parse_user_data(str(user_data)) if user_data else None,
        spec.get("SecurityGroups", []),
        instance_type=pool.instance_type,
        is_instance_type_default=False,
        region_name=backend.region_name,
        subnet_id=pool.subnet.id,
        associate_public_ip=interface_of(spec).get("AssociatePublicIpAddress"),
        key_name=spec.get("KeyName"),
        security_group_ids=groups,
        tags=tags,
        block_device_mappings=_disks(spec, image),
        ebs_optimized=spec.get("EbsOptimized") or False,
        instance_market_options="spot" if pool.market == "spot" else {},
        instance_initiated_shutdown_behavior=spec.get("InstanceInitiatedShutdownBehavior"),
        launch_template=template or {},
        metadata_options=spec.get("MetadataOptions", {}),
        client_token=spec.get("ClientToken"),
    )
    for instance in reservation.instances:
        _finish(backend, instance, spec, pool)
        cloud.began(backend, instance, pool, text_of(user_data) if user_data else "")
    return reservation


def _disks(spec: Mapping[str, Any], image: Any) -> list[dict[str, Any]]:
    """Return the disks, with the image's own; that one goes with its machine, as public images say."""
    root = {"DeviceName": image.root_device_name, "Ebs": {"VolumeSize": 15, "VolumeType": "gp3"}}
    asked = {m["DeviceName"]: m for m in [root, *spec.get("BlockDeviceMappings", [])]}
    defaults = {"DeleteOnTermination": True, "Encrypted": False}
    return [
        {**m, "Ebs": {**(defaults if name == image.root_device_name else {}), **m.get("Ebs", {})}}
        for name, m in asked.items()
    ]


def _finish(backend: Any, instance: Instance, spec: Mapping[str, Any], pool: Pool) -> None:
    """Add what moto leaves out."""
    for nic in instance.nics.values():
        nic.delete_on_termination = interface_of(spec).get("DeleteOnTermination") is not False
    if profile := spec.get("IamInstanceProfile"):
        found = _profile(backend, profile)
        backend.associate_iam_instance_profile(instance_id=instance.id, iam_instance_profile_name=found.name)
    if group := spec.get("Placement", {}).get("GroupName"):
        instance.placement.group_name = group
    if pool.market == "spot":
        instance.spot_instance_request_id = random_spot_request_id()


def run(cloud: AwsCloud, backend: Any, request: Mapping[str, Any]) -> Any:
    """Do what RunInstances does; return moto's reservation."""
    template = request.get("LaunchTemplate")
    spec = resolve(backend, template, request)
    market: Market = "spot" if spec.get("InstanceMarketOptions", {}).get("MarketType") == "spot" else "on-demand"
    least, most = int(request.get("MinCount", 1)), int(request.get("MaxCount", 1))
    if least > most or least < 1:
        raise EC2ClientError("InvalidParameterValue", f"Invalid value '{least}' for MinCount")
    if spec.get("NetworkInterfaces") and spec.get("SubnetId"):
        raise EC2ClientError(
            "InvalidParameterCombination",
            "Network interfaces and an instance-level subnet ID may not be specified on the same request",
        )
    problem: EC2ClientError | None = None
    for subnet in subnets(backend, spec):
        try:
            check(cloud, backend, spec, subnet)
        except EC2ClientError as exc:
            problem = problem or exc
            continue
        pool = Pool(spec["InstanceType"], subnet, market)
        count, problem = pool.room(cloud)
        limit = spec.get("InstanceMarketOptions", {}).get("SpotOptions", {}).get("MaxPrice")
        if market == "spot" and limit and float(limit) < pool.price:
            problem = too_low(float(limit), pool)
        elif count >= least:
            return launch(cloud, backend, template, spec, pool, min(count, most))
    assert problem is not None
    raise problem


def too_low(limit: float, pool: Pool) -> EC2ClientError:
    return EC2ClientError(
        "SpotMaxPriceTooLow",
        f"Your Spot request price of {limit} is lower than the minimum required Spot request fulfillment price of "
        f"{pool.price}.",
    )


def bootable(user_data: str) -> str:
    """Return user-data as machines in a box take it: what cloud-init makes nothing of, a machine boots without."""
    import yaml

    if re.match("#!", user_data):
        return user_data
    if user_data.startswith("#cloud-config"):
        with contextlib.suppress(yaml.YAMLError):
            if isinstance(yaml.safe_load(user_data), dict):
                return user_data
    if user_data:
        print("user-data is neither a script nor cloud-config; the machine boots without it", file=sys.stderr)
    return ""
