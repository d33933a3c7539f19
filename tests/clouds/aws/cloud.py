"""The emulated AWS as a whole: its servers, its account, its machines from birth to bill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.clouds.aws.faults import Faults, Place
from tests.clouds.rack import Rack

if TYPE_CHECKING:
    from tests.clouds.aws.launch import Pool

_ACCOUNT = "123456789012"
_UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/{}/hvm/ebs-gp3/ami-id"
_DEEP = "/aws/service/deeplearning/ami/{}/base-{}/latest/ami-id"
_IMAGES = {
    # Parameter: the image's architecture, owner, and name. Owners: Canonical's and Amazon's account.
    _UBUNTU.format("amd64"): ("x86_64", "099720109477", "ubuntu-noble-24.04-amd64-server"),
    _UBUNTU.format("arm64"): ("arm64", "099720109477", "ubuntu-noble-24.04-arm64-server"),
    **{
        _DEEP.format(arch, kind): (arch, "898082745236", f"Deep Learning Base {kind} {arch}")
        for arch in ("x86_64", "arm64")
        for kind in ("oss-nvidia-driver-gpu-ubuntu-24.04", "oss-nvidia-driver-gpu-ubuntu-22.04")
    },
    _DEEP.format("x86_64", "proprietary-nvidia-driver-gpu-ubuntu-22.04"): (
        "x86_64",
        "898082745236",
        "Deep Learning Base Proprietary Nvidia Driver GPU AMI (Ubuntu 22.04)",
    ),
    "/aws/service/neuron/dlami/base/ubuntu-24.04/latest/image_id": (
        "x86_64",
        "898082745236",
        "Deep Learning Base Neuron AMI (Ubuntu 24.04)",
    ),
}


@dataclass(slots=True)
class Lent:
    """An instance with what moto does not know of it.

    `spans` are the times that it is billed for, in seconds since the epoch; the last end is None while it runs.
    """

    backend: Any
    instance: Any
    place: Place
    price: float
    user_data: str
    machine: str
    address: str
    is_public: bool
    began: float
    ended: float | None = None
    spans: list[tuple[float, float | None]] = field(default_factory=list)
    notice_until: float | None = None
    """When the machine is reclaimed, once its interruption has been announced."""
    given: tuple[str, dict[str, str]] | None = None
    """Its role, and the credentials that it got for it."""

    @property
    def region(self) -> str:
        return self.place.region

    @property
    def is_alive(self) -> bool:
        return self.instance.state in ("pending", "running")

    def cost(self) -> float:
        """Return USD so far. By the second, for a minute at least: aws.amazon.com/ec2/pricing/on-demand, 2025-07."""
        now = time.time()
        seconds = [max(60, math.ceil((now if end is None else end) - start)) for start, end in self.spans]
        return sum(seconds) * self.price / 3600


class AwsCloud:
    """AWS on this host, for real SDKs pointed at `url`. One at a time in a process, as moto has one state in each.

    Parameters
    ----------
    rack
        Where machines boot. It is the caller's to close; machines that are left are destroyed by `close`.

    Attributes
    ----------
    access_key, secret_key
        The only credentials that are let in, beside those that machines get from their metadata. `expired_token` is a
        session token that is refused as expired. Signatures are not checked.
    url, url_for_machines, metadata_url
        Of all services, as seen from this host and from machines; and of the instance metadata, which machines find at
        ``http://169.254.169.254``.
    pending_s, shutting_down_s
        How long instances stay in these states. While one is pending it has no public address.
    unlisted_s, undescribed_s
        How long new instances are not known, and how long other new things are not described: "Eventual consistency in
        the Amazon EC2 API", Amazon EC2 Developer Guide.
    calls
        How often each action was asked for, whatever became of it; for S3: ``"s3:GET"`` and so on.
    """

    access_key = "AKIASKYWARDEMULATOR1"
    secret_key = "skyward-emulator-secret-0123456789abcdef"
    expired_token = "an-expired-session-token"

    def __init__(self, rack: Rack) -> None:
        # moto's own images are more than a thousand in each region, and nobody here asks for them.
        os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"
        from tests.clouds.aws import servers

        self.rack = rack
        self.faults = Faults()
        self.calls: Counter[str] = Counter()
        self.pending_s = 0.1
        self.shutting_down_s = 0.1
        self.unlisted_s = self.undescribed_s = 0.05
        self.lock = threading.RLock()
        self.instances: dict[str, Lent] = {}
        self.answers: dict[tuple[str, str, str], tuple[str, Any]] = {}
        self.placement_groups: dict[tuple[str, str], dict[str, Any]] = {}
        self.temporary: dict[str, str | None] = {}
        """Access keys that were given to machines, with their session tokens; more may be added."""
        self.made: dict[str, float] = {}
        """When things were made, by id, in seconds since the epoch."""
        self._timers: list[threading.Timer] = []
        self._ready: set[str] = set()
        self._servers = servers.Servers(self)
        self.url, self.url_for_machines = self._servers.url, self._servers.url_for_machines
        self.metadata_url = self._servers.metadata_url

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which boto3 finds this cloud, and gets in."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def __enter__(self) -> AwsCloud:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the servers and destroy the machines that are left. May be called twice."""
        self._servers.close()
        for timer in self._timers:
            timer.cancel()
        with self.lock:
            for lent in self.instances.values():
                self.rack.destroy(lent.machine)
        os.environ.pop("MOTO_EC2_LOAD_DEFAULT_AMIS", None)

    # --- regions ----------------------------------------------------------------------------------------------

    def advance(self, region: str) -> None:
        """Bring a region up to now: its images, and states that have lasted long enough."""
        if region not in self._ready:
            self._ready.add(region)
            _add_images(region)
        now = time.time()
        for lent in self.instances.values():
            if lent.region != region:
                continue
            if lent.instance.state == "pending" and now >= lent.began + self.pending_s:
                _set_state(lent.instance, "running", 16)
                lent.instance.nics[0].public_ip = lent.address if lent.is_public else None
            elif lent.instance.state == "shutting-down" and now >= (lent.ended or 0) + self.shutting_down_s:
                _set_state(lent.instance, "terminated", 48)

    def is_listed(self, ident: str) -> bool:
        """Tell whether descriptions have a thing by now; what is an account's own they have always."""
        delay_s = self.unlisted_s if ident in self.instances else self.undescribed_s
        return time.time() >= self.made.get(ident, 0.0) + delay_s

    def places(self) -> list[Place]:
        """Return what there is of machines that count against capacity and quotas."""
        return [lent.place for lent in self.instances.values() if lent.is_alive]

    # --- a machine's life -------------------------------------------------------------------------------------

    def began(self, backend: Any, instance: Any, pool: Pool, user_data: str) -> None:
        """Boot a machine for a new instance."""
        from tests.clouds.aws.launch import bootable

        is_public = instance.nics[0].public_ip is not None
        lent = Lent(
            backend=backend,
            instance=instance,
            place=pool.place(),
            price=pool.price,
            user_data=user_data,
            machine=instance.id,
            address="",
            is_public=is_public,
            began=time.time(),
        )
        self.instances[instance.id] = lent
        self.made[instance.id] = time.time()
        self._boot(lent, bootable(user_data))

    def _boot(self, lent: Lent, user_data: str) -> None:
        lent.began = time.time()
        lent.address = self.rack.boot(lent.machine, user_data, lambda: self.switched_off(lent.instance.id))
        lent.spans.append((lent.began + self.pending_s, None))
        nic = lent.instance.nics[0]
        nic.public_ip = None
        nic.private_ip_address = lent.address
        nic.private_ip_addresses = [{"Primary": True, "PrivateIpAddress": lent.address}]
        _set_state(lent.instance, "pending", 0)

    def terminate(self, instance_id: str, code: str = "Client.UserInitiatedShutdown", words: str = "") -> None:
        """End an instance and its machine; one that has ended stays as it is."""
        with self.lock:
            lent = self.instances[instance_id]
            if lent.instance.state in ("shutting-down", "terminated"):
                return
            self._off(lent)
            lent.instance.terminate()
            lent.instance.state_reason.code = code
            lent.instance.state_reason.message = f"{code}: {words or 'User initiated shutdown'}"
            if code.startswith("Server."):
                lent.instance._reason = code
            _set_state(lent.instance, "shutting-down", 32)

    def stopped(self, instance_id: str) -> None:
        with self.lock:
            self._off(self.instances[instance_id])

    def started(self, instance_id: str) -> None:
        """Boot a machine anew for an instance that was stopped; without its disk, which nothing here needs."""
        from tests.clouds.aws.launch import bootable

        with self.lock:
            lent = self.instances[instance_id]
            lent.machine = f"{instance_id}-{len(lent.spans) + 1}"
            lent.ended = None
            self._boot(lent, bootable(lent.user_data))

    def switched_off(self, instance_id: str) -> None:
        """Do what the instance says for a machine that switched itself off."""
        code, words = "Client.InstanceInitiatedShutdown", "Instance initiated shutdown"
        with self.lock:
            lent = self.instances[instance_id]
            if not lent.is_alive:
                return
            if lent.instance.instance_initiated_shutdown_behavior == "terminate":
                self.terminate(instance_id, code, words)
                return
            self._off(lent)
            lent.instance.stop()
            lent.instance.state_reason.code, lent.instance.state_reason.message = code, f"{code}: {words}"

    def _off(self, lent: Lent) -> None:
        self.rack.destroy(lent.machine)
        now = time.time()
        lent.ended = now
        start, end = lent.spans[-1]
        if end is None:
            # What never ran costs nothing.
            lent.spans[-1:] = [(start, now)] if now > start else []

    def interrupt(self, instance_id: str, notice_s: float = 120.0) -> None:
        """Announce in a spot machine's metadata that it is reclaimed, and reclaim it after `notice_s`.

        Raises
        ------
        ValueError
            It is no spot machine, or not there.
        """
        with self.lock:
            lent = self.instances.get(instance_id)
            if lent is None or lent.place.market != "spot" or not lent.is_alive:
                raise ValueError(f"{instance_id} is no spot machine that is there")
            lent.notice_until = time.time() + notice_s
        arguments = (instance_id, "Server.SpotInstanceTermination", "Spot instance termination")
        timer = threading.Timer(notice_s, self.terminate, arguments)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    # --- for tests ----------------------------------------------------------------------------------------------

    def bill(self) -> float:
        """Return USD so far, for machines that run and have ended; disks and traffic are free here."""
        with self.lock:
            return sum(lent.cost() for lent in self.instances.values())

    def untag(self, pool_id: str) -> None:
        """Take from the instances of a pool all tags that their owner may take."""
        with self.lock:
            for lent in self.instances.values():
                tags = {tag["key"]: tag["value"] for tag in lent.instance.get_tags()}
                if tags.get("skyward:pool") == pool_id:
                    mine = {name: None for name in tags if not name.startswith("aws:")}
                    lent.backend.delete_tags([lent.instance.id], mine)

    def alive(self) -> list[str]:
        """Return the ids of the instances that are pending or running."""
        with self.lock:
            return [name for name, lent in self.instances.items() if lent.is_alive]

    def left(self) -> list[str]:
        """Return what is there beside an account's defaults, in all regions: ``"instance i-0ab"`` and so on."""
        from moto.ec2.models import ec2_backends
        from moto.iam.models import iam_backends

        with self.lock:
            found = [
                f"instance {name}" for name, lent in self.instances.items()
                if lent.instance.state not in ("shutting-down", "terminated")
            ]  # fmt: skip
            for region in sorted(self._ready):
                ec2 = ec2_backends[_ACCOUNT][region]
                found += [f"volume {volume}" for volume in ec2.volumes]
                found += [f"network interface {nic}" for nic in ec2.enis]
                found += [f"key pair {name}" for name in ec2.key_pairs]
                found += [f"launch template {t.name}" for t in ec2.launch_templates.values()]
                groups = [group for groups in ec2.groups.values() for group in groups.values()]
                found += [f"security group {group.name}" for group in groups if group.name != "default"]
            found += [f"placement group {name}" for _, name in self.placement_groups]
            iam = iam_backends[_ACCOUNT]["aws"]
            found += [f"role {role.name}" for role in iam.roles.values()]
            found += [f"instance profile {profile.name}" for profile in iam.instance_profiles.values()]
        return found

    def at_address(self, address: str) -> Lent | None:
        """Return whose machine has an address."""
        with self.lock:
            return next((x for x in self.instances.values() if x.address == address and x.is_alive), None)


def _set_state(instance: Any, name: str, code: int) -> None:
    instance._state.name, instance._state.code = name, code


def _add_images(region: str) -> None:
    """Give a region its public images, and the parameters that name them."""
    from moto.ec2.models import ec2_backends
    from moto.ec2.models.amis import Ami

    ec2 = ec2_backends[_ACCOUNT][region]
    for parameter, (architecture, owner, name) in _IMAGES.items():
        image = image_id(parameter, region)
        ec2.amis[image] = Ami(
            ec2,
            image,
            name=name,
            description=name,
            owner_id=owner,
            owner_alias="amazon",
            public=True,
            virtualization_type="hvm",
            architecture=architecture,
            hypervisor="xen",
            root_device_type="ebs",
            root_device_name="/dev/sda1",
            region_name=f"{region}a",
        )


def image_id(parameter: str, region: str) -> str:
    return f"ami-{hashlib.sha256(f'{region}{parameter}'.encode()).hexdigest()[:17]}"


def add_parameters(region: str) -> None:
    """Give a region's Parameter Store the public parameters that name images."""
    from moto.core.utils import utcnow
    from moto.ssm.models import Parameter, ssm_backends

    known = ssm_backends[_ACCOUNT][region]._parameters
    for name in _IMAGES:
        if name not in known:
            known[name].append(
                Parameter(
                    account_id=_ACCOUNT,
                    name=name,
                    value=image_id(name, region),
                    parameter_type="String",
                    description=None,
                    allowed_pattern=None,
                    keyid=None,
                    last_modified_date=utcnow(),
                    version=1,
                    data_type="aws:ec2:image",
                )
            )


def credentials_of(cloud: AwsCloud, lent: Lent) -> tuple[str, dict[str, str]] | None:
    """Return the role of an instance, and credentials for it; None without a role."""
    if lent.given is not None:
        return lent.given
    from moto.iam.models import iam_backends

    arn = (lent.instance.iam_instance_profile or {}).get("Arn")
    found = None
    with contextlib.suppress(Exception):  # whatever moto raises for a profile that is gone: there is no role
        found = iam_backends[_ACCOUNT]["aws"].get_instance_profile_by_arn(arn) if arn else None
    if found is None or not found.roles:
        return None
    key = "ASIA" + hashlib.sha256(os.urandom(16)).hexdigest()[:16].upper()
    token = hashlib.sha256(os.urandom(16)).hexdigest()
    cloud.temporary[key] = token
    now = time.time()
    credentials = {
        "Code": "Success",
        "LastUpdated": instant(now),
        "Type": "AWS-HMAC",
        "AccessKeyId": key,
        "SecretAccessKey": hashlib.sha256(key.encode()).hexdigest()[:40],
        "Token": token,
        "Expiration": instant(now + 6 * 3600),
    }
    lent.given = (found.roles[0].name, credentials)
    return lent.given


def instant(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def identity(lent: Lent) -> str:
    """Return an instance's identity document."""
    instance = lent.instance
    facts = {
        "accountId": _ACCOUNT,
        "architecture": instance.architecture,
        "availabilityZone": lent.place.zone,
        "imageId": instance.image_id,
        "instanceId": instance.id,
        "instanceType": instance.instance_type,
        "pendingTime": instant(lent.began),
        "privateIp": lent.address,
        "region": lent.region,
        "version": "2017-09-30",
    }
    return json.dumps(facts, indent=2)
