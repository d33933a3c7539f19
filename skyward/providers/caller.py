"""The addresses from which this computer logs in to machines: firewalls admit no others."""

from __future__ import annotations

import ipaddress
import os
import socket
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from skyward.errors import ProviderError
from skyward.spec.validation import Problems, check_strings

VARIABLE = "SKYWARD_CALLER_IP"
_ECHO = "https://checkip.amazonaws.com"


def check_cidrs(value: Any) -> tuple[str, ...]:
    """Return addresses and ranges as ranges, each as `ipaddress` writes it."""
    ranges = []
    for text in check_strings(value):
        try:
            ranges.append(str(ipaddress.ip_network(text.strip())))
        except ValueError as exc:
            raise ValueError(f"addresses or ranges such as ['203.0.113.7', '198.51.100.0/24']; {exc}") from exc
    return tuple(dict.fromkeys(ranges))


def named_ranges() -> tuple[str, ...]:
    """Return the addresses and ranges in SKYWARD_CALLER_IP, which has commas between them.

    Raises
    ------
    ValueError
        It has something else; the message says what is expected.
    """
    return check_cidrs([text for text in os.environ.get(VARIABLE, "").split(",") if text.strip()])


def check_variable(problems: Problems) -> None:
    """Note what is wrong with SKYWARD_CALLER_IP."""
    problems.check(VARIABLE, os.environ.get(VARIABLE, ""), lambda _: named_ranges())


def caller_ranges(
    cloud: str, url: str, own_domains: tuple[str, ...], cidrs: Sequence[str], *, private: Sequence[str] = ()
) -> list[str]:
    """Return the ranges of addresses that a pool's firewall admits.

    These are `cidrs`, else those in SKYWARD_CALLER_IP, and in any case those in `private`. Without all of them it is
    the address that the internet sees this computer under; with an API at a `url` outside the cloud's own domains, the
    address that this computer speaks to it from.

    Raises
    ------
    ProviderError
        It can't be had; `cloud` names whose machines it was for.
    """
    place = urlsplit(url)
    host = place.hostname or ""
    try:
        named = list(cidrs or named_ranges())
        if named or private:
            return list(dict.fromkeys([*private, *named]))
        if host.endswith(own_domains):
            with urllib.request.urlopen(_ECHO, timeout=10) as answer:
                found = answer.read(100).decode().strip()
        else:
            found = _own_address(host, place.port or 443)
        return [str(ipaddress.ip_network(found))]
    except (OSError, ValueError) as exc:
        raise ProviderError(
            f"{cloud}: can't get the public address of this computer, the only one that may reach the machines, "
            f"from {_ECHO}: {exc}. Set {VARIABLE} to it"
        ) from exc


def _own_address(host: str, port: int) -> str:
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)  # sends nothing
        return str(probe.getsockname()[0])
