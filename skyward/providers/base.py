"""What every provider of machines speaks of: a machine, and the way to log in to it."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """

    host: str
    port: int | None = None
    user: str | None = None
    key: str | None = field(default=None, repr=False)
    host_key: str | None = None
    known_hosts: str | None = None

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        return f"{user}{self.host}{port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine that a provider lends to a pool.

    Attributes
    ----------
    private_ip
        Address under which the pool's other machines reach it; None: the one that it is logged in to by.
    lives_on
        Whether it was there before the pool and stays after it: then it is cleaned rather than destroyed.
    """

    id: str
    provider: str
    login: Login
    private_ip: str | None = None
    public_ip: str | None = None
    instance_type: str | None = None
    region: str | None = None
    spot: bool = False
    lives_on: bool = False
