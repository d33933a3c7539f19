"""The role of a pool's machines on AWS, with the rights that its volumes and SSM need."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from skyward.providers.aws.api import Api, call
from skyward.providers.aws.tags import tags_of
from skyward.providers.base import LaunchOrder
from skyward.spec.volume import S3Volume

_TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}
_THERE = ["EntityAlreadyExists"]
_GONE = ["NoSuchEntity"]


def role_name(pool_id: str, region: str) -> str:
    # IAM is one for all regions; a role for each lets a region's end be told from the pool's.
    return f"skyward-{pool_id}-{region}"


def make_profile(api: Api, region: str, order: LaunchOrder, *, use_ssm: bool) -> str:
    """Return the name of an instance profile that may use the pool's volumes, and Session Manager if asked to."""
    iam, name, partition = api.client("iam", region), role_name(order.pool_id, region), api.arn_partition(region)
    tags = tags_of(order)
    order.creating()
    call(iam.create_role, unless=_THERE, RoleName=name, AssumeRolePolicyDocument=json.dumps(_TRUST), Tags=tags)
    policy = bucket_policy(order.volumes, partition)
    if policy["Statement"]:
        iam.put_role_policy(RoleName=name, PolicyName="volumes", PolicyDocument=json.dumps(policy))
    if use_ssm:
        managed = f"arn:{partition}:iam::aws:policy/AmazonSSMManagedInstanceCore"
        iam.attach_role_policy(RoleName=name, PolicyArn=managed)
    order.creating()
    call(iam.create_instance_profile, unless=_THERE, InstanceProfileName=name, Tags=tags)
    # A profile holds one role: that the limit is reached means that it has it.
    full = ["LimitExceeded", *_THERE]
    call(iam.add_role_to_instance_profile, unless=full, InstanceProfileName=name, RoleName=name)
    return name


def bucket_policy(volumes: Iterable[S3Volume], partition: str) -> dict[str, Any]:
    """Return the policy that allows what `volumes` need, under their prefixes alone."""
    statements: list[dict[str, Any]] = []
    for volume in volumes:
        if volume.endpoint_url is not None:
            continue  # not S3: IAM has no say there
        bucket = f"arn:{partition}:s3:::{volume.bucket}"
        listing: dict[str, Any] = {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": bucket}
        under = f"{volume.prefix.strip('/')}/" if volume.prefix.strip("/") else ""
        if under:
            listing["Condition"] = {"StringLike": {"s3:prefix": [f"{under}*"]}}
        actions = ["s3:GetObject"]
        if not volume.read_only:
            # The client sends an ACL with what it writes: see `skyward.scripts.volumes`.
            actions += [
                "s3:PutObject", "s3:PutObjectAcl", "s3:DeleteObject", "s3:AbortMultipartUpload",
                "s3:ListMultipartUploadParts",
            ]  # fmt: skip
        statements += [listing, {"Effect": "Allow", "Action": actions, "Resource": f"{bucket}/{under}*"}]
    return {"Version": "2012-10-17", "Statement": statements}


def is_unready_profile(code: str, message: str) -> bool:
    """Tell whether EC2 has not heard yet of an instance profile that was just made: IAM tells it within seconds."""
    return code.startswith("InvalidParameterValue") and "iaminstanceprofile" in message.lower().replace(" ", "")


def remove_profile(iam: Any, name: str) -> None:
    """Delete an instance profile with its role, as far as they exist."""
    # Who may not even look has made none: most pools need no role, and most users' keys have no rights on IAM.
    none = [*_GONE, "AccessDenied", "AccessDeniedException"]
    role = call(iam.get_role, unless=none, RoleName=name)
    profile = call(iam.get_instance_profile, unless=none, InstanceProfileName=name)
    if profile:
        for held in profile["InstanceProfile"]["Roles"]:
            held_name = held["RoleName"]
            call(iam.remove_role_from_instance_profile, unless=_GONE, InstanceProfileName=name, RoleName=held_name)
        call(iam.delete_instance_profile, unless=_GONE, InstanceProfileName=name)
    if role:
        written = call(iam.list_role_policies, unless=_GONE, RoleName=name) or {}
        for policy in written.get("PolicyNames", ()):
            call(iam.delete_role_policy, unless=_GONE, RoleName=name, PolicyName=policy)
        attached = call(iam.list_attached_role_policies, unless=_GONE, RoleName=name) or {}
        for policy in attached.get("AttachedPolicies", ()):
            call(iam.detach_role_policy, unless=_GONE, RoleName=name, PolicyArn=policy["PolicyArn"])
        call(iam.delete_role, unless=_GONE, RoleName=name)
