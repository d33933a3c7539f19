"""What every provider of machines speaks of: what is needed, offered and lent, and the way to log in to it."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from skyward.accelerators.model import Accelerator
from skyward.errors import ProviderError
from skyward.scripts.dead_man import timer_at_boot
from skyward.spec.instance import InstanceSpec
from skyward.spec.pool import PoolSpec
from skyward.spec.validation import Problems
from skyward.spec.volume import S3Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """How a machine is reached over SSH.

    Attributes
    ----------
    port, user
        None: what ``~/.ssh/config`` says, else SSH's own defaults.
    key
        Path of a private key, or the key itself in PEM; None: the agent's and the usual ones.
    host_key
        The machine's public host key, made by us and pinned before the first connection. None: the machine was there
        before, and `known_hosts` decides.
    known_hosts
        Path of a file of known hosts; None: the user's own.
    proxy_command
        Program and arguments whose standard input and output lead to the machine's sshd. Empty: a TCP connection.
    """

    host: str
    port: int | None = None
    user: str | None = None
    key: str | None = field(default=None, repr=False)
    host_key: str | None = None
    known_hosts: str | None = None
    proxy_command: tuple[str, ...] = ()

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        host = f"[{self.host}]" if port and ":" in self.host else self.host
        return f"{user}{host}{port}"


BOOT_S = 300.0
"""Seconds that most machines may take from their launch until they let us in; slow ones take two minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine that a provider lends to a pool.

    Attributes
    ----------
    private_ip
        Address under which the pool's other machines reach it; None: the one that it is logged in to by.
    networks
        Networks in one of which its address for the pool's other machines is looked for, instead of `private_ip`.
    outlives_pool
        Whether it was there before the pool and stays after it: then it is cleaned rather than destroyed.
    price, price_on_demand
        USD per hour, as agreed at the launch, and what it would cost as no spot machine; None: not known.
    launched
        When its cost began, in seconds since the epoch.
    ssh_cidrs
        Ranges of addresses from which its firewall lets SSH in, as known at the launch.
    pool_id, owner, expires
        As its tags say, for machines that were found by them.
    boot_s
        Seconds that it may take from its launch until it lets us in.
    """

    id: str
    provider: str
    login: Login
    private_ip: str | None = None
    networks: tuple[str, ...] = ()
    public_ip: str | None = None
    instance_type: str | None = None
    region: str | None = None
    zone: str | None = None
    spot: bool = False
    outlives_pool: bool = False
    price: float | None = None
    price_on_demand: float | None = None
    launched: float | None = None
    ssh_cidrs: tuple[str, ...] = ()
    pool_id: str | None = None
    owner: str | None = None
    expires: float | None = None
    boot_s: float = BOOT_S


# --- what is asked for and offered --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What each machine has to be at least. `machine` is an exact type; then the rest has to fit it."""

    cpu: int = 1
    memory_mb: int = 1
    accelerator: Accelerator | None = None
    architecture: str | None = None
    machine: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A type of machine in one region of a provider.

    Attributes
    ----------
    provider
        Name of the provider, such as ``"aws"``.
    instance
        The type with its prices in this region; a price of None: not known, or not offered so.
    available, available_spot
        Whether there are any at present; None: known only when it is tried.
    prices
        Where the prices are from: ``"live"``, or words for the reader, such as ``"table of this release"``.
    """

    provider: str
    instance: InstanceSpec
    region: str
    zones: tuple[str, ...] = ()
    architecture: str = "x86_64"
    available: bool | None = None
    available_spot: bool | None = None
    prices: str = "live"


@dataclass(frozen=True, slots=True, kw_only=True)
class UserData:
    """What a machine is told when it boots: the keys it is recognised by and lets in, and when to end itself.

    `host_key` is private (OpenSSH's PEM), `host_key_public` and `authorized_key` are lines as OpenSSH writes them.
    """

    host_key: str = field(repr=False)
    host_key_public: str
    authorized_key: str
    ttl_s: int

    def cloud_config(self) -> str:
        """Return it for cloud-init; root may log in. JSON is YAML."""
        facts = {
            "disable_root": False,
            "ssh_deletekeys": True,
            "ssh_keys": {"ed25519_private": self.host_key, "ed25519_public": self.host_key_public},
            "ssh_authorized_keys": [self.authorized_key],
            # Not runcmd: that runs last, after cloud-init's own package upgrades, and only at the first boot.
            "bootcmd": [["sh", "-c", timer_at_boot(self.ttl_s)]],
        }
        return "#cloud-config\n" + json.dumps(facts)

    def script(self) -> str:
        """Return it as a shell script, for clouds that run one at boot, after a first start of sshd."""
        place = "/etc/ssh/ssh_host_ed25519_key"
        at_boot = "/var/lib/cloud/scripts/per-boot"  # what cloud-init runs at every boot; this script only at the first
        timer = timer_at_boot(self.ttl_s)
        return "\n".join(
            [
                "#!/bin/sh",
                timer,  # before anything that can fail or hang
                "umask 077",
                f"mkdir -p {at_boot} && printf '#!/bin/sh\\n%s\\n' {shlex.quote(timer)} > {at_boot}/skyward",
                f"chmod 700 {at_boot}/skyward",
                f"printf '%s\\n' {shlex.quote(self.host_key.rstrip())} > {place}",
                f"printf '%s\\n' {shlex.quote(self.host_key_public.rstrip())} > {place}.pub",
                "mkdir -p /root/.ssh",
                f"printf '%s\\n' {shlex.quote(self.authorized_key.rstrip())} >> /root/.ssh/authorized_keys",
                "systemctl reload ssh 2> /dev/null || systemctl reload sshd 2> /dev/null || pkill -HUP -o sshd",
                "",
            ]
        )


BIG_BOOT_S = 1200.0
"""The same for bare metal and for machines with 8 accelerators or more. Chosen, not measured."""
_MANY = 8


def boot_s(instance: InstanceSpec) -> float:
    """Return how many seconds a machine of this type may take to boot, where the pool does not say."""
    is_big = instance.accelerator_count >= _MANY or "metal" in instance.name
    return BIG_BOOT_S if is_big else BOOT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOrder:
    """What to launch of an offer.

    Attributes
    ----------
    token
        The same token never launches twice: a launch whose answer was lost is asked for again with it. 8 to 32
        lower-case letters and digits.
    max_price
        USD per hour that no machine may exceed; None: no limit.
    login
        How the machines will be logged in to; `host` is for the provider to fill in.
    owner
        ``user@host`` of the caller, for the tags.
    expires
        By when the pool's own timers have ended it, in seconds since the epoch; for the tags.
    disk_gib
        Size of the disk; the provider may give more.
    creating
        To be called before each request that makes something. Raises `PoolError` when the pool has ended: then nothing
        more is made, and what was made is destroyed.
    pause
        Sleeps for so many seconds, between requests. Raises `PoolError` when the pool ends.
    prepared
        Called when what the machines need (network, keys, groups) is there, right before they are asked for.
    boot_s
        Seconds that machines may take to get their addresses, and then to let us in.
    """

    pool_id: str
    token: str
    count: int
    spot: bool
    user_data: UserData
    login: Login
    owner: str
    expires: float
    max_price: float | None = None
    disk_gib: int = 64
    accelerator: Accelerator | None = None
    volumes: tuple[S3Volume, ...] = ()
    creating: Callable[[], None] = lambda: None
    pause: Callable[[float], None] = time.sleep
    on_prepared: Callable[[], None] = lambda: None
    boot_s: float = BOOT_S


class Cloud(Protocol):
    """A provider whose machines are launched for a pool and destroyed after it.

    Frozen, without secrets: credentials come from where the cloud's own tools look for them. All methods but `check`
    block, may be called from several threads, and raise `ProviderError` and its subclasses, with the SDK's own error
    as cause.
    """

    @property
    def name(self) -> str: ...

    def settings(self) -> Mapping[str, Any]:
        """Return what makes an equal one: keyword arguments, fit for JSON."""

    def check(self, spec: PoolSpec) -> None:
        """Refuse options that this cloud can't meet, without asking it.

        Raises
        ------
        SpecError
            With option, value and what would be accepted.
        """

    def offers(self, need: Need) -> Sequence[Offer]:
        """Return what there is in the regions that this is limited to.

        `need` lets it ask for less; nothing that meets it is left out, and what does not meet it may be there too.
        """

    def launch(self, offer: Offer, order: LaunchOrder) -> Sequence[Machine]:
        """Start machines, all or none, side by side; return when they have addresses, before they have booted.

        Raises
        ------
        CapacityError, QuotaError
            There are not so many. What came up is destroyed.
        PoolError
            The pool has ended, as the order says. What came up is destroyed.
        """

    def machines(self, pool_id: str | None = None) -> Sequence[Machine]:
        """Return the machines of a pool, or of all pools, found by tags and names in every region."""

    def terminate(self, machines: Sequence[Machine]) -> None:
        """Destroy machines; return when the cloud confirms that they cost nothing any more."""

    def open_firewall(self, pool_id: str, region: str) -> None:
        """Let the caller's present address in to a pool's machines, in addition to earlier ones, where a firewall asks.

        May be called again at will.
        """

    def end(self, pool_id: str, regions: Sequence[str]) -> None:
        """Destroy all of a pool in `regions`: machines, found by tags and names, then keys, groups and disks.

        Looks twice, as a machine may be listed some seconds after its launch only: see `skyward.providers.retry`.

        Safe to call again, and beside another call. Only what bears the pool's id is touched.

        Raises
        ------
        ProviderError
            Something may be left; the message says what.
        """


def check_files(spec: PoolSpec, problems: Problems) -> None:
    """Note the files of ``image.include`` that are not there."""
    for path in spec.image.include:
        if not os.access(path, os.R_OK):
            problems.note("include", path, f"a file or folder that can be read in {Path.cwd()}")


def check_no_volumes(spec: PoolSpec, problems: Problems, provider: str) -> None:
    """Note the volumes that are asked for of a cloud whose machines have no rights to a bucket."""
    if spec.volume:
        accepted = (
            f"() with {provider}: its machines have no rights of their own to a bucket. Read the data in the "
            "function, with keys from env=, or use sky.AWS"
        )
        problems.note("volume", spec.volume, accepted)


@contextmanager
def needs_sdk(provider: str, sdk: str) -> Iterator[None]:
    """Say how to install the SDK of a cloud where an import in the block finds none."""
    try:
        yield
    except ModuleNotFoundError as exc:
        extra = provider.lower()
        raise ProviderError(f"sky.{provider} needs {sdk}: pip install 'skyward[{extra}]' ({exc})") from exc
