"""All that a pool has in a region of AWS: machines, and beside them a firewall, templates, placement groups and a role.

Each is made under a name and tags that have the pool's id, so that making it twice makes one, and any computer finds
it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from skyward.errors import ProviderError
from skyward.providers import retry
from skyward.providers.aws.api import Api, attempt, call, pages
from skyward.providers.aws.firewall import groups_of, remove_groups
from skyward.providers.aws.iam import remove_profile, role_name
from skyward.providers.aws.tags import POOL, of_pool, tags_of
from skyward.providers.base import LaunchOrder, Machine

COSTS = ("pending", "running", "stopping", "stopped")
"""States that cost, or may again. From "shutting-down" on nothing does: Amazon EC2 User Guide, "Instance lifecycle"."""
MOST = 1000
"""Machines of one launch (`MinTargetCapacity` of CreateFleet, Amazon EC2 API Reference), and ids of one call."""
_VALUES = 200
"""Values of one filter: "Resource filters", Amazon EC2 User Guide."""

_RECENT_S = 600.0  # that EC2 may not know a machine; from then on it may have forgotten it
_END_S = 120.0  # until a machine that was told to end is about to
_GONE_S = 300.0  # until machines are off for good; those with GPUs take minutes


# --- machines -----------------------------------------------------------------------------------------------


def find(ec2: Any, filters: list[dict[str, Any]], states: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the machines that meet filters, in any of `states` where some are named."""
    narrowed = [*filters, {"Name": "instance-state-name", "Values": list(states)}] if states else filters
    groups = pages(
        ec2, "describe_instances", "Reservations", Filters=narrowed, PaginationConfig={"PageSize": MOST}
    )
    return [raw for group in groups for raw in group["Instances"]]


def machines_of(ec2: Any, pool_id: str | None) -> list[dict[str, Any]]:
    """Return the machines of a pool, or of all pools, that cost: by their tag, and by their security group.

    Tags can be deleted. The name and description of a group and the tag that EC2 gives to machines of a fleet can't
    be.
    """
    tagged = find(ec2, [{"Name": "tag-key", "Values": [POOL]}] if pool_id is None else of_pool(pool_id), COSTS)
    groups, inside = groups_of(ec2, pool_id or "*"), []
    for start in range(0, len(groups), _VALUES):
        in_group = {"Name": "instance.group-id", "Values": groups[start : start + _VALUES]}
        inside += find(ec2, [in_group, {"Name": "tag-key", "Values": ["aws:ec2:fleet-id"]}], COSTS)
    return list({raw["InstanceId"]: raw for raw in [*tagged, *inside]}.values())


def pool_of(raw: Mapping[str, Any]) -> str | None:
    """Return the id of a machine's pool, as its tag says, or else its security group."""
    tags = {tag["Key"]: tag["Value"] for tag in raw.get("Tags", ())}
    named = [g["GroupName"] for g in raw.get("SecurityGroups", ()) if g["GroupName"].startswith("skyward-")]
    return tags.get(POOL) or (str(named[0]).removeprefix("skyward-") if named else None)


def recent(machines: Iterable[Machine]) -> set[str]:
    """Return the ids of machines that EC2 may not know yet."""
    since = time.time() - _RECENT_S
    return {machine.id for machine in machines if machine.launched is None or machine.launched > since}


def terminate(ec2: Any, ids: Iterable[str], *, recent: Collection[str] = ()) -> None:
    """Terminate machines, and return when none of them costs anything any more.

    An id that EC2 does not know has ended long ago, unless it is one of `recent`: then it may run all the same, and EC2
    is asked again. See "Eventual consistency in the Amazon EC2 API", Amazon EC2 Developer Guide.

    Raises
    ------
    ProviderError
        Some machines may still run.
    """
    left = sorted(set(ids))
    for _ in retry.looks(retry.LISTED_S):
        ended: set[str] = set()
        for start in range(0, len(left), MOST):
            ended |= _terminate(ec2, left[start : start + MOST])
        left = [i for i in left if i not in ended and i in recent]
        if not left:
            return
    raise ProviderError(f"AWS: machines {', '.join(left)} were launched, but EC2 does not list them yet: they may run")


def _terminate(ec2: Any, ids: Sequence[str]) -> set[str]:
    """Terminate those that EC2 knows, and return their ids when none of them costs anything any more."""
    unknown = ["InvalidInstanceID.NotFound"]
    answer = call(ec2.terminate_instances, unless=unknown, InstanceIds=ids)
    if answer is None:  # one that is not known refuses them all
        ids = [raw["InstanceId"] for raw in _known(ec2, ids)]
        answer = call(ec2.terminate_instances, unless=unknown, InstanceIds=ids) if ids else None
    if answer is None:
        return set()
    ending = answer["TerminatingInstances"]
    sure = {machine["InstanceId"] for machine in ending if machine["CurrentState"]["Name"] not in COSTS}
    _await_end(ec2, [i for i in ids if i not in sure])
    return set(ids)


def _known(ec2: Any, ids: Sequence[str]) -> list[dict[str, Any]]:
    # A filter, unlike a list of ids, may name what does not exist.
    found: list[dict[str, Any]] = []
    for start in range(0, len(ids), _VALUES):
        found += find(ec2, [{"Name": "instance-id", "Values": list(ids[start : start + _VALUES])}])
    return found


def _await_end(ec2: Any, ids: Sequence[str]) -> None:
    if not ids:
        return
    for _ in retry.looks(_END_S):
        ended = {raw["InstanceId"] for raw in _known(ec2, ids) if raw["State"]["Name"] not in COSTS}
        ids = [i for i in ids if i not in ended]
        if not ids:
            return
    raise ProviderError(f"AWS: machines {', '.join(ids)} were told to terminate, but still exist")


# --- template and placement group: of one order -------------------------------------------------------------


def name_of(order: LaunchOrder) -> str:
    return f"skyward-{order.pool_id}-{order.token}"


def make_template(ec2: Any, order: LaunchOrder, data: dict[str, Any]) -> None:
    """Make the launch template of an order, unless it is there: its name does what a token would."""
    order.creating()
    call(
        ec2.create_launch_template,
        unless=["InvalidLaunchTemplateName.AlreadyExistsException"],
        LaunchTemplateName=name_of(order),
        LaunchTemplateData=data,
        TagSpecifications=[{"ResourceType": "launch-template", "Tags": tags_of(order)}],
    )


def make_placement(ec2: Any, order: LaunchOrder) -> str:
    """Return the name of a placement group that keeps an order's machines close to each other."""
    order.creating()
    call(
        ec2.create_placement_group,
        unless=["InvalidPlacementGroup.Duplicate"],
        GroupName=name_of(order),
        Strategy="cluster",
        TagSpecifications=[{"ResourceType": "placement-group", "Tags": tags_of(order)}],
    )
    return name_of(order)


# --- the end ------------------------------------------------------------------------------------------------


def end(api: Api, pool_id: str, region: str) -> list[str]:
    """End all of a pool in a region; return what may be left, and why."""
    ec2, ours, role = api.client("ec2", region), of_pool(pool_id), role_name(pool_id, region)
    began = time.monotonic()
    are_ending = False

    def machines() -> None:
        terminate(ec2, [raw["InstanceId"] for raw in machines_of(ec2, pool_id)])

    def late_machines() -> None:
        nonlocal are_ending
        # Those of a fleet that was asked for right before may not have been listed the first time.
        retry.sleep_until_late(began)
        machines()
        are_ending = True

    def patience_s() -> float:
        # What machines use that could not be told to end does not come free.
        return max(1.0, began + _GONE_S - time.monotonic()) if are_ending else 1.0

    return attempt(
        api,
        [
            (f"machines in {region}", machines),
            (f"launch templates in {region}", lambda: remove_templates(ec2, ours)),
            (f"role {role}", lambda: remove_profile(api.client("iam", region), role)),
            (f"machines in {region}", late_machines),
            (f"launch templates in {region}", lambda: remove_templates(ec2, ours)),
            (f"placement groups in {region}", lambda: remove_placements(ec2, ours, patience_s=patience_s())),
            (
                f"security group skyward-{pool_id} in {region}",
                lambda: remove_groups(ec2, pool_id, patience_s=patience_s()),
            ),
        ],
    )


def remove_templates(ec2: Any, filters: list[dict[str, Any]]) -> None:
    for template in pages(ec2, "describe_launch_templates", "LaunchTemplates", Filters=filters):
        remove_template(ec2, template["LaunchTemplateName"])


def remove_template(ec2: Any, name: str) -> None:
    gone = ["InvalidLaunchTemplateId.NotFound", "InvalidLaunchTemplateName.NotFoundException"]
    call(ec2.delete_launch_template, unless=gone, LaunchTemplateName=name)


def remove_placements(ec2: Any, filters: list[dict[str, Any]], *, patience_s: float) -> None:
    for group in ec2.describe_placement_groups(Filters=filters)["PlacementGroups"]:
        remove_placement(ec2, group["GroupName"], patience_s=patience_s)


def remove_placement(ec2: Any, name: str, *, patience_s: float) -> None:
    call(
        ec2.delete_placement_group,
        unless=["InvalidPlacementGroup.Unknown"],
        patiently=["InvalidPlacementGroup.InUse"],
        patience_s=patience_s,
        GroupName=name,
    )


