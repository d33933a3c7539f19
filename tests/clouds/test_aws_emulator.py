"""The emulated AWS, asked through boto3."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError

from skyward.providers import prices
from skyward.scripts.dead_man import POWER_OFF
from tests.cloudbox import why_not
from tests.clouds.aws import AwsCloud
from tests.clouds.rack import Rack

UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/{}/hvm/ebs-gp3/ami-id"
NVIDIA = "/aws/service/deeplearning/ami/{}/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
_SESSION = boto3.session.Session()


@pytest.fixture
def cloud() -> Iterator[AwsCloud]:
    with AwsCloud(Rack(boots=False)) as cloud:
        cloud.pending_s = cloud.shutting_down_s = cloud.unlisted_s = cloud.undescribed_s = 0.0
        yield cloud


@pytest.fixture
def booting() -> Iterator[AwsCloud]:
    if reason := why_not():
        pytest.skip(reason)
    rack = Rack()
    try:
        with AwsCloud(rack) as cloud:
            yield cloud
    finally:
        rack.close()


def client(cloud: AwsCloud, service: str = "ec2", region: str = "us-east-1", **options: Any) -> Any:
    options = {"aws_access_key_id": cloud.access_key, "aws_secret_access_key": cloud.secret_key, **options}
    config = Config(retries={"mode": "standard", "total_max_attempts": options.pop("attempts", 1)})
    return _SESSION.client(service, region_name=region, endpoint_url=cloud.url, config=config, **options)


def image(cloud: AwsCloud, region: str = "us-east-1", name: str = UBUNTU.format("amd64")) -> str:
    return str(client(cloud, "ssm", region).get_parameter(Name=name)["Parameter"]["Value"])


def template(cloud: AwsCloud, region: str = "us-east-1", **data: Any) -> dict[str, str]:
    name = f"template-{time.monotonic_ns()}"
    data = {"ImageId": image(cloud, region), "InstanceType": "m6i.large", **data}
    client(cloud, region=region).create_launch_template(LaunchTemplateName=name, LaunchTemplateData=data)
    return {"LaunchTemplateName": name, "Version": "$Default"}


def fleet(
    cloud: AwsCloud, count: int, overrides: list[dict[str, Any]], market: str = "on-demand", **more: Any
) -> dict[str, Any]:
    specification = more.pop("template", None) or template(cloud)
    return dict(
        client(cloud).create_fleet(
            Type="instant",
            LaunchTemplateConfigs=[{"LaunchTemplateSpecification": specification, "Overrides": overrides}],
            TargetCapacitySpecification={"TotalTargetCapacity": count, "DefaultTargetCapacityType": market},
            **more,
        )
    )


def ids(answer: dict[str, Any]) -> list[str]:
    return [i for some in answer.get("Instances", ()) for i in some.get("InstanceIds", [some.get("InstanceId")])]


def described(cloud: AwsCloud, instance_id: str) -> dict[str, Any]:
    answer = client(cloud).describe_instances(InstanceIds=[instance_id])
    return dict(answer["Reservations"][0]["Instances"][0])


def run(cloud: AwsCloud, **request: Any) -> dict[str, Any]:
    given = {"ImageId": image(cloud), "InstanceType": "m6i.large", "MinCount": 1, "MaxCount": 1, **request}
    return dict(client(cloud).run_instances(**given))


def until(what: Callable[[], Any], *, within_s: float = 30.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)
    return found


def code(call: Callable[[], Any]) -> tuple[str, int]:
    with pytest.raises(ClientError) as caught:
        call()
    response = caught.value.response
    return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]


# --- what there is ------------------------------------------------------------------------------------------


def test_types_are_those_of_the_table_with_their_accelerators(cloud: AwsCloud) -> None:
    pages = client(cloud).get_paginator("describe_instance_types").paginate()
    found = {t["InstanceType"]: t for page in pages for t in page["InstanceTypes"]}

    assert set(found) == {r.instance_type for r in prices.table("aws") if r.region == "us-east-1"}
    assert found["p5.48xlarge"]["GpuInfo"]["Gpus"][0]["Name"] == "H100"
    assert found["p3.8xlarge"]["GpuInfo"]["Gpus"][0] == {  # moto's data has no p3 any more
        "Name": "V100", "Manufacturer": "NVIDIA", "Count": 4, "MemoryInfo": {"SizeInMiB": 16384},
    }  # fmt: skip
    assert found["trn1.32xlarge"]["NeuronInfo"]["NeuronDevices"][0]["Count"] == 16
    assert found["m7g.xlarge"]["ProcessorInfo"]["SupportedArchitectures"] == ["arm64"]
    unknown = code(lambda: client(cloud).describe_instance_types(InstanceTypes=["m99.huge"]))
    assert unknown == ("InvalidInstanceType", 400)


def test_types_are_offered_in_zones_of_the_region(cloud: AwsCloud) -> None:
    only = [{"Name": "instance-type", "Values": ["g5.xlarge"]}]
    answer = client(cloud).describe_instance_type_offerings(LocationType="availability-zone", Filters=only)

    zones = {z["ZoneName"] for z in client(cloud).describe_availability_zones()["AvailabilityZones"]}
    assert zones.issuperset(o["Location"] for o in answer["InstanceTypeOfferings"])
    assert {o["InstanceType"] for o in answer["InstanceTypeOfferings"]} == {"g5.xlarge"}


def test_the_lowest_spot_price_of_a_region_is_the_tables(cloud: AwsCloud) -> None:
    row = next(r for r in prices.table("aws") if (r.instance_type, r.region) == ("g5.xlarge", "eu-west-1"))
    now = time.time()
    history = client(cloud, region="eu-west-1").describe_spot_price_history(
        InstanceTypes=["g5.xlarge"], ProductDescriptions=["Linux/UNIX"], StartTime=now
    )["SpotPriceHistory"]

    assert min(float(h["SpotPrice"]) for h in history) == row.price_spot
    assert len({h["AvailabilityZone"] for h in history}) == len(history) > 1


@pytest.mark.parametrize("place", [("regionCode", "eu-west-1"), ("location", "EU (Ireland)")])
def test_the_pricing_api_has_one_product_for_all_filters_together(cloud: AwsCloud, place: tuple[str, str]) -> None:
    wanted = {
        "instanceType": "g5.xlarge", place[0]: place[1], "operatingSystem": "Linux", "tenancy": "Shared",
        "preInstalledSw": "NA", "capacitystatus": "Used",
    }  # fmt: skip
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    found = client(cloud, "pricing").get_products(ServiceCode="AmazonEC2", Filters=filters)["PriceList"]

    (product,) = map(json.loads, found)
    (term,) = product["terms"]["OnDemand"].values()
    (dimension,) = term["priceDimensions"].values()
    row = next(r for r in prices.table("aws") if (r.instance_type, r.region) == ("g5.xlarge", "eu-west-1"))
    assert float(dimension["pricePerUnit"]["USD"]) == row.price_on_demand
    assert product["product"]["attributes"]["regionCode"] == "eu-west-1"


def test_the_pricing_api_has_pages(cloud: AwsCloud) -> None:
    filters = [{"Type": "TERM_MATCH", "Field": "regionCode", "Value": "us-east-1"}]
    pages = list(client(cloud, "pricing").get_paginator("get_products").paginate(
        ServiceCode="AmazonEC2", Filters=filters
    ))  # fmt: skip

    assert len(pages) > 1
    assert len({text for page in pages for text in page["PriceList"]}) == sum(len(p["PriceList"]) for p in pages)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        (UBUNTU.format("amd64"), "x86_64"),
        (UBUNTU.format("arm64"), "arm64"),
        (NVIDIA.format("x86_64"), "x86_64"),
        (NVIDIA.format("arm64"), "arm64"),
    ],
)
def test_public_parameters_name_images(cloud: AwsCloud, name: str, architecture: str) -> None:
    region = "ap-northeast-1"
    (found,) = client(cloud, region=region).describe_images(ImageIds=[image(cloud, region, name)])["Images"]

    assert found["Architecture"] == architecture
    plural = client(cloud, "ssm", region).get_parameters(Names=[name, "/none"])
    assert ([p["Value"] for p in plural["Parameters"]], plural["InvalidParameters"]) == ([found["ImageId"]], ["/none"])
    assert found["RootDeviceName"] in [d["DeviceName"] for d in found["BlockDeviceMappings"]]


def test_the_account_has_regions_an_identity_and_a_default_network(cloud: AwsCloud) -> None:
    assert {"us-east-1", "eu-west-1"} <= {r["RegionName"] for r in client(cloud).describe_regions()["Regions"]}
    assert client(cloud, "sts").get_caller_identity()["Account"] == "123456789012"
    assert client(cloud).describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    assert cloud.left() == []


# --- launching ----------------------------------------------------------------------------------------------


def test_instances_are_found_by_their_tags_and_end(cloud: AwsCloud) -> None:
    ec2 = client(cloud)
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "skyward:pool", "Value": "p"}]}]
    (instance,) = run(cloud, TagSpecifications=tags)["Instances"]
    assert instance["State"]["Name"] == "pending"
    assert "PublicIpAddress" not in instance

    filters = [{"Name": "tag:skyward:pool", "Values": ["p"]}, {"Name": "instance-state-name", "Values": ["running"]}]
    (found,) = ec2.describe_instances(Filters=filters)["Reservations"][0]["Instances"]
    ended = ec2.terminate_instances(InstanceIds=[found["InstanceId"]])["TerminatingInstances"][0]

    assert found["PublicIpAddress"] == found["PrivateIpAddress"]
    assert ended["CurrentState"]["Name"] == "shutting-down"
    assert described(cloud, found["InstanceId"])["State"]["Name"] == "terminated"
    again = ec2.terminate_instances(InstanceIds=[found["InstanceId"]])["TerminatingInstances"][0]
    assert again["CurrentState"]["Name"] == "terminated"
    assert cloud.left() == []


def test_a_token_launches_once(cloud: AwsCloud) -> None:
    first, second = (run(cloud, ClientToken="t", MinCount=2, MaxCount=2) for _ in range(2))

    assert ids(first) == ids(second)
    assert len(cloud.alive()) == 2
    assert code(lambda: run(cloud, ClientToken="t", MinCount=1)) == ("IdempotentParameterMismatch", 400)


def test_a_fleet_launches_once_for_a_token(cloud: AwsCloud) -> None:
    made = template(cloud)
    first, second = (fleet(cloud, 3, [], template=made, ClientToken="t") for _ in range(2))

    assert ids(first) == ids(second)
    assert len(cloud.alive()) == 3
    mismatch = code(lambda: fleet(cloud, 4, [], template=made, ClientToken="t"))
    assert mismatch == ("IdempotentParameterMismatch", 400)


def test_a_fleet_takes_the_cheapest_of_its_pools_and_says_which(cloud: AwsCloud) -> None:
    overrides = [{"InstanceType": "m6i.8xlarge"}, {"InstanceType": "m6i.xlarge"}]
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "skyward:pool", "Value": "p"}]}]
    options = {"AllocationStrategy": "price-capacity-optimized"}
    answer = fleet(cloud, 2, overrides, "spot", SpotOptions=options, TagSpecifications=tags)

    (made,) = answer["Instances"]
    assert (made["Lifecycle"], made["InstanceType"]) == ("spot", "m6i.xlarge")
    assert made["LaunchTemplateAndOverrides"]["Overrides"]["InstanceType"] == "m6i.xlarge"
    instance = described(cloud, ids(answer)[0])
    assert {"Key": "skyward:pool", "Value": "p"} in instance["Tags"]
    assert instance["InstanceLifecycle"] == "spot"
    row = next(r for r in prices.table("aws") if (r.instance_type, r.region) == ("m6i.xlarge", "us-east-1"))
    assert row.price_spot is not None
    assert cloud.bill() == pytest.approx(2 * row.price_spot * 60 / 3600)


def test_a_fleet_stays_in_the_subnet_that_it_is_told(cloud: AwsCloud) -> None:
    subnets = client(cloud).describe_subnets()["Subnets"]
    subnet = max(subnets, key=lambda s: str(s["AvailabilityZone"]))
    answer = fleet(cloud, 1, [{"SubnetId": subnet["SubnetId"], "InstanceType": "t3.large"}])

    assert described(cloud, ids(answer)[0])["SubnetId"] == subnet["SubnetId"]


def test_a_fleet_mixes_spot_and_on_demand(cloud: AwsCloud) -> None:
    answer = client(cloud).create_fleet(
        Type="instant",
        LaunchTemplateConfigs=[{"LaunchTemplateSpecification": template(cloud)}],
        TargetCapacitySpecification={
            "TotalTargetCapacity": 5, "OnDemandTargetCapacity": 1, "DefaultTargetCapacityType": "spot",
        },
    )  # fmt: skip

    assert {i["Lifecycle"]: len(i["InstanceIds"]) for i in answer["Instances"]} == {"on-demand": 1, "spot": 4}


def test_a_fleet_goes_on_where_there_is_capacity(cloud: AwsCloud) -> None:
    cloud.faults.no_capacity.add(("m6i.large", "us-east-1"))
    cloud.faults.capacity["m6i.xlarge", "us-east-1"] = 2
    overrides = [{"InstanceType": t} for t in ("m6i.large", "m6i.xlarge", "m6i.2xlarge")]
    answer = fleet(cloud, 3, overrides)

    found = [described(cloud, i)["InstanceType"] for i in ids(answer)]
    assert sorted(found) == ["m6i.2xlarge", "m6i.xlarge", "m6i.xlarge"]
    assert {e["ErrorCode"] for e in answer["Errors"]} == {"InsufficientInstanceCapacity"}


def test_a_fleet_with_a_minimum_launches_all_or_none(cloud: AwsCloud) -> None:
    cloud.faults.capacity["m6i.large", "us-east-1a"] = 3
    cloud.faults.capacity["m6i.large", "us-east-1"] = 4
    options = {"SingleInstanceType": True, "SingleAvailabilityZone": True}
    none = fleet(cloud, 5, [], OnDemandOptions={**options, "MinTargetCapacity": 5})
    all_ = fleet(cloud, 4, [], OnDemandOptions={**options, "MinTargetCapacity": 4})

    assert ids(none) == []
    assert {e["ErrorCode"] for e in none["Errors"]} == {"InsufficientInstanceCapacity"}
    assert len(ids(all_)) == 4
    zones = {described(cloud, i)["Placement"]["AvailabilityZone"] for i in ids(all_)}
    assert len(zones) == 1
    assert zones != {"us-east-1a"}


def test_spot_above_its_highest_price_is_not_launched(cloud: AwsCloud) -> None:
    answer = fleet(cloud, 1, [{"InstanceType": "m6i.large", "MaxPrice": "0.001"}], "spot")

    assert ids(answer) == []
    assert {e["ErrorCode"] for e in answer["Errors"]} == {"SpotMaxPriceTooLow"}


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"ImageId": "ami-0123456789abcdef0"}, "InvalidAMIID.NotFound"),
        ({"InstanceType": "m99.huge"}, "InvalidParameterValue"),
        ({"InstanceType": "m7g.xlarge"}, "InvalidParameterValue"),
        ({"KeyName": "nobody"}, "InvalidKeyPair.NotFound"),
        ({"SecurityGroupIds": ["sg-0123456789abcdef0"]}, "InvalidGroup.NotFound"),
        ({"SubnetId": "subnet-0123456789abcdef0"}, "InvalidSubnetID.NotFound"),
        ({"UserData": "#" * 16385}, "InvalidParameterValue"),
        ({"IamInstanceProfile": {"Name": "nobody"}}, "InvalidParameterValue"),
        ({"Placement": {"GroupName": "nobody"}}, "InvalidPlacementGroup.Unknown"),
        ({"MinCount": 3, "MaxCount": 2}, "InvalidParameterValue"),
        ({"SubnetId": "subnet-0", "NetworkInterfaces": [{"DeviceIndex": 0}]}, "InvalidParameterCombination"),
    ],
)
def test_what_ec2_refuses_is_refused(cloud: AwsCloud, request_: dict[str, Any], expected: str) -> None:
    assert code(lambda: run(cloud, **request_)) == (expected, 400)
    assert cloud.alive() == []


def test_a_group_that_is_in_use_stays(cloud: AwsCloud) -> None:
    cloud.shutting_down_s = 0.3
    ec2 = client(cloud)
    group = ec2.create_security_group(GroupName="g", Description="g")["GroupId"]
    (instance,) = ids(run(cloud, SecurityGroupIds=[group]))
    ec2.terminate_instances(InstanceIds=[instance])

    assert code(lambda: ec2.delete_security_group(GroupId=group)) == ("DependencyViolation", 400)
    until(lambda: described(cloud, instance)["State"]["Name"] == "terminated")
    ec2.delete_security_group(GroupId=group)
    assert cloud.left() == []


def test_placement_groups_come_and_go(cloud: AwsCloud) -> None:
    ec2 = client(cloud)
    tags = [{"ResourceType": "placement-group", "Tags": [{"Key": "skyward:pool", "Value": "p"}]}]
    ec2.create_placement_group(GroupName="close", Strategy="cluster", TagSpecifications=tags)
    (instance,) = ids(run(cloud, Placement={"GroupName": "close"}))

    assert described(cloud, instance)["Placement"]["GroupName"] == "close"
    found = ec2.describe_placement_groups(Filters=[{"Name": "tag:skyward:pool", "Values": ["p"]}])
    assert [g["GroupName"] for g in found["PlacementGroups"]] == ["close"]
    assert code(lambda: ec2.delete_placement_group(GroupName="close")) == ("InvalidPlacementGroup.InUse", 400)
    ec2.terminate_instances(InstanceIds=[instance])
    described(cloud, instance)
    ec2.delete_placement_group(GroupName="close")
    assert cloud.left() == []


# --- credentials --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "call", "wrong", "expired"),
    [
        ("ec2", "describe_regions", "AuthFailure", "RequestExpired"),
        ("sts", "get_caller_identity", "InvalidClientTokenId", "ExpiredToken"),
        ("ssm", "describe_parameters", "UnrecognizedClientException", "ExpiredTokenException"),
        ("iam", "list_roles", "InvalidClientTokenId", "ExpiredToken"),
        ("s3", "list_buckets", "InvalidAccessKeyId", "ExpiredToken"),
    ],
)
def test_credentials_are_wrong_or_expired_in_each_services_words(
    cloud: AwsCloud, service: str, call: str, wrong: str, expired: str
) -> None:
    stranger = client(cloud, service, aws_access_key_id="AKIAWRONG")
    late = client(cloud, service, aws_session_token=cloud.expired_token)

    assert code(getattr(stranger, call))[0] == wrong
    assert code(getattr(late, call))[0] == expired


def test_wrong_credentials_get_no_prices(cloud: AwsCloud) -> None:
    stranger = client(cloud, "pricing", aws_access_key_id="AKIAWRONG")

    assert code(lambda: stranger.get_products(ServiceCode="AmazonEC2")) == ("UnrecognizedClientException", 400)


# --- faults -------------------------------------------------------------------------------------------------


def test_no_capacity_is_by_type_place_and_market(cloud: AwsCloud) -> None:
    cloud.faults.no_capacity |= {("m6i.large", "us-east-1", "spot"), ("m5.large", "us-east-1a")}
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}}

    assert code(lambda: run(cloud, **spot)) == ("InsufficientInstanceCapacity", 500)
    assert ids(run(cloud))
    here = {"InstanceType": "m5.large", "Placement": {"AvailabilityZone": "us-east-1a"}}
    assert code(lambda: run(cloud, **here)) == ("InsufficientInstanceCapacity", 500)
    (elsewhere,) = ids(run(cloud, InstanceType="m5.large"))
    assert described(cloud, elsewhere)["Placement"]["AvailabilityZone"] != "us-east-1a"


def test_quotas_count_vcpus_of_a_family(cloud: AwsCloud) -> None:
    cloud.faults.quotas["standard", "us-east-1", "on-demand"] = 4
    cloud.faults.quotas["g", "*", "spot"] = 0
    graphics = {"InstanceType": "g5.xlarge", "ImageId": image(cloud, name=NVIDIA.format("x86_64"))}

    assert len(ids(run(cloud, MinCount=2, MaxCount=2))) == 2
    assert code(lambda: run(cloud)) == ("VcpuLimitExceeded", 400)
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}}
    assert code(lambda: run(cloud, **graphics, **spot)) == ("MaxSpotInstanceCountExceeded", 400)
    assert ids(run(cloud, **graphics))


def test_throttled_calls_succeed_when_they_are_tried_again(cloud: AwsCloud) -> None:
    cloud.faults.throttled["DescribeInstances"] = 2

    assert code(client(cloud).describe_instances) == ("RequestLimitExceeded", 503)
    assert client(cloud, attempts=3).describe_instances()["Reservations"] == []
    assert cloud.calls["DescribeInstances"] == 3


def test_a_lost_answer_has_launched_and_the_same_token_finds_it(cloud: AwsCloud) -> None:
    cloud.faults.lost["RunInstances"] = 1
    with pytest.raises(ConnectionClosedError):
        run(cloud, ClientToken="t")
    assert len(cloud.alive()) == 1

    assert ids(run(cloud, ClientToken="t")) == cloud.alive()


def test_sdk_retries_after_a_lost_fleet_answer_launch_nothing_more(cloud: AwsCloud) -> None:
    cloud.faults.lost["CreateFleet"] = 1
    answer = client(cloud, attempts=2).create_fleet(
        Type="instant",
        LaunchTemplateConfigs=[{"LaunchTemplateSpecification": template(cloud)}],
        TargetCapacitySpecification={"TotalTargetCapacity": 2, "DefaultTargetCapacityType": "spot"},
    )

    assert ids(answer) == cloud.alive()
    assert cloud.calls["CreateFleet"] == 2


def test_the_api_is_down_until_it_is_up(cloud: AwsCloud) -> None:
    (instance,) = ids(run(cloud))
    cloud.faults.unavailable["TerminateInstances"] = math.inf
    cloud.faults.cut["DescribeRegions"] = 1
    ec2 = client(cloud)

    assert code(lambda: ec2.terminate_instances(InstanceIds=[instance])) == ("Unavailable", 503)
    with pytest.raises(ConnectionClosedError):
        ec2.describe_regions()
    assert ec2.describe_regions()["Regions"]
    assert cloud.alive() == [instance]
    del cloud.faults.unavailable["TerminateInstances"]
    ec2.terminate_instances(InstanceIds=[instance])
    assert cloud.alive() == []


def test_a_new_profile_is_not_known_at_once(cloud: AwsCloud) -> None:
    cloud.faults.profile_delay_s = 60
    client(cloud, "iam").create_instance_profile(InstanceProfileName="p")
    made = template(cloud, IamInstanceProfile={"Name": "p"})

    (error, *_) = fleet(cloud, 1, [], template=made)["Errors"]
    assert error["ErrorCode"] == "InvalidParameterValue"
    assert "iamInstanceProfile" in error["ErrorMessage"]
    cloud.faults.profile_delay_s = 0
    assert ids(fleet(cloud, 1, [], template=made))


def test_an_interrupted_machine_ends_after_its_notice(cloud: AwsCloud) -> None:
    (instance,) = ids(fleet(cloud, 1, [], "spot"))
    cloud.interrupt(instance, notice_s=0.05)

    found = until(lambda: (d := described(cloud, instance))["State"]["Name"] == "terminated" and d)
    assert found["StateReason"]["Code"] == "Server.SpotInstanceTermination"
    (steady,) = ids(run(cloud))
    with pytest.raises(ValueError, match="no spot machine"):
        cloud.interrupt(steady)


def test_the_bill_is_by_the_second_for_a_minute_at_least(cloud: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(r for r in prices.table("aws") if (r.instance_type, r.region) == ("m6i.large", "us-east-1"))
    assert row.price_on_demand is not None
    (instance,) = ids(run(cloud))
    assert cloud.bill() == pytest.approx(60 * row.price_on_demand / 3600)

    lent = cloud.instances[instance]
    lent.spans = [(time.time() - 1000.5, None)]
    client(cloud).terminate_instances(InstanceIds=[instance])

    ((began, ended),) = lent.spans
    assert ended is not None
    assert cloud.bill() == pytest.approx(math.ceil(ended - began) * row.price_on_demand / 3600)
    assert ended - began > 1000


def test_regions_that_the_table_lacks_have_us_east_1s_prices(cloud: AwsCloud) -> None:
    region = "sa-east-1"
    client(cloud, region=region).run_instances(
        ImageId=image(cloud, region), InstanceType="m6i.large", MinCount=50, MaxCount=50
    )

    row = next(r for r in prices.table("aws") if (r.instance_type, r.region) == ("m6i.large", "us-east-1"))
    assert row.price_on_demand is not None
    assert cloud.bill() == pytest.approx(50 * row.price_on_demand / 60)


# --- machines -----------------------------------------------------------------------------------------------


def script(*lines: str) -> str:
    return "\n".join(["#!/bin/sh", *lines, ""])


def machine(cloud: AwsCloud, instance: str) -> Any:
    return until(lambda: cloud.rack.machines.get(instance))


def ask(machine: Any, path: str, *options: str, expect: str = "200") -> str:
    """Ask the metadata service from inside a machine, as its version 2 wants it."""
    ttl = "X-aws-ec2-metadata-token-ttl-seconds: 60"
    token = machine.run(f"curl -sX PUT -H '{ttl}' http://169.254.169.254/latest/api/token")
    header = f"-H 'X-aws-ec2-metadata-token: {token}'" if token else ""
    where = f"http://169.254.169.254/latest/{path}"
    text, _, status = machine.run(f"curl -s -w '|%{{http_code}}' {header} {' '.join(options)} {where}").rpartition("|")
    assert status == expect
    return str(text)


@pytest.mark.slow
def test_a_machine_boots_with_its_user_data_and_ends_with_its_instance(booting: AwsCloud) -> None:
    data = base64.b64encode(script("echo hello > /root/greeting").encode()).decode()
    answer = fleet(booting, 2, [], template=template(booting, UserData=data))
    first, second = (machine(booting, i) for i in ids(answer))

    until(lambda: first.run("cat /root/greeting", check=False) == "hello\n")
    found = until(lambda: (d := described(booting, ids(answer)[0])).get("PublicIpAddress") and d)
    assert {found["PublicIpAddress"], found["PrivateIpAddress"]} == {first.address}
    client(booting).terminate_instances(InstanceIds=ids(answer))
    until(lambda: not first.is_running and not second.is_running)
    assert booting.rack.machines == {}


@pytest.mark.slow
@pytest.mark.parametrize(("behaviour", "state"), [("terminate", "terminated"), ("stop", "stopped")])
def test_a_machine_that_switches_itself_off_is_ended_or_stopped(booting: AwsCloud, behaviour: str, state: str) -> None:
    made = template(booting, InstanceInitiatedShutdownBehavior=behaviour)
    (instance,) = ids(fleet(booting, 1, [], template=made))
    machine(booting, instance).run(POWER_OFF, check=False)

    found = until(lambda: (d := described(booting, instance))["State"]["Name"] == state and d)
    assert found["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"
    assert booting.rack.machines == {}


@pytest.mark.slow
def test_user_data_that_is_none_boots_a_machine_that_nobody_can_log_in_to(booting: AwsCloud) -> None:
    (instance,) = ids(run(booting, UserData="#cloud-config\n{ not: [yaml"))

    assert machine(booting, instance).is_running


@pytest.mark.slow
def test_machines_find_their_metadata_only_with_a_token(booting: AwsCloud) -> None:
    iam = client(booting, "iam")
    iam.create_role(RoleName="r", AssumeRolePolicyDocument="{}")
    iam.create_instance_profile(InstanceProfileName="p")
    iam.add_role_to_instance_profile(InstanceProfileName="p", RoleName="r")
    made = template(booting, IamInstanceProfile={"Name": "p"})
    one, other = ids(fleet(booting, 2, [], "spot", template=made))
    box, beside = machine(booting, one), machine(booting, other)

    assert ask(box, "meta-data/instance-id") == one
    assert ask(beside, "meta-data/instance-id") == other
    ask(box, "meta-data/instance-id", "-H 'X-aws-ec2-metadata-token;'", expect="401")
    assert ask(box, "meta-data/placement/availability-zone").startswith("us-east-1")
    assert json.loads(ask(box, "dynamic/instance-identity/document"))["instanceId"] == one
    ask(box, "meta-data/spot/instance-action", expect="404")

    role = ask(box, "meta-data/iam/security-credentials/")
    given = json.loads(ask(box, f"meta-data/iam/security-credentials/{role}"))
    assert (role, given["Code"]) == ("r", "Success")
    assert json.loads(ask(box, f"meta-data/iam/security-credentials/{role}")) == given
    keys = {
        "aws_access_key_id": given["AccessKeyId"], "aws_secret_access_key": given["SecretAccessKey"],
        "aws_session_token": given["Token"],
    }  # fmt: skip
    client(booting, "s3", **keys).create_bucket(Bucket="bucket")
    assert "<ListAllMyBucketsResult" in box.run(
        f"curl -s --aws-sigv4 aws:amz:us-east-1:s3 -u {given['AccessKeyId']}:{given['SecretAccessKey']} "
        f"-H 'x-amz-security-token: {given['Token']}' {booting.url_for_machines}/"
    )

    booting.interrupt(one, notice_s=0.5)
    assert json.loads(ask(box, "meta-data/spot/instance-action"))["action"] == "terminate"
    until(lambda: not box.is_running)
    assert beside.is_running
