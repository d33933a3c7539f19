"""What accounts with clouds are like: whose credentials are found, whether they work, and how far they reach.

Asks with calls that change nothing. Secrets are never part of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from skyward.errors import CredentialsError
from skyward.providers.aws.provider import AWS
from skyward.providers.base import Cloud
from skyward.providers.digitalocean.provider import DigitalOcean
from skyward.providers.verda.provider import Verda


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An account whose credentials work.

    Attributes
    ----------
    credentials
        Where they were found, in words.
    identity
        Whose they are, as the cloud says it; empty when it does not.
    limits
        What it may have at once, or spend, as the cloud says it.
    unknown
        Why limits are not known; empty when they are.
    problem
        What keeps it from having machines; empty when nothing does.
    """

    credentials: str
    identity: str = ""
    limits: Mapping[str, str] = field(default_factory=dict)
    unknown: str = ""
    problem: str = ""


def account(cloud: Cloud) -> Account:
    """Return the account that pools of `cloud` would use.

    Raises
    ------
    CredentialsError
        There are none (`missing`), or they are refused.
    ProviderError
        The SDK is not installed, with that error as cause, or the cloud does not answer.
    """
    match cloud:
        case AWS():
            return _aws(cloud)
        case DigitalOcean():
            return _digitalocean(cloud)
        case Verda():
            return _verda(cloud)
    raise TypeError(f"no cloud whose accounts are known: {cloud!r}")


# --- AWS ----------------------------------------------------------------------------------------------------


def _aws(cloud: AWS) -> Account:
    from skyward.providers.aws.api import QUOTAS, api

    found = api(cloud.profile, cloud.endpoint_url)
    origin = found.origin()
    region = cloud.region or found.default_region()
    found.check_region(region)
    with found.api_errors("asking whose credentials these are"):
        identity = found.client("sts", region).get_caller_identity()["Arn"]
    with found.api_errors(f"listing the zones of {region}"):
        found.client("ec2", region).describe_availability_zones()
    limits, unknown = _aws_limits(found.client("service-quotas", region), QUOTAS, region)
    return Account(credentials=origin, identity=identity, limits=limits, unknown=unknown)


def _aws_limits(quotas: Any, codes: Mapping[str, str], region: str) -> tuple[dict[str, str], str]:
    """Return quotas of vCPUs by what they are of, and why some are not known."""
    from skyward.providers.aws.api import DENIED, code_of

    def ask(code: str) -> float | Exception:
        try:
            return float(quotas.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"])
        except Exception as exc:  # whatever it is: quotas are good to know, and pools do without them
            return exc

    with ThreadPoolExecutor(len(codes), thread_name_prefix="skyward-quotas") as threads:
        answers = dict(zip(codes, threads.map(ask, codes.values()), strict=True))
    limits = {f"{what} in {region}": f"{n:g} vCPUs" for what, n in answers.items() if isinstance(n, float)}
    failure = next((answer for answer in answers.values() if isinstance(answer, Exception)), None)
    if failure is None:
        return limits, ""
    code = code_of(failure) or type(failure).__name__
    why = "the credentials may not (servicequotas:GetServiceQuota)" if code in DENIED else code
    return limits, f"quotas of vCPUs in {region} could not be read: {why}"


# --- DigitalOcean -------------------------------------------------------------------------------------------


def _digitalocean(cloud: DigitalOcean) -> Account:
    from skyward.providers.digitalocean.provider import token_variable

    with cloud._client() as opened:
        from skyward.providers.digitalocean.api import call, explained

        try:
            with explained("see the account"):
                facts = call(opened.do.account.get)["account"]
        except CredentialsError as exc:
            if getattr(exc.__cause__, "status_code", None) != 403:
                raise
            with explained("list sizes"):  # a token that may not see the account may still launch droplets
                call(opened.do.sizes.list, per_page=1)
            unknown = "the droplet limit is not shown to this token: it lacks the scope account:read"
            return Account(credentials=token_variable(), unknown=unknown)
    status = str(facts.get("status", "active"))
    problem = "" if status == "active" else f"the account is {status!r}: {facts.get('status_message') or 'no reason'}"
    return Account(
        credentials=token_variable(),
        identity=str(facts.get("email", "")),
        limits={"droplets": str(facts["droplet_limit"])} if "droplet_limit" in facts else {},
        problem=problem,
    )


# --- Verda --------------------------------------------------------------------------------------------------


def _verda(cloud: Verda) -> Account:
    client_id, _, api = cloud._account()
    from skyward.providers.verda.api import explained
    from skyward.providers.verda.provider import credentials_variables

    with explained("see the balance"):
        balance = api.balance.get()
    return Account(
        credentials=credentials_variables(),
        identity=f"client {client_id}",
        limits={"balance": f"{balance.amount:.2f} {balance.currency}"},
        problem="" if balance.amount > 0 else "the balance is used up: add to it at console.verda.com, Billing",
    )


