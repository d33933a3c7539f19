"""A pool's security groups in a region of AWS: SSH from the caller, all traffic between the pool's machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from skyward.errors import ProviderError
from skyward.providers import caller, retry
from skyward.providers.aws.api import call, pages
from skyward.providers.aws.tags import tags_of
from skyward.providers.base import LaunchOrder

_OWN_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn", ".amazonaws.eu")


def make_group(ec2: Any, vpc: str, order: LaunchOrder, sources: Sequence[str]) -> str:
    """Return the id of the pool's security group: all traffic inside it, SSH from `sources`, nothing else."""
    order.creating()
    made = call(
        ec2.create_security_group,
        unless=["InvalidGroup.Duplicate"],
        GroupName=f"skyward-{order.pool_id}",
        Description=_description(order.pool_id),
        VpcId=vpc,
        TagSpecifications=[{"ResourceType": "security-group", "Tags": tags_of(order)}],
    )
    group = str(made["GroupId"]) if made else _group_in(ec2, order.pool_id, vpc)
    _allow(ec2, group, {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]})
    for source in sources:
        _allow(ec2, group, _ssh_from(source))
    return group


def open_firewall(ec2: Any, pool_id: str, sources: Sequence[str]) -> None:
    """Let SSH in from more ranges of addresses."""
    for group in groups_of(ec2, pool_id):
        for source in sources:
            _allow(ec2, group, _ssh_from(source))


def _allow(ec2: Any, group: str, permission: dict[str, Any]) -> None:
    call(
        ec2.authorize_security_group_ingress,
        unless=["InvalidPermission.Duplicate"],
        patiently=["InvalidGroup.NotFound"],  # a group that was just made is not known everywhere at once
        patience_s=20,
        GroupId=group,
        IpPermissions=[permission],
    )


def _ssh_from(source: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}
    if ":" in source:
        return {**rule, "Ipv6Ranges": [{"CidrIpv6": source, "Description": "skyward caller"}]}
    return {**rule, "IpRanges": [{"CidrIp": source, "Description": "skyward caller"}]}


def _description(pool_id: str) -> str:
    return f"skyward pool {pool_id}"


def groups_of(ec2: Any, pool_id: str) -> list[str]:
    """Return the ids of a pool's groups, one for each VPC; `pool_id` may be ``"*"``."""
    ours = {"Name": "description", "Values": [_description(pool_id)]}
    return [str(g["GroupId"]) for g in _groups_named(ec2, pool_id, ours)]


def _groups_named(ec2: Any, pool_id: str, narrowed: Mapping[str, Any]) -> list[dict[str, Any]]:
    filters = [{"Name": "group-name", "Values": [f"skyward-{pool_id}"]}, narrowed]
    return list(pages(ec2, "describe_security_groups", "SecurityGroups", Filters=filters))


def _group_in(ec2: Any, pool_id: str, vpc: str) -> str:
    """Return the id of a pool's group that is in a VPC, though it may not be listed yet."""
    for _ in retry.looks(retry.LISTED_S):
        for group in _groups_named(ec2, pool_id, {"Name": "vpc-id", "Values": [vpc]}):
            if group["Description"] == _description(pool_id):
                return str(group["GroupId"])
            raise ProviderError(f"AWS: {vpc} has a security group skyward-{pool_id} that skyward has not made")
    raise ProviderError(f"AWS: {vpc} has a security group skyward-{pool_id} that is not listed")


def caller_ranges(ec2: Any, cidrs: Sequence[str], *, private: Sequence[str] = ()) -> list[str]:
    """Return the ranges of addresses from which SSH is let in."""
    return caller.caller_ranges("AWS", ec2.meta.endpoint_url, _OWN_DOMAINS, cidrs, private=private)


def remove_groups(ec2: Any, pool_id: str, *, patience_s: float, known: Iterable[str] = ()) -> None:
    """Delete the pool's security groups, which are in use until the last machine is off for good.

    `known` has the ids of those that may not be listed yet.
    """
    for group in sorted({*known, *groups_of(ec2, pool_id)}):
        call(
            ec2.delete_security_group,
            unless=["InvalidGroup.NotFound"],
            patiently=["DependencyViolation", "InvalidGroup.InUse"],
            patience_s=patience_s,
            GroupId=group,
        )
