"""The address of this computer as machines see it, for the firewalls that let it alone in."""

from __future__ import annotations

import ipaddress
import os
import socket
import urllib.request
from urllib.parse import urlsplit

from skyward.errors import ProviderError

_ECHO = "https://checkip.amazonaws.com"


def caller_range(cloud: str, url: str, own_domains: tuple[str, ...]) -> str:
    """Return the address that a cloud's machines see this computer under, as a range of one.

    SKYWARD_CALLER_IP overrides it. With an API at a `url` outside the cloud's own domains, it is the address that we
    speak to it from.

    Raises
    ------
    ProviderError
        It can't be had; `cloud` names whose machines it was for.
    """
    found = os.environ.get("SKYWARD_CALLER_IP", "").strip()
    place = urlsplit(url)
    host = place.hostname or ""
    try:
        if not found and not host.endswith(own_domains):
            found = _own_address(host, place.port or 443)
        if not found:
            with urllib.request.urlopen(_ECHO, timeout=10) as answer:
                found = answer.read(100).decode().strip()
        address = ipaddress.ip_address(found)
    except (OSError, ValueError) as exc:
        raise ProviderError(
            f"{cloud}: the public address of this computer, which alone may reach the machines, can't be had from "
            f"{_ECHO}: {exc}. Set SKYWARD_CALLER_IP to it"
        ) from exc
    return f"{address}/{address.max_prefixlen}"


def _own_address(host: str, port: int) -> str:
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)  # sends nothing
        return str(probe.getsockname()[0])
