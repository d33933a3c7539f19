"""The emulated EC2's answers: moto's, but where machines, capacity, types and prices come in."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from moto.core.responses import ActionResult, EmptyResult
from moto.ec2.exceptions import EC2ClientError, InvalidInstanceTypeError
from moto.ec2.responses import EC2Response
from moto.ec2.utils import convert_tag_spec, generic_filter

from tests.clouds.aws import catalog, fleet, launch

if TYPE_CHECKING:
    from tests.clouds.aws.cloud import AwsCloud, Lent


class Ec2(EC2Response):
    """Answers one request; a subclass of it has the cloud."""

    cloud: ClassVar[AwsCloud]

    def call_action(self) -> Any:
        cloud, region, action = self.cloud, self.region, self._get_action()
        with cloud.lock:
            cloud.advance(region)
            token = self.params.get("ClientToken")
            if not token:
                return super().call_action()
            # botocore gives each call a token where the caller gives none, and sends a retried one with the same.
            asked = json.dumps(sorted(self.querystring.items()))
            earlier = cloud.answers.get((region, action, token))
            if earlier is not None and earlier[0] == asked:
                return earlier[1]
            if earlier is not None:
                said = f"The client token '{token}' was used before, with other parameters"
                return self.serialized(ActionResult(EC2ClientError("IdempotentParameterMismatch", said)))
            answer = super().call_action()
            if answer[0] < 300:
                cloud.answers[region, action, token] = (asked, answer)
            return answer

    def serialized(self, action_result: ActionResult) -> Any:
        status, headers, body = super().serialized(action_result)
        return (500 if isinstance(action_result.result, launch.ServerError) else status), headers, body

    # --- machines -------------------------------------------------------------------------------------------

    def describe_instances(self) -> ActionResult:
        for ident in self._get_param("InstanceIds", []):
            self._check_known(ident)
        result = super().describe_instances()
        for reservation in result.result["Reservations"]:  # copies
            reservation.instances = [i for i in reservation.instances if self.cloud.is_listed(i.id)]
        return result

    def _check_known(self, ident: str) -> None:
        if not self.cloud.is_listed(ident):
            raise EC2ClientError("InvalidInstanceID.NotFound", f"The instance ID '{ident}' does not exist")

    def run_instances(self) -> ActionResult:
        self.error_on_dryrun()
        return ActionResult(launch.run(self.cloud, self.ec2_backend, self.params))

    def create_fleet(self) -> ActionResult:
        self.error_on_dryrun()
        if self._get_param("Type", "maintain") != "instant":
            raise EC2ClientError("InvalidParameterValue", "this emulator has only fleets of type instant")
        return ActionResult(fleet.create(self.cloud, self.ec2_backend, self.params))

    def terminate_instances(self) -> ActionResult:
        self.error_on_dryrun()
        ids = self._get_param("InstanceIds", [])
        if not ids:
            raise EC2ClientError("InvalidParameterCombination", "No instances specified")
        for ident in ids:
            self._check_known(ident)
        changed = []
        for instance in self.ec2_backend.get_multi_instances_by_id(ids):
            before = {"Code": instance.state_code, "Name": instance.state}
            self.cloud.terminate(instance.id)
            now = {"Code": instance.state_code, "Name": instance.state}
            changed.append({"InstanceId": instance.id, "CurrentState": now, "PreviousState": before})
        return ActionResult({"TerminatingInstances": changed})

    def stop_instances(self) -> ActionResult:
        found = self.ec2_backend.get_multi_instances_by_id(self._get_param("InstanceIds", []))
        if any(instance.lifecycle == "spot" for instance in found):
            raise EC2ClientError("UnsupportedOperation", "You can't stop a one-time Spot Instance")
        result = super().stop_instances()
        for instance in found:
            self.cloud.stopped(instance.id)
        return result

    def start_instances(self) -> ActionResult:
        result = super().start_instances()
        for name in self._get_param("InstanceIds", []):
            self.cloud.started(name)
        return result

    def create_security_group(self) -> ActionResult:
        result = super().create_security_group()
        self.cloud.made[result.result["GroupId"]] = time.time()
        return result

    def describe_security_groups(self) -> ActionResult:
        result = super().describe_security_groups()
        result.result["SecurityGroups"] = [g for g in result.result["SecurityGroups"] if self.cloud.is_listed(g.id)]
        return result

    def delete_security_group(self) -> ActionResult:
        group = self._get_param("GroupId")
        if any(group == found.id for lent in self._there() for found in lent.instance.security_groups):
            raise EC2ClientError("DependencyViolation", f"resource {group} has a dependent object")
        return super().delete_security_group()

    def _there(self) -> list[Lent]:
        """Return the instances of the region that are not terminated."""
        found = self.cloud.instances.values()
        return [lent for lent in found if lent.region == self.region and lent.instance.state != "terminated"]

    def describe_launch_templates(self) -> ActionResult:
        self.params.setdefault("MaxResults", 200)  # moto's own default is 15, and it has no further pages
        result = super().describe_launch_templates()
        found = result.result["LaunchTemplates"]
        result.result["LaunchTemplates"] = [t for t in found if self.cloud.is_listed(t["LaunchTemplateId"])]
        return result

    def delete_launch_template(self) -> ActionResult:
        name = self._get_param("LaunchTemplateName")
        if name and all(t.name != name for t in self.ec2_backend.launch_templates.values()):
            said = f"The specified launch template, with template name {name}, does not exist."
            raise EC2ClientError("InvalidLaunchTemplateName.NotFoundException", said)
        return super().delete_launch_template()

    def create_launch_template(self) -> ActionResult:
        result = super().create_launch_template()
        self.cloud.made[result.result["LaunchTemplate"]["LaunchTemplateId"]] = time.time()
        return result

    # --- placement groups -----------------------------------------------------------------------------------

    def create_placement_group(self) -> ActionResult:
        self.error_on_dryrun()
        name = self._get_param("GroupName")
        if (self.region, name) in self.cloud.placement_groups:
            raise EC2ClientError("InvalidPlacementGroup.Duplicate", f"The Placement Group '{name}' already exists.")
        tags = convert_tag_spec(self._get_param("TagSpecifications", [])).get("placement-group", {})
        group = {
            "GroupName": name,
            "GroupId": f"pg-{time.monotonic_ns():017x}"[-20:],
            "Strategy": self._get_param("Strategy", "cluster"),
            "State": "available",
            "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
        }
        self.cloud.placement_groups[self.region, name] = group
        self.cloud.made[group["GroupId"]] = time.time()
        return ActionResult({"PlacementGroup": group})

    def describe_placement_groups(self) -> ActionResult:
        found = [group for (region, _), group in self.cloud.placement_groups.items() if region == self.region]
        if names := self._get_param("GroupNames", []):
            found = [group for group in found if group["GroupName"] in names]
            if len(found) < len(names):
                raise EC2ClientError("InvalidPlacementGroup.Unknown", f"The Placement Group '{names}' is unknown.")
        for name, values in self._filters_from_querystring().items():
            found = [group for group in found if _has(group, name, values)]
        return ActionResult({"PlacementGroups": [g for g in found if self.cloud.is_listed(g["GroupId"])]})

    def delete_placement_group(self) -> ActionResult:
        name = self._get_param("GroupName")
        if (self.region, name) not in self.cloud.placement_groups:
            raise EC2ClientError("InvalidPlacementGroup.Unknown", f"The Placement Group '{name}' is unknown.")
        if any(lent.instance.placement.group_name == name for lent in self._there()):
            raise EC2ClientError("InvalidPlacementGroup.InUse", f"The placement group '{name}' is in use")
        del self.cloud.placement_groups[self.region, name]
        return EmptyResult()

    # --- types and prices -----------------------------------------------------------------------------------

    def describe_instance_types(self) -> ActionResult:
        known = catalog.described(self.region)
        names = self._get_param("InstanceTypes", [])
        if unknown := set(names) - set(known):
            raise InvalidInstanceTypeError(unknown, error_type="InvalidInstanceType")
        found = [known[name] for name in names or known]
        if filters := self._filters_from_querystring():
            found = generic_filter(filters, found)
        return self._page("InstanceTypes", found, 100)

    def describe_instance_type_offerings(self) -> ActionResult:
        kind = self._get_param("LocationType", "region")
        if kind not in ("region", "availability-zone"):
            raise EC2ClientError("InvalidParameterValue", "this emulator knows the zones by their names alone")
        found = [
            {"InstanceType": name, "LocationType": kind, "Location": place}
            for name, zones in catalog.offered(self.region).items()
            for place in (zones if kind == "availability-zone" else [self.region])
        ]
        for name, values in self._filters_from_querystring().items():
            field = {"location": "Location", "instance-type": "InstanceType"}[name]
            found = [offering for offering in found if offering[field] in values]
        return self._page("InstanceTypeOfferings", found, 1000)

    def describe_spot_price_history(self) -> ActionResult:
        """Return the price of now, and before it, for who asks for more, one that is half as high again."""
        now = datetime.now(UTC).replace(microsecond=0)
        since = self._get_param("StartTime")
        filters = self._filters_from_querystring()
        kinds = self._get_param("InstanceTypes") or filters.get("instance-type")
        zone = self._get_param("AvailabilityZone")
        places = [zone] if zone else filters.get("availability-zone")
        products = self._get_param("ProductDescriptions") or filters.get("product-description") or ["Linux/UNIX"]
        ages_h = (1.0,) if since is not None and now - _aware(since) < timedelta(hours=6) else (1.0, 30.0)
        found = [
            {
                "InstanceType": name,
                "ProductDescription": "Linux/UNIX",
                "SpotPrice": f"{price * (1 if age_h == 1.0 else 1.5):.6f}",
                "Timestamp": now - timedelta(hours=age_h),
                "AvailabilityZone": place,
            }
            for age_h in ages_h
            for name, zones in catalog.offered(self.region).items()
            for place in zones
            if (not kinds or name in kinds) and (not places or place in places)
            if (price := catalog.price_spot(name, place)) is not None
            if {"Linux/UNIX", "Linux/UNIX (Amazon VPC)"}.intersection(products)
        ]
        return self._page("SpotPriceHistory", found, 1000)

    def _page(self, name: str, found: list[Any], most: int) -> ActionResult:
        start, size = int(self._get_param("NextToken") or 0), int(self._get_param("MaxResults") or most)
        more = str(start + size) if start + size < len(found) else None
        return ActionResult({name: found[start : start + size], "NextToken": more})


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _has(group: dict[str, Any], name: str, values: list[str]) -> bool:
    tags = {tag["Key"]: tag["Value"] for tag in group["Tags"]}
    field = {"group-name": "GroupName", "strategy": "Strategy", "state": "State", "group-id": "GroupId"}.get(name)
    if name == "tag-key":
        return bool(set(values) & set(tags))
    value = group[field] if field else tags.get(name.removeprefix("tag:"))
    return value in values or ("*" in values and value is not None)
