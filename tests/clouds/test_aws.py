"""`sky.AWS` through boto3, against the emulated AWS with machines that are only addresses."""

from __future__ import annotations

import base64
import ipaddress
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

import skyward as sky
from skyward.accelerators.model import Accelerator
from skyward.errors import CapacityError, CredentialsError, ProviderError, QuotaError
from skyward.providers import prices, retry
from skyward.providers.aws import api as aws_api
from skyward.providers.aws import launch as aws_launch
from skyward.providers.aws.firewall import caller_ranges
from skyward.providers.aws.iam import bucket_policy
from skyward.providers.aws.provider import AWS
from skyward.providers.base import LaunchOrder, Login, Need, Offer, UserData
from skyward.spec.pool import PoolSpec
from tests.clouds.aws import AwsCloud
from tests.clouds.rack import Rack

REGION = "us-east-1"
OTHER = "eu-west-1"
CALLER = "198.51.100.7"


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[AwsCloud]:
    cloud = AwsCloud(Rack(boots=False))
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": cloud.access_key,
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": cloud.url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "SKYWARD_CACHE_DIR": str(tmp_path / "cache"),
        "SKYWARD_CALLER_IP": CALLER,
    }.items():
        monkeypatch.setenv(name, value)
    yield cloud
    cloud.close()


@pytest.fixture
def managed_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS's own policies, which moto has only if it is told so before it begins."""
    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")


@pytest.fixture
def ec2(cloud: AwsCloud) -> Any:
    return boto3.client("ec2", region_name=REGION)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up after two attempts, as fast as may be."""
    monkeypatch.setattr(aws_api, "_RETRIES", {"mode": "standard", "total_max_attempts": 2})
    aws_api._session.cache_clear()


def order(pool: str = "p1", token: str = "token0001", **changes: Any) -> LaunchOrder:
    user_data = UserData(host_key="private", host_key_public="public", authorized_key="ssh-ed25519 mine", ttl_s=600)
    return LaunchOrder(
        **{
            "pool_id": pool, "token": token, "count": 1, "spot": False, "user_data": user_data,
            "login": Login(host="", port=22, user="root", key="pem", host_key="public"), "owner": "me@here",
            "expires": 1_800_000_000.0, **changes,
        }
    )  # fmt: skip


def offer(provider: AWS, machine: str, region: str = REGION) -> Offer:
    return next(
        o for o in provider.offers(Need(machine=machine)) if o.instance.name == machine and o.region == region
    )


def left(region: str = REGION) -> dict[str, int]:
    """Return how much there is that is skyward's, or costs."""
    ec2, iam = boto3.client("ec2", region_name=region), boto3.client("iam", region_name=region)
    states = [{"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]}]
    groups = ec2.describe_security_groups()["SecurityGroups"]
    found = {
        "machines": len([i for r in ec2.describe_instances(Filters=states)["Reservations"] for i in r["Instances"]]),
        "groups": len([g for g in groups if g["GroupName"] != "default"]),
        "templates": len(ec2.describe_launch_templates()["LaunchTemplates"]),
        "placements": len(ec2.describe_placement_groups()["PlacementGroups"]),
        "volumes": len(ec2.describe_volumes()["Volumes"]),
        "profiles": len(iam.list_instance_profiles()["InstanceProfiles"]),
        "roles": len([r for r in iam.list_roles()["Roles"] if r["RoleName"].startswith("skyward")]),
    }
    return {name: count for name, count in found.items() if count}


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"region": "narnia"}, "a region such as 'us-east-1'"),
        ({"region": REGION, "regions": [OTHER]}, "name all of them in regions"),
        ({"regions": []}, "or 'any'"),
        ({"regions": "us-east-1"}, "a list of texts"),
        ({"zones": ["a"]}, "zones such as"),
        ({"subnets": ["vpc-1"]}, "ids such as"),
        ({"use_ssm": 1}, "True or False"),
        ({"use_ssm": True, "private_ip": True}, "logs in by no address"),
        ({"caller_cidrs": ["home"]}, "addresses or ranges such as"),
        ({"caller_cidrs": "203.0.113.7"}, "a list of texts"),
        ({"use_ssm": True, "caller_cidrs": ["203.0.113.7"]}, "which opens no port"),
        ({"ami": "ubuntu"}, "an id such as"),
        ({"endpoint_url": "localhost"}, "https://"),
        ({"disk_gib": 1}, "an integer >= 8"),
    ],
)
def test_options_that_can_not_work_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(sky.SpecError, match=words):
        AWS(**options)


def test_what_is_written_down_makes_an_equal_one() -> None:
    options = {"zones": ["us-east-1a"], "private_ip": True, "caller_cidrs": ["192.0.2.1"], "disk_gib": 100}
    provider = AWS(regions=[REGION, OTHER], **options)

    written = json.loads(json.dumps(provider.settings()))

    assert AWS(**written) == provider
    assert AWS(REGION, True) == AWS(**AWS(REGION, use_ssm=True).settings())


def test_a_pool_that_aws_can_not_have_is_refused_without_asking_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    with pytest.raises(sky.SpecError) as caught:
        AWS(use_ssm=True).check(PoolSpec(accelerator=Accelerator.parse("MI300X"), machine="big", nodes=1001))

    text = str(caught.value)
    for words in ("with sky.AWS one of", "'m7i.xlarge'", "up to 1000", "session-manager-plugin", "aws can't be found"):
        assert words in text.replace("aws and session-manager-plugin", "session-manager-plugin and aws")


def test_the_region_is_the_environments_and_else_us_east_1(cloud: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {o.region for o in AWS().offers(Need(machine="m6i.large"))} == {REGION}

    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert {o.region for o in AWS().offers(Need(machine="m6i.large"))} == {"us-west-2"}

    monkeypatch.setenv("AWS_REGION", OTHER)
    assert {o.region for o in AWS().offers(Need(machine="m6i.large"))} == {OTHER}


def test_an_unknown_region_is_refused_with_the_nearest_names(cloud: AwsCloud) -> None:
    with pytest.raises(sky.SpecError, match=r"did you mean 'eu-west-1'"):
        AWS("eu-wset-1").offers(Need())


# --- offers -------------------------------------------------------------------------------------------------


def test_offers_have_facts_and_live_prices(cloud: AwsCloud) -> None:
    offers = {o.instance.name: o for o in AWS(REGION).offers(Need())}

    row = next(r for r in prices.table("aws") if r.instance_type == "m6i.large" and r.region == REGION)
    found = offers["m6i.large"]
    assert (found.provider, found.region, found.prices, found.architecture) == ("aws", REGION, "live", "x86_64")
    assert (found.instance.vcpu, found.instance.memory_gb) == (2, 8.0)
    assert found.instance.price_on_demand == pytest.approx(row.price_on_demand)
    assert found.instance.price_spot == pytest.approx(row.price_spot)
    assert found.instance.metadata["minimum_seconds"] == 60
    assert found.zones
    assert offers["m7g.xlarge"].architecture == "arm64"


def test_accelerators_have_the_names_that_pools_ask_for(cloud: AwsCloud) -> None:
    offers = {o.instance.name: o.instance for o in AWS(regions=[REGION, "us-east-2", "us-west-2"]).offers(Need())}

    found = {n: (i.accelerator, i.accelerator_count, i.accelerator_memory_gb) for n, i in offers.items()}
    assert found["p4d.24xlarge"] == ("A100-40GB", 8, 40)
    assert found["p4de.24xlarge"] == ("A100-80GB", 8, 80)
    assert found["p5.48xlarge"] == ("H100-80GB", 8, 80)
    assert found["p5e.48xlarge"] == ("H200", 8, 141)
    assert found["g4dn.xlarge"] == ("T4", 1, 16)
    assert found["g5.xlarge"] == ("A10G", 1, 24)
    assert found["g6.12xlarge"] == ("L4", 4, 24)
    assert found["g6e.xlarge"] == ("L40S", 1, 48)
    assert found["p3.2xlarge"] == ("V100-16GB", 1, 16)
    assert found["trn1.32xlarge"] == ("Trainium1", 16, 32)
    assert found["trn2.48xlarge"] == ("Trainium2", 16, 96)
    assert found["inf2.24xlarge"] == ("Inferentia2", 6, 32)
    assert found["m6i.large"] == (None, 0, 0)
    for name, (accelerator, *_) in found.items():
        if accelerator:
            assert Accelerator.parse(accelerator).name, name


def test_burstable_types_and_bare_metal_are_there_for_who_names_them(cloud: AwsCloud) -> None:
    common = {o.instance.name for o in AWS(REGION).offers(Need())}

    assert not common.intersection({"t3.medium", "t3.large", "g4dn.metal"})
    assert offer(AWS(REGION), "t3.medium").instance.metadata["burstable"]
    assert offer(AWS(REGION), "g4dn.metal").instance.accelerator_count == 8


def test_for_a_named_type_no_other_is_asked_about(cloud: AwsCloud) -> None:
    offers = AWS(REGION).offers(Need(machine="m6i.large"))

    assert [o.instance.name for o in offers] == ["m6i.large"]
    assert max(cloud.calls.values()) == 1


def test_for_an_unknown_type_all_are_shown(cloud: AwsCloud) -> None:
    assert len(AWS(REGION).offers(Need(machine="m6i.lagre"))) > 20


def test_offers_are_kept_for_a_day_but_for_another_account(cloud: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    first = AWS(REGION).offers(Need())
    asked = sum(cloud.calls.values())

    assert AWS(REGION).offers(Need()) == first
    assert sum(cloud.calls.values()) == asked

    cloud.temporary["ASIAOTHER"] = None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ASIAOTHER")
    assert AWS(REGION).offers(Need()) == first
    assert sum(cloud.calls.values()) > asked


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (["GetProducts"], f"on-demand price: {prices.FROM_TABLE}"),
        (["DescribeSpotPriceHistory"], f"spot price: {prices.FROM_TABLE}"),
        (["GetProducts", "DescribeSpotPriceHistory"], prices.FROM_TABLE),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_the_table_serves_where_prices_are_refused(cloud: AwsCloud, actions: list[str], words: str) -> None:
    cloud.faults.unavailable.update(dict.fromkeys(actions, math.inf))

    found = offer(AWS(REGION), "m6i.large")

    row = next(r for r in prices.table("aws") if r.instance_type == "m6i.large" and r.region == REGION)
    assert found.prices == words
    assert found.instance.price_on_demand == pytest.approx(row.price_on_demand)
    assert found.instance.price_spot == pytest.approx(row.price_spot)

    cloud.faults.unavailable.clear()
    assert offer(AWS(REGION), "m6i.large").prices == "live"


def test_several_regions_are_asked_side_by_side(cloud: AwsCloud) -> None:
    offers = AWS(regions=[OTHER, REGION]).offers(Need(machine="m6i.large"))

    assert [o.region for o in offers] == [OTHER, REGION]
    assert offers[0].instance.price_on_demand != offers[1].instance.price_on_demand


def test_zones_limit_what_is_offered_and_its_spot_price(cloud: AwsCloud) -> None:
    everywhere = offer(AWS(REGION), "m6i.large")
    zone, price = max(everywhere.instance.metadata["spot_by_zone"].items(), key=lambda pair: pair[1])

    found = offer(AWS(REGION, zones=[zone]), "m6i.large")

    assert found.zones == (zone,)
    assert found.instance.price_spot == price > everywhere.instance.price_spot
    assert AWS(REGION, zones=["eu-west-1a"]).offers(Need(machine="m6i.large")) == []


# --- launch -------------------------------------------------------------------------------------------------


def test_four_machines_come_up_in_one_fleet_call(cloud: AwsCloud, ec2: Any) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    before = time.time()

    machines = provider.launch(chosen, order(count=4))

    assert cloud.calls["CreateFleet"] == 1
    assert cloud.calls["RunInstances"] == 0
    assert len({m.id for m in machines}) == 4
    assert len({m.zone for m in machines}) == 1
    for m in machines:
        assert m.login == replace(order().login, host=str(m.public_ip))
        assert m.public_ip
        assert m.private_ip
        assert (m.provider, m.instance_type, m.region, m.spot) == ("aws", "m6i.large", REGION, False)
        assert m.price == m.price_on_demand == chosen.instance.price_on_demand
        assert (m.pool_id, m.owner, m.expires) == ("p1", "me@here", 1_800_000_000.0)
        assert m.launched is not None
        assert before - 5 < m.launched < time.time() + 5
    provider.end("p1", [REGION])
    assert left() == {}


def test_machines_and_disks_are_as_they_should_be(cloud: AwsCloud, ec2: Any) -> None:
    provider = AWS(REGION)
    wanted = order(disk_gib=77)

    provider.launch(offer(provider, "m6i.large"), wanted)

    [reservation] = ec2.describe_instances()["Reservations"]
    [raw] = reservation["Instances"]
    tags = {t["Key"]: t["Value"] for t in raw["Tags"]}
    assert tags["skyward:pool"] == "p1"
    assert tags["skyward:owner"] == "me@here"
    assert tags["skyward:expires"] == "1800000000"
    assert raw["MetadataOptions"]["HttpTokens"] == "required"
    shown = ec2.describe_instance_attribute(InstanceId=raw["InstanceId"], Attribute="userData")["UserData"]["Value"]
    assert base64.b64decode(shown).decode() == wanted.user_data.cloud_config()
    [version] = ec2.describe_launch_template_versions(LaunchTemplateName="skyward-p1-token0001")[
        "LaunchTemplateVersions"
    ]
    data = version["LaunchTemplateData"]
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert data["BlockDeviceMappings"][0]["Ebs"] == {
        "DeleteOnTermination": True, "VolumeSize": 77, "VolumeType": "gp3",
    }  # fmt: skip
    assert "IamInstanceProfile" not in data
    [disk] = ec2.describe_volumes()["Volumes"]
    assert disk["Size"] == 77
    assert {"Key": "skyward:pool", "Value": "p1"} in disk["Tags"]


def test_ssh_is_open_to_the_caller_alone_and_all_is_open_between_machines(cloud: AwsCloud, ec2: Any) -> None:
    provider = AWS(REGION)
    provider.launch(offer(provider, "m6i.large"), order())

    rules, group = _rules(ec2)

    assert rules == {("tcp", 22, f"{CALLER}/32"), ("-1", None, group)}


def test_the_firewall_follows_the_caller(cloud: AwsCloud, ec2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = AWS(REGION)
    provider.launch(offer(provider, "m6i.large"), order())

    monkeypatch.setenv("SKYWARD_CALLER_IP", "203.0.113.9")
    for _ in range(2):
        provider.open_firewall("p1", REGION)

    rules, group = _rules(ec2)
    assert rules == {("tcp", 22, f"{CALLER}/32"), ("tcp", 22, "203.0.113.9/32"), ("-1", None, group)}


def test_several_ranges_are_let_in_and_known_of_each_machine(cloud: AwsCloud, ec2: Any) -> None:
    provider = AWS(REGION, caller_cidrs=["203.0.113.7", "198.51.100.0/24"], private_ip=True)

    [machine] = provider.launch(offer(provider, "m6i.large"), order())

    rules, _ = _rules(ec2)
    [vpc] = ec2.describe_vpcs()["Vpcs"]
    sources = {source for _, port, source in rules if port == 22}
    assert sources == {"203.0.113.7/32", "198.51.100.0/24", vpc["CidrBlock"]} == set(machine.ssh_cidrs)


def test_the_variable_may_name_several_ranges(cloud: AwsCloud, ec2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_CALLER_IP", "203.0.113.7, 198.51.100.0/24")
    assert caller_ranges(ec2, ()) == ["203.0.113.7/32", "198.51.100.0/24"]
    assert caller_ranges(ec2, ["192.0.2.1/32"]) == ["192.0.2.1/32"]

    monkeypatch.setenv("SKYWARD_CALLER_IP", "203.0.113.7/24")
    with pytest.raises(sky.SpecError, match=r"SKYWARD_CALLER_IP='203.0.113.7/24'.*has host bits set"):
        AWS(REGION).check(PoolSpec())


def test_by_private_address_the_firewall_is_open_to_the_network(
    cloud: AwsCloud, ec2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SKYWARD_CALLER_IP")
    provider = AWS(REGION, private_ip=True)

    [machine] = provider.launch(offer(provider, "m6i.large"), order())

    rules, group = _rules(ec2)
    [vpc] = ec2.describe_vpcs()["Vpcs"]
    assert rules == {("tcp", 22, vpc["CidrBlock"]), ("-1", None, group)}
    assert machine.login.host == machine.private_ip


def test_through_session_manager_no_port_is_open(managed_policies: None, cloud: AwsCloud, ec2: Any) -> None:
    provider = AWS(REGION, use_ssm=True)

    [machine] = provider.launch(offer(provider, "m6i.large"), order())

    rules, group = _rules(ec2)
    assert rules == {("-1", None, group)}
    assert machine.login.proxy_command[:5] == ("aws", "ssm", "start-session", "--target", machine.id)
    iam = boto3.client("iam", region_name=REGION)
    [role] = [r for r in iam.list_roles()["Roles"] if r["RoleName"].startswith("skyward")]
    [policy] = iam.list_attached_role_policies(RoleName=role["RoleName"])["AttachedPolicies"]
    assert policy["PolicyName"] == "AmazonSSMManagedInstanceCore"
    provider.end("p1", [REGION])
    assert left() == {}


def _rules(ec2: Any) -> tuple[set[tuple[str, int | None, str]], str]:
    [group] = [g for g in ec2.describe_security_groups()["SecurityGroups"] if g["GroupName"] == "skyward-p1"]
    rules = {
        (p["IpProtocol"], p.get("FromPort") if p["IpProtocol"] == "tcp" else None, source)
        for p in group["IpPermissions"]
        for source in [*(r["CidrIp"] for r in p["IpRanges"]), *(g["GroupId"] for g in p["UserIdGroupPairs"])]
    }
    return rules, group["GroupId"]


def test_without_an_override_the_address_is_the_one_that_the_endpoint_sees(
    cloud: AwsCloud, ec2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SKYWARD_CALLER_IP")

    assert caller_ranges(ec2, ()) == ["127.0.0.1/32"]

    monkeypatch.setenv("SKYWARD_CALLER_IP", "2001:db8::1")
    assert caller_ranges(ec2, ()) == ["2001:db8::1/128"]
    monkeypatch.setenv("SKYWARD_CALLER_IP", "home")
    with pytest.raises(ProviderError, match="Set SKYWARD_CALLER_IP"):
        caller_ranges(ec2, ())


def test_spot_machines_have_the_price_of_their_zone(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")

    machines = provider.launch(chosen, order(count=3, spot=True, max_price=1.0))

    assert {m.spot for m in machines} == {True}
    assert {m.price for m in machines} == {chosen.instance.price_spot}
    assert {m.price_on_demand for m in machines} == {chosen.instance.price_on_demand}
    found = provider.machines("p1")
    assert {m.id for m in found} == {m.id for m in machines}
    assert {m.spot for m in found} == {True}


def test_spot_machines_are_not_launched_above_the_limit(cloud: AwsCloud) -> None:
    provider = AWS(REGION)

    with pytest.raises(CapacityError, match="SpotMaxPriceTooLow"):
        provider.launch(offer(provider, "m6i.large"), order(spot=True, max_price=0.01))

    assert left() == {}


@pytest.mark.parametrize(("max_price", "mode"), [(None, None), (1.0, "standard")])
def test_a_burstable_machine_does_not_cost_more_than_its_limit(
    cloud: AwsCloud, ec2: Any, max_price: float | None, mode: str | None
) -> None:
    provider = AWS(REGION)

    provider.launch(offer(provider, "t3.medium"), order(max_price=max_price))

    shown = ec2.describe_launch_template_versions(LaunchTemplateName="skyward-p1-token0001")
    [version] = shown["LaunchTemplateVersions"]
    assert version["LaunchTemplateData"].get("CreditSpecification", {}).get("CpuCredits") == mode


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ("m6i.large", "canonical/ubuntu/server/24.04/stable/current/amd64"),
        ("m7g.xlarge", "canonical/ubuntu/server/24.04/stable/current/arm64"),
        ("g6.xlarge", "deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04"),
        ("p3.2xlarge", "base-proprietary-nvidia-driver-gpu"),
        ("trn1.2xlarge", "neuron/dlami/base/ubuntu-24.04"),
        ("inf2.xlarge", "neuron/dlami/base/ubuntu-24.04"),
    ],
)
def test_the_image_fits_architecture_and_accelerator(cloud: AwsCloud, machine: str, words: str) -> None:
    assert words in aws_launch._parameter(offer(AWS(REGION), machine))


def test_an_image_of_ones_own_is_used(cloud: AwsCloud, ec2: Any) -> None:
    ami = _image(ec2, "arm64")
    provider = AWS(REGION, ami=ami)

    offers = provider.offers(Need())
    [machine] = provider.launch(offer(provider, "m7g.xlarge"), order())

    assert {o.architecture for o in offers} == {"arm64"}
    [raw] = ec2.describe_instances(InstanceIds=[machine.id])["Reservations"][0]["Instances"]
    assert raw["ImageId"] == ami


def test_an_image_for_another_architecture_is_refused(cloud: AwsCloud, ec2: Any) -> None:
    provider = AWS(REGION, ami=_image(ec2, "arm64"))

    with pytest.raises(sky.SpecError, match="an image for x86_64; this one is for arm64"):
        provider.offers(Need(architecture="x86_64"))
    with pytest.raises(sky.SpecError, match=r"an image for x86_64, which m6i.large is"):
        provider.launch(offer(AWS(REGION), "m6i.large"), order())
    assert left() == {}


def test_an_image_that_is_not_there_is_refused(cloud: AwsCloud) -> None:
    with pytest.raises(sky.SpecError, match="the id of an image in us-east-1"):
        AWS(REGION, ami="ami-00000000").offers(Need())


def _image(ec2: Any, architecture: str) -> str:
    filters = [{"Name": "architecture", "Values": [architecture]}]
    return str(ec2.describe_images(Filters=filters)["Images"][0]["ImageId"])


def test_several_machines_with_accelerators_are_close_to_each_other(cloud: AwsCloud, ec2: Any) -> None:
    provider = AWS(REGION)

    provider.launch(offer(provider, "g6.xlarge"), order(count=2))
    [group] = ec2.describe_placement_groups()["PlacementGroups"]

    assert group["Strategy"] == "cluster"
    provider.end("p1", [REGION])
    assert left() == {}


def test_volumes_come_with_a_role_for_them_alone(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    cloud.faults.profile_delay_s = 2.0
    volumes = (sky.S3Volume("/in", "data", "set/"), sky.S3Volume("/out", "results", read_only=False))

    provider.launch(offer(provider, "m6i.large"), order(volumes=volumes))

    iam = boto3.client("iam", region_name=REGION)
    [profile] = iam.list_instance_profiles()["InstanceProfiles"]
    [role] = profile["Roles"]
    policy = iam.get_role_policy(RoleName=role["RoleName"], PolicyName="volumes")["PolicyDocument"]
    allowed = [(s["Action"], s["Resource"], s.get("Condition")) for s in policy["Statement"]]
    assert allowed[0] == ("s3:ListBucket", "arn:aws:s3:::data", {"StringLike": {"s3:prefix": ["set/*"]}})
    assert allowed[1] == (["s3:GetObject"], "arn:aws:s3:::data/set/*", None)
    assert allowed[2] == ("s3:ListBucket", "arn:aws:s3:::results", None)
    assert "s3:PutObject" in allowed[3][0]
    assert allowed[3][1] == "arn:aws:s3:::results/*"
    provider.end("p1", [REGION])
    assert left() == {}


def test_storage_that_is_not_amazons_needs_no_right() -> None:
    volume = sky.S3Volume("/in", "data", endpoint_url="https://minio.example")

    assert bucket_policy([volume], "aws")["Statement"] == []


def test_given_subnets_are_kept_to(cloud: AwsCloud, ec2: Any) -> None:
    subnets = sorted(ec2.describe_subnets()["Subnets"], key=lambda s: str(s["AvailabilityZone"]))
    chosen = subnets[1]
    provider = AWS(REGION, subnets=[chosen["SubnetId"]])

    [machine] = provider.launch(offer(provider, "m6i.large"), order())

    assert machine.zone == chosen["AvailabilityZone"]
    with pytest.raises(ProviderError, match="none of subnet-0abc is in us-east-1"):
        AWS(REGION, subnets=["subnet-0abc"]).launch(offer(provider, "m6i.large"), order("p2", "token0002"))


def test_of_two_subnets_of_one_zone_the_one_with_more_room_is_used(cloud: AwsCloud, ec2: Any) -> None:
    first, *_, other = sorted(ec2.describe_subnets()["Subnets"], key=lambda s: str(s["AvailabilityZone"]))
    block = str(ipaddress.ip_network(ec2.describe_vpcs()["Vpcs"][0]["CidrBlock"])[-256]) + "/24"
    small = ec2.create_subnet(VpcId=first["VpcId"], CidrBlock=block, AvailabilityZone=first["AvailabilityZone"])
    assert small["Subnet"]["AvailableIpAddressCount"] < first["AvailableIpAddressCount"]
    named = [first["SubnetId"], small["Subnet"]["SubnetId"], other["SubnetId"]]
    provider = AWS(REGION, subnets=named, zones=[first["AvailabilityZone"]])

    machines = provider.launch(offer(provider, "m6i.large"), order(count=2))

    described = ec2.describe_instances(InstanceIds=[m.id for m in machines])["Reservations"]
    assert {i["SubnetId"] for r in described for i in r["Instances"]} == {first["SubnetId"]}


def test_a_region_without_a_default_vpc_says_what_to_do(cloud: AwsCloud, ec2: Any) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    for subnet in ec2.describe_subnets()["Subnets"]:
        ec2.delete_subnet(SubnetId=subnet["SubnetId"])

    with pytest.raises(ProviderError, match="create-default-vpc"):
        provider.launch(chosen, order())

    assert left() == {}


# --- answers that are lost, launches side by side -----------------------------------------------------------


def test_the_same_order_twice_is_the_same_machines(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")

    first = provider.launch(chosen, order(count=2))
    second = provider.launch(chosen, order(count=2))

    assert {m.id for m in first} == {m.id for m in second}
    assert len(provider.machines("p1")) == 2


@pytest.mark.parametrize("kind", ["lost", "cut", "throttled", "unavailable"])
@pytest.mark.parametrize(
    "action", ["CreateFleet", "CreateSecurityGroup", "AuthorizeSecurityGroupIngress", "CreateLaunchTemplate"]
)
def test_a_lost_or_refused_answer_neither_doubles_nor_loses_machines(
    cloud: AwsCloud, kind: str, action: str
) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    getattr(cloud.faults, kind)[action] = 1

    machines = provider.launch(chosen, order(count=3))

    assert len(machines) == 3
    assert {m.id for m in provider.machines()} == {m.id for m in machines}
    provider.end("p1", [REGION])
    assert left() == {}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["lost", "cut"])
@pytest.mark.parametrize(
    "action", ["CreateFleet", "CreateSecurityGroup", "CreateLaunchTemplate", "DescribeSubnets", "CreateRole"]
)
def test_a_launch_that_can_not_be_finished_leaves_nothing(cloud: AwsCloud, kind: str, action: str) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    getattr(cloud.faults, kind)[action] = 2

    with pytest.raises(ProviderError, match="could not be reached"):
        provider.launch(chosen, order(count=3, volumes=(sky.S3Volume("/in", "data"),)))

    assert left() == {}


def test_addresses_are_waited_for(cloud: AwsCloud) -> None:
    cloud.pending_s = 1.0
    provider = AWS(REGION)

    machines = provider.launch(offer(provider, "m6i.large"), order(count=2))

    assert all(m.login.host == m.public_ip for m in machines)


@pytest.mark.usefixtures("impatient")
def test_machines_left_by_a_failed_launch_are_named_and_end_with_the_pool(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    cloud.faults.lost["CreateFleet"] = 2
    cloud.faults.unavailable["TerminateInstances"] = 2

    with pytest.raises(ProviderError, match="could not be reached") as caught:
        provider.launch(chosen, order(count=2))

    assert "machines in us-east-1" in caught.value.__notes__[0]
    assert left()["machines"] == 2
    provider.end("p1", [REGION])
    assert left() == {}


def test_launches_of_one_pool_may_run_side_by_side(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    orders = [order(token=f"token000{i}", count=2, spot=bool(i % 2)) for i in range(4)]

    with ThreadPoolExecutor(4) as threads:
        machines = [m for some in threads.map(lambda o: provider.launch(chosen, o), orders) for m in some]

    assert len({m.id for m in machines}) == 8
    assert left()["groups"] == 1
    provider.end("p1", [REGION])
    assert left() == {}


def test_a_launch_that_fails_beside_another_leaves_it_its_firewall(cloud: AwsCloud, ec2: Any) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    cloud.faults.no_capacity.add(("m6i.large", REGION, "spot"))

    [machine] = provider.launch(chosen, order())
    with pytest.raises(CapacityError):
        provider.launch(chosen, order(token="token0002", spot=True))

    rules, _ = _rules(ec2)
    assert len(rules) == 2
    assert [m.id for m in provider.machines("p1")] == [machine.id]
    assert left()["templates"] == 1


# --- refusals -----------------------------------------------------------------------------------------------


def test_without_capacity_nothing_is_left(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "g6.xlarge")
    cloud.faults.no_capacity.add(("g6.xlarge", REGION))

    with pytest.raises(CapacityError, match="InsufficientInstanceCapacity"):
        provider.launch(chosen, order(count=2, volumes=(sky.S3Volume("/in", "data"),)))

    assert left() == {}


def test_a_zone_without_capacity_is_passed_over(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    for zone in chosen.zones[:-1]:
        cloud.faults.no_capacity.add(("m6i.large", zone))

    machines = provider.launch(chosen, order(count=2))

    assert {m.zone for m in machines} == {chosen.zones[-1]}


def test_with_capacity_for_some_none_is_launched(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    cloud.faults.capacity["m6i.large", "*"] = 3

    with pytest.raises(CapacityError):
        provider.launch(chosen, order(count=4))

    assert left() == {}


@pytest.mark.parametrize(
    ("spot", "words"),
    [(False, r"Running On-Demand G and VT instances' \(L-DB2E81BA\)"), (True, r"All G and VT Spot .*L-3819A6DF")],
)
def test_a_quota_is_named_with_where_to_raise_it(cloud: AwsCloud, spot: bool, words: str) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "g6.xlarge")
    cloud.faults.quotas["g", REGION] = 0

    with pytest.raises(QuotaError, match=words) as caught:
        provider.launch(chosen, order(spot=spot))

    assert f"https://{REGION}.console.aws.amazon.com/servicequotas/home/services/ec2/quotas/L-" in str(caught.value)
    assert left() == {}


@pytest.mark.parametrize(
    ("machine", "spot", "code"),
    [
        ("m7i.large", False, "L-1216C47A"), ("r6i.large", True, "L-34B43A08"), ("p5.48xlarge", False, "L-417A185B"),
        ("p5en.48xlarge", True, "L-C4BD4855"), ("p4d.24xlarge", True, "L-7212CCBC"),
        ("trn2.48xlarge", False, "L-2C3B7624"), ("inf2.xlarge", True, "L-B5D1601B"),
        ("gr6.4xlarge", False, "L-DB2E81BA"), ("is4gen.large", False, "L-1216C47A"),
        ("x2idn.16xlarge", False, "L-7295265B"), ("dl1.24xlarge", False, "L-6E869C2A"),
        ("f2.6xlarge", True, "L-88CF9481"),
    ],
)  # fmt: skip
def test_each_type_counts_against_the_quota_of_its_family(machine: str, spot: bool, code: str) -> None:
    assert code in aws_api.quota_of(machine, spot=spot, region=REGION)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("AuthFailure", CredentialsError), ("InvalidClientTokenId", CredentialsError),
        ("UnrecognizedClientException", CredentialsError), ("SignatureDoesNotMatch", CredentialsError),
        ("OptInRequired", CredentialsError), ("ExpiredToken", CredentialsError), ("RequestExpired", CredentialsError),
        ("ExpiredTokenException", CredentialsError), ("VcpuLimitExceeded", QuotaError),
        ("MaxSpotInstanceCountExceeded", QuotaError), ("VolumeLimitExceeded", QuotaError),
        ("InstanceLimitExceeded", QuotaError), ("InsufficientInstanceCapacity", CapacityError),
        ("UnfulfillableCapacity", CapacityError), ("Unsupported", CapacityError), ("SpotMaxPriceTooLow", CapacityError),
        ("UnauthorizedOperation", ProviderError), ("InvalidParameterValue", ProviderError),
        ("RequestLimitExceeded", ProviderError),
    ],
)  # fmt: skip
def test_each_code_of_aws_is_one_error_of_ours(cloud: AwsCloud, code: str, error: type[ProviderError]) -> None:
    api = aws_api.api(None, cloud.url)

    failure = api.failure(code, "words of AWS", "launching", quota="quota 'x'")

    assert type(failure) is error
    assert code in str(failure)


def test_a_right_that_is_lacking_is_named(cloud: AwsCloud) -> None:
    said = (
        "You are not authorized to perform this operation. User: arn:aws:iam::1:user/me is not authorized to perform: "
        "ec2:CreateFleet on resource: *. Encoded authorization failure message: QWxhZGRpbjpvcGVuIHNlc2FtZQ"
    )

    failure = aws_api.api(None, cloud.url).failure("UnauthorizedOperation", said, "launching")

    assert "lacks the permission ec2:CreateFleet" in str(failure)
    assert "QWxh" not in str(failure)


# --- credentials --------------------------------------------------------------------------------------------


def test_missing_credentials_say_where_they_were_looked_for(cloud: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    for act in _uses():
        with pytest.raises(CredentialsError, match="are missing") as caught:
            act()
        for words in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "~/.aws/credentials", "role"):
            assert words in str(caught.value)


def test_half_of_the_credentials_is_none(cloud: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    with pytest.raises(CredentialsError, match="are missing"):
        AWS(REGION).offers(Need())


def test_a_profile_that_is_not_there_is_named(cloud: AwsCloud) -> None:
    with pytest.raises(CredentialsError, match="profile 'work'"):
        AWS(REGION, profile="work").offers(Need())


def test_wrong_credentials_say_where_they_are_from(cloud: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")

    for act in _uses():
        with pytest.raises(CredentialsError, match=r"are wrong: .*from AWS_ACCESS_KEY_ID") as caught:
            act()
        assert "secret" not in str(caught.value)


def test_expired_credentials_are_told_from_wrong_ones(cloud: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", cloud.expired_token)

    for act in _uses():
        with pytest.raises(CredentialsError, match="have expired"):
            act()


def test_credentials_that_are_mended_are_read_anew(
    cloud: AwsCloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(CredentialsError):
        AWS(REGION).machines()

    text = f"[default]\naws_access_key_id = {cloud.access_key}\naws_secret_access_key = x\n"
    (tmp_path / "credentials").write_text(text)

    assert AWS(REGION).machines() == []


def _uses() -> list[Callable[[], Any]]:
    provider = AWS(REGION)
    made_up = Offer(provider="aws", instance=sky.InstanceSpec("m6i.large", 2, 8), region=REGION)
    return [
        lambda: provider.offers(Need()),
        lambda: provider.machines(),
        lambda: provider.launch(made_up, order()),
    ]


# --- discovery and the end ----------------------------------------------------------------------------------


def test_machines_are_found_from_another_computer_in_every_region(cloud: AwsCloud) -> None:
    here, there = AWS(REGION), AWS(OTHER)
    [a] = here.launch(offer(here, "m6i.large"), order("p1", "token0001"))
    [b] = there.launch(offer(there, "m6i.large", OTHER), order("p2", "token0002"))

    found = {m.id: m for m in AWS().machines()}

    assert set(found) == {a.id, b.id}
    assert found[b.id].region == OTHER
    assert found[b.id].pool_id == "p2"
    assert found[b.id].owner == "me@here"
    assert found[b.id].expires == 1_800_000_000.0
    assert found[a.id].login == Login(host=str(a.public_ip), port=22, user="root")
    assert [m.id for m in AWS().machines("p2")] == [b.id]


def test_terminated_machines_cost_nothing_and_others_stay(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    mine = provider.launch(chosen, order(count=3))
    [other] = provider.launch(chosen, order("p2", "token0002"))

    provider.terminate(mine[:2])
    provider.terminate(mine[:2])

    assert {m.id for m in provider.machines()} == {mine[2].id, other.id}


@pytest.mark.usefixtures("impatient")
def test_machines_that_can_not_be_terminated_are_told_of(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    machines = provider.launch(offer(provider, "m6i.large"), order(count=2))
    cloud.faults.unavailable["TerminateInstances"] = 2

    with pytest.raises(ProviderError, match="may be left, and may cost money: 2 machines in us-east-1"):
        provider.terminate(machines)

    provider.terminate(machines)
    assert provider.machines() == []


def test_a_machine_that_is_not_known_any_more_does_not_keep_others_alive(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    machines = provider.launch(offer(provider, "m6i.large"), order(count=2))
    gone = replace(machines[0], id="i-0123456789abcdef0", launched=time.time() - 3600)

    provider.terminate([gone, *machines])

    assert provider.machines() == []


def test_a_machine_that_is_not_known_yet_is_not_taken_for_gone(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    machines = provider.launch(offer(provider, "m6i.large"), order())
    cloud.unlisted_s = 60

    with pytest.raises(ProviderError, match=f"{machines[0].id} were launched, but EC2 does not list them yet"):
        provider.terminate(machines)

    assert len(cloud.alive()) == 1


@pytest.mark.usefixtures("impatient")
def test_machines_of_a_fleet_in_doubt_are_ended_when_they_are_listed(
    cloud: AwsCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "LISTED_S", 20.0)
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    cloud.faults.lost["CreateFleet"] = 2
    cloud.unlisted_s = 2.0

    with pytest.raises(ProviderError, match="could not be reached"):
        provider.launch(chosen, order(count=3))

    assert cloud.left() == []


def test_an_end_leaves_nothing_of_a_pool_and_all_of_others(cloud: AwsCloud, ec2: Any) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "g6.xlarge")
    volumes = (sky.S3Volume("/in", "data"),)
    provider.launch(chosen, order(count=2, volumes=volumes))
    others = provider.launch(chosen, order("p2", "token0002", count=2, volumes=volumes))
    theirs = ec2.create_security_group(GroupName="skyward-p3", Description="someone's own")["GroupId"]

    for _ in range(2):
        provider.end("p1", [REGION, OTHER])

    assert {m.id for m in provider.machines()} == {m.id for m in others}
    assert left() == {
        "machines": 2, "groups": 2, "templates": 1, "placements": 1, "volumes": 2, "profiles": 1, "roles": 1,
    }  # fmt: skip
    provider.end("p2", [REGION])
    assert left() == {"groups": 1}
    assert theirs in {g["GroupId"] for g in ec2.describe_security_groups()["SecurityGroups"]}


def test_a_group_of_someone_else_is_never_used(cloud: AwsCloud, ec2: Any) -> None:
    ec2.create_security_group(GroupName="skyward-p1", Description="someone's own")
    provider = AWS(REGION)

    with pytest.raises(ProviderError, match="that skyward has not made"):
        provider.launch(offer(provider, "m6i.large"), order())

    assert left() == {"groups": 1}


@pytest.mark.usefixtures("impatient")
def test_an_end_goes_on_after_a_failure_and_says_what_may_be_left(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    provider.launch(offer(provider, "m6i.large"), order())
    cloud.faults.unavailable["DescribeLaunchTemplates"] = math.inf

    with pytest.raises(ProviderError, match=r"may be left.*launch templates in us-east-1"):
        provider.end("p1", [REGION])

    assert left_but_for_templates() == {}
    cloud.faults.unavailable.clear()
    provider.end("p1", [REGION])
    assert left() == {}


def left_but_for_templates() -> dict[str, int]:
    ec2 = boto3.client("ec2", region_name=REGION)
    states = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    groups = [g for g in ec2.describe_security_groups()["SecurityGroups"] if g["GroupName"] != "default"]
    found = {"machines": len(ec2.describe_instances(Filters=states)["Reservations"]), "groups": len(groups)}
    return {name: count for name, count in found.items() if count}


def test_calls_grow_with_batches_and_not_with_machines(cloud: AwsCloud) -> None:
    provider = AWS(REGION)
    chosen = offer(provider, "m6i.large")
    calls: list[int] = []
    for number, count in enumerate((1, 40)):
        before = sum(cloud.calls.values())
        machines = provider.launch(chosen, order(f"p{number}", f"token000{number}", count=count))
        provider.terminate(machines)
        provider.end(f"p{number}", [REGION])
        calls.append(sum(cloud.calls.values()) - before)

    # A look more or less, while machines get their addresses or come to their end.
    assert calls[1] <= calls[0] + 3


def test_the_sdk_is_not_loaded_to_make_one() -> None:
    import subprocess
    import sys

    code = (
        "import sys, skyward.providers.aws.provider as a; a.AWS('us-east-1'); "
        "sys.exit(bool({'boto3', 'botocore'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_sdk_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    aws_api._session.cache_clear()
    monkeypatch.setitem(sys.modules, "boto3", None)

    with pytest.raises(ProviderError, match=r"pip install 'skyward\[aws\]'"):
        AWS(REGION).offers(Need())
