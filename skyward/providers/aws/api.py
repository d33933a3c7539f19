"""AWS's API as `sky.AWS` uses it: clients that retry, the regions there are, and its errors as ours.

boto3 is imported on first use. Knows nothing of pools and machines.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from skyward.errors import CapacityError, CredentialsError, ProviderError, QuotaError, invalid
from skyward.providers import retry
from skyward.providers.base import needs_sdk
from skyward.version import __version__

_RETRIES: Any = {"mode": "standard", "total_max_attempts": 6}  # backs off with jitter, by up to 20 s; some 20 s in all
_FEW: Any = {"mode": "standard", "total_max_attempts": 3}  # for prices, which there is a table of
_TIMEOUT_S = 60

# Error codes: Amazon EC2 API Reference, "Error codes for the Amazon EC2 API"; IAM and Signature Version 4 have their
# own names for the same, in each service's "Common Error Types".
_WRONG = {
    "AuthFailure", "InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch", "OptInRequired",
    "IncompleteSignature", "MissingAuthenticationToken", "InvalidAccessKeyId", "InvalidSignatureException",
}  # fmt: skip
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
DENIED = {"UnauthorizedOperation", "AccessDenied", "AccessDeniedException", "UnauthorizedException"}
_CAPACITY = {
    "InsufficientInstanceCapacity", "InsufficientCapacity", "InsufficientHostCapacity", "UnfulfillableCapacity",
    "InsufficientFreeAddressesInSubnet", "SpotMaxPriceTooLow", "Unsupported", "UnsupportedOperation",
    "Server.InsufficientInstanceCapacity", "Server.SpotInstanceTermination", "Server.SpotInstanceShutdown",
}  # fmt: skip
# Of one type in a region, whatever the market; the message says what it lacks.
_TYPE = {"Unsupported", "UnsupportedOperation", "InvalidParameterCombination"}
_NO_SPOT_ROLE = "AuthFailure.ServiceLinkedRoleCreationNotPermitted"
_LAUNCHES = {"RunInstances", "CreateFleet", "RequestSpotInstances", "CreateServiceLinkedRole"}
# These depend on the type: "Error codes", as above.
_QUOTA = {
    "VcpuLimitExceeded", "InstanceLimitExceeded", "MaxSpotInstanceCountExceeded", "SpotInstanceCountLimitExceeded",
}  # fmt: skip
_OTHER_QUOTAS = {
    "VolumeLimitExceeded": "storage for General Purpose SSD (gp3) volumes",
    "Client.VolumeLimitExceeded": "storage for General Purpose SSD (gp3) volumes",
    "SecurityGroupLimitExceeded": "VPC security groups per Region",
    "LaunchTemplateLimitExceeded": "launch templates",
}

# Quotas by the letters that a type's name begins with: on-demand, spot. Amazon EC2 User Guide, "Amazon EC2 instance
# type quotas", and the Service Quotas console, for the codes.
_STANDARD = (
    ("L-1216C47A", "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances"),
    ("L-34B43A08", "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests"),
)
_GRAPHICS = (
    ("L-DB2E81BA", "Running On-Demand G and VT instances"),
    ("L-3819A6DF", "All G and VT Spot Instance Requests"),
)
_QUOTAS = {
    "g": _GRAPHICS,
    "gr": _GRAPHICS,
    "vt": _GRAPHICS,
    "p": (("L-417A185B", "Running On-Demand P instances"), ("L-7212CCBC", "All P4, P3 and P2 Spot Instance Requests")),
    "f": (("L-74FC7D96", "Running On-Demand F instances"), ("L-88CF9481", "All F Spot Instance Requests")),
    "inf": (("L-1945791B", "Running On-Demand Inf instances"), ("L-B5D1601B", "All Inf Spot Instance Requests")),
    "trn": (("L-2C3B7624", "Running On-Demand Trn instances"), ("L-6B0D517C", "All Trn Spot Instance Requests")),
    "x": (("L-7295265B", "Running On-Demand X instances"), ("L-E3A00192", "All X Spot Instance Requests")),
    "dl": (("L-6E869C2A", "Running On-Demand DL instances"), ("L-85EED4F7", "All DL Spot Instance Requests")),
}
QUOTAS = {
    f"{kind} {market}": pair[market == "spot"][0]
    for kind, pair in (("standard", _STANDARD), ("G and VT", _GRAPHICS), ("P", _QUOTAS["p"]))
    for market in ("on-demand", "spot")
}
"""Codes of the quotas that most pools count against."""
_P5_SPOT = ("L-C4BD4855", "All P5 Spot Instance Requests")


def quota_of(instance_type: str, *, spot: bool, region: str) -> str:
    """Return, in words, which quota a type of machine counts against, and where it is raised."""
    family = re.match(r"[a-z]*", instance_type)
    letters = family[0] if family else ""
    code, name = _QUOTAS.get(letters, _STANDARD)[spot]
    if letters == "p" and spot and instance_type[1:2] >= "5":
        code, name = _P5_SPOT
    link = f"https://{region}.console.aws.amazon.com/servicequotas/home/services/ec2/quotas/{code}"
    return f"quota {name!r} ({code}), which counts vCPUs; raise it at {link}"


class Api:
    """Clients for one account, each made once per service and region; for use from several threads."""

    def __init__(self, profile: str | None, endpoint_url: str | None) -> None:
        self._profile = profile
        self._endpoint_url = endpoint_url
        self._lock = threading.Lock()  # boto3's sessions are not safe to make clients from in several threads
        self._clients: dict[tuple[str, str], Any] = {}
        with needs_sdk("AWS", "boto3"):
            import boto3
            from botocore.exceptions import BotoCoreError
        try:
            self._session: Any = boto3.session.Session(profile_name=profile)
        except BotoCoreError as exc:  # no such profile
            raise self._missing(str(exc)) from exc

    def client(self, service: str, region: str) -> Any:
        from botocore.config import Config

        with self._lock:
            client = self._clients.get((service, region))
            if client is None:
                config = Config(
                    retries=_FEW if service == "pricing" else _RETRIES,
                    connect_timeout=10,
                    read_timeout=_TIMEOUT_S,
                    max_pool_connections=32,
                    user_agent_extra=f"skyward/{__version__}",
                )
                with self.api_errors(f"preparing to ask {service} in {region}"):
                    client = self._session.client(
                        service, region_name=region, endpoint_url=self._endpoint_url, config=config
                    )
                self._clients[service, region] = client
            return client

    def default_region(self) -> str:
        """Return the region of the environment or the profile; us-east-1 where neither says one."""
        # botocore itself does not look at AWS_REGION, which AWS's other tools do.
        named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return named or self._session.region_name or "us-east-1"

    def check_region(self, region: str) -> None:
        """Raise `SpecError` for a region that botocore's own list does not have."""
        known = {
            name
            for partition in self._session.get_available_partitions()
            for name in self._session.get_available_regions("ec2", partition)
        }
        if region not in known:
            near = difflib.get_close_matches(region, known, n=3, cutoff=0.5)
            accepted = "a region of AWS" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
            raise invalid("region", region, accepted, shown=f"AWS(region={region!r})")

    def arn_partition(self, region: str) -> str:
        """Return ``"aws"``, or what ARNs in China and in government regions have in its place."""
        return str(self._session.get_partition_for_region(region))

    def account_key(self) -> str:
        """Return a text that differs between accounts, and tells nothing of the credentials."""
        with self.api_errors("reading the credentials"):
            credentials = self._session.get_credentials()
            if credentials is None:
                raise self._missing()
            key = credentials.get_frozen_credentials().access_key
        return hashlib.sha256(str(key).encode()).hexdigest()[:12]

    # --- errors ---------------------------------------------------------------------------------------------

    @contextmanager
    def api_errors(self, doing: str, *, quota: str = "", spot: bool = False) -> Iterator[None]:
        """Translate the SDK's errors of what is inside.

        `doing` says what that is; for a launch, `quota` is what it counts against, and `spot` its market.
        """
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        try:
            yield
        except exceptions.ClientError as exc:
            error = exc.response.get("Error", {})
            code, message = str(error.get("Code", "")), str(error.get("Message", ""))
            raise self.failure(code, message, doing, quota=quota, spot=spot, operation=exc.operation_name) from exc
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.ProfileNotFound) as exc:
            raise self._missing(str(exc)) from exc
        except (
            exceptions.CredentialRetrievalError, exceptions.SSOError, exceptions.TokenRetrievalError,
        ) as exc:  # fmt: skip
            raise self._bad(f"can't be had: {exc}") from exc
        except exceptions.HTTPClientError as exc:
            raise ProviderError(f"AWS could not be reached while {doing}: {exc}") from exc
        except (exceptions.BotoCoreError, ResponseParserError) as exc:  # the latter: a page of HTML, say
            raise ProviderError(f"AWS: {doing} failed: {exc}") from exc

    def failure(
        self,
        code: str,
        message: str,
        doing: str,
        *,
        quota: str = "",
        spot: bool = False,
        operation: str = "CreateFleet",
    ) -> ProviderError:
        """Return the error that a code and a message of AWS's mean; `spot`: spot machines were asked for."""
        said = f"{message} ({code})"
        if code == _NO_SPOT_ROLE:
            return ProviderError(
                f"AWS: {doing}: {said}. An account needs the role for spot machines once: run `aws iam "
                "create-service-linked-role --aws-service-name spot.amazonaws.com`",
                rules_out="market",
            )
        if code in _WRONG:
            return self._bad(f"are wrong: {said}")
        if code in _EXPIRED:
            return self._bad(f"have expired: {said}")
        if code in DENIED:
            named = re.search(r"perform: ([A-Za-z0-9]+:[A-Za-z0-9]+)", message)
            action = named[1] if named else operation
            return ProviderError(
                f"AWS: {doing} is not allowed: the identity lacks the permission {action} ({code})",
                # A policy may deny spot machines alone.
                rules_out="market" if spot and action.rpartition(":")[2] in _LAUNCHES else "region",
            )
        if code in _OTHER_QUOTAS:
            return QuotaError(
                f"AWS: {doing}: {said}. The quota is {_OTHER_QUOTAS[code]!r}; raise it in the Service Quotas console",
                rules_out="region",
            )
        if code in _QUOTA:
            return QuotaError(f"AWS: {doing}: {said}. The {quota or 'quota is shown in the Service Quotas console'}")
        facts = {"rules_out": "type"} if code in _TYPE else {}
        if code in _CAPACITY:
            return CapacityError(f"AWS: {doing}: {said}", **facts)
        return ProviderError(f"AWS: {doing} failed: {said}", **facts)

    def origin(self) -> str:
        """Return where the credentials are from, in words.

        Raises
        ------
        CredentialsError
            There are none.
        """
        with self.api_errors("reading the credentials"):
            credentials = self._session.get_credentials()
        if credentials is None:
            raise self._missing()
        return _origin(credentials)

    def _missing(self, said: str = "") -> CredentialsError:
        _session.cache_clear()
        profile = self._profile or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
        return CredentialsError(
            "AWS credentials are missing: there are none in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in profile "
            f"{profile!r} (AWS_PROFILE) of ~/.aws/credentials and ~/.aws/config, or from a role of this machine"
            f"{f'; {said}' if said else ''}. Run `aws configure`, or set the variables",
            missing=True,
        )

    def _bad(self, how: str) -> CredentialsError:
        # Next time they are read anew: to mend them one need not start a new process.
        _session.cache_clear()
        credentials = getattr(self._session, "get_credentials", lambda: None)()
        return CredentialsError(
            f"AWS credentials {how}. They come from {_origin(credentials)}; other places are AWS_PROFILE, "
            "~/.aws/credentials and ~/.aws/config. Run `aws sts get-caller-identity` to try them"
        )


def _origin(credentials: Any) -> str:
    method = str(getattr(credentials, "method", "unknown"))
    return {
        "env": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN",
        "shared-credentials-file": "~/.aws/credentials",
        "config-file": "~/.aws/config",
        "iam-role": "the role of this machine",
        "container-role": "the role of this container",
    }.get(method, f"the profile ({method})")


def api(profile: str | None, endpoint_url: str | None) -> Api:
    """Return the clients for a profile, as the environment is now."""
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_") or k == "HOME"))
    return _session(profile, endpoint_url, settings)


@lru_cache(maxsize=8)
def _session(profile: str | None, endpoint_url: str | None, settings: tuple[tuple[str, str], ...]) -> Api:  # noqa: ARG001
    return Api(profile, endpoint_url)


def code_of(exc: BaseException) -> str:
    """Return AWS's code of an error, or of its cause; empty when it has none."""
    for error in (exc, exc.__cause__):
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def call(
    operation: Callable[..., Any],
    /,
    *,
    unless: Sequence[str] = (),
    patiently: Sequence[str] = (),
    patience_s: float = 0.0,
    **arguments: Any,
) -> Any:
    """Call an operation of a client.

    Returns None when AWS refuses it with a code of `unless`. While it refuses it with one of `patiently`, it is called
    again for up to `patience_s` seconds.
    """
    from botocore.exceptions import ClientError

    for _ in retry.looks(patience_s):
        try:
            return operation(**arguments)
        except ClientError as exc:
            if code_of(exc) in unless:
                return None
            if code_of(exc) not in patiently:
                raise
            refusal = exc
    raise refusal


def pages(client: Any, operation: str, name: str, **arguments: Any) -> Iterator[Any]:
    """Yield all items of a list that comes in pages, named `name` in each."""
    for page in client.get_paginator(operation).paginate(**arguments):
        yield from page[name]


def attempt(api: Api, steps: Iterable[tuple[str, Callable[[], None]]]) -> list[str]:
    """Do all steps, whatever becomes of each; return what may be left, and why."""
    left = []
    for what, step in steps:
        try:
            with api.api_errors(f"removing {what}"):
                step()
        except ProviderError as exc:
            left.append(f"{what} ({exc})")
    return left
