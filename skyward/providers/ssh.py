"""Hosts that are there already, reached over SSH: used by a pool, and left as they were but for a cache."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skyward.errors import NoMatchingInstanceError
from skyward.providers.base import Login, Machine, check_files
from skyward.spec.pool import PoolSpec
from skyward.spec.validation import Problems

_HOST = re.compile(r"(?:(?P<user>[^@\s]+)@)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^@:\s\[\]]+)(?::(?P<port>\d+))?")


@dataclass(frozen=True, slots=True, init=False)
class SSH:
    """Hosts reached over SSH.

    When the pool ends, its processes and files are removed. The environment in ``~/.cache/skyward`` on the host stays,
    so that the next pool with the same image starts in seconds.

    Parameters
    ----------
    hosts
        ``"host"``, ``"user@host"``, ``"user@host:port"``, or names from ``~/.ssh/config``, whose jump hosts and keys
        are used. Write an IPv6 address before a port in brackets. A pool takes the first `nodes` of them; the others
        replace hosts that fail while it starts.
    user
        The user for hosts that don't name one; None: the one in ``~/.ssh/config``, else the local user.
    key
        Path of a private key; None: the keys of the SSH agent, and the default keys of ssh.
    known_hosts
        Path of a file of known hosts; None: ``~/.ssh/known_hosts``. Unknown hosts are refused.
    addresses
        Network in which the hosts reach each other, such as ``"10.0.0.0/8"``, or several of them; a single address is a
        network too. Each host uses its first address in the first of these networks that it is in. Empty: the address
        at which SSH reaches it.

    Raises
    ------
    SpecError
        A host can't be read or is named twice, or a file does not exist.
    """

    hosts: tuple[str, ...]
    user: str | None
    key: str | None
    known_hosts: str | None
    addresses: tuple[str, ...]

    def __init__(
        self,
        hosts: str | Sequence[str],
        *,
        user: str | None = None,
        key: str | Path | None = None,
        known_hosts: str | Path | None = None,
        addresses: str | Sequence[str] = (),
    ) -> None:
        problems = Problems("SSH")
        given = (hosts,) if isinstance(hosts, str) else tuple(hosts)
        problems.check("hosts", given, _check_hosts)
        problems.check("user", user, _check_user, optional=True)
        key = problems.check("key", key, _check_file, optional=True)
        known_hosts = problems.check("known_hosts", known_hosts, _check_file, optional=True)
        networks = problems.check("addresses", addresses, _check_addresses)
        problems.raise_if_any()
        values = {"hosts": given, "user": user, "key": key, "known_hosts": known_hosts, "addresses": networks}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        return "ssh"

    def check(self, spec: PoolSpec) -> None:
        """Refuse what hosts that are there already can't be made into.

        Raises
        ------
        SpecError
            An option asks for other machines, or for more of them, or a file to ship is not there.
        """
        problems = Problems()
        if spec.nodes > len(self.hosts):
            problems.note("nodes", spec.nodes, f"up to {len(self.hosts)}, as many as sky.SSH was given hosts")
        if spec.machine is not None:
            problems.note("machine", spec.machine, "None with sky.SSH, whose hosts have no types")
        if spec.volume:
            problems.note("volume", spec.volume, "() with sky.SSH: use paths of the hosts")
        check_files(spec, problems)
        problems.raise_if_any()

    def machines(self, count: int, skip: Sequence[str] = ()) -> list[Machine]:
        """Return the first `count` hosts whose ids are not in `skip`.

        Raises
        ------
        NoMatchingInstanceError
            There are not so many.
        """
        free = [host for host in self.hosts if host not in skip]
        if len(free) < count:
            raise NoMatchingInstanceError(
                f"sky.SSH has {len(free)} unused hosts, but {count} are needed: add hosts"
            )
        return [
            Machine(id=host, provider=self.name, login=self._login(host), networks=self.addresses, outlives_pool=True)
            for host in free[:count]
        ]

    def _login(self, text: str) -> Login:
        user, host, port = _split(text)
        return Login(host=host, port=port, user=user or self.user, key=self.key, known_hosts=self.known_hosts)


def _split(text: str) -> tuple[str | None, str, int | None]:
    user, at, host = text.rpartition("@")
    with contextlib.suppress(ValueError):  # all but bare IPv6 addresses
        ipaddress.IPv6Address(host)
        host = f"[{host}]"
    match = _HOST.fullmatch(f"{user}{at}{host}")
    if match is None or not 0 < int(match["port"] or 22) < 65536 or match["host"].startswith("-"):
        raise ValueError(f"hosts as 'host', 'user@host' or 'user@host:port', which {text!r} is not")
    return match["user"], match["host"].strip("[]"), int(match["port"]) if match["port"] else None


def _check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    if not hosts or not all(isinstance(h, str) for h in hosts):
        raise ValueError("at least one host, as 'user@host:port'")
    seen: set[tuple[str, int]] = set()
    for text in hosts:
        _, host, port = _split(text)
        place = host.lower(), port or 22
        if place in seen:
            raise ValueError(f"each host once, but {host} is listed twice")
        seen.add(place)
    return hosts


def _check_addresses(addresses: str | Sequence[str]) -> tuple[str, ...]:
    given = (addresses,) if isinstance(addresses, str) else addresses
    try:
        # "10.0.0.5/24", the form that `ip address` prints, means the network of that address.
        return tuple(str(ipaddress.ip_network(network, strict=False)) for network in map(str, given))
    except (TypeError, ValueError) as exc:
        raise ValueError(f"networks or addresses such as '10.0.0.0/8' ({exc})") from None


def _check_user(user: str) -> str:
    if not isinstance(user, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.@-]*", user):
        raise ValueError("the name of a user")
    return user


def _check_file(path: str | Path) -> str:
    found = Path(path).expanduser()
    if not found.is_file() or not os.access(found, os.R_OK):
        raise ValueError("the path of a file that exists and can be read")
    return str(found.absolute())
