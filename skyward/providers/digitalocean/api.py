"""DigitalOcean's API as `sky.DigitalOcean` uses it: the SDK's client with time-outs and retries, its errors as ours.

Imports azure-core, which pydo is built on, so it is itself imported on first use. Knows nothing of pools and machines.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

from azure.core.credentials import AzureKeyCredential
from azure.core.exceptions import AzureError, HttpResponseError, ResourceNotFoundError, ServiceRequestError
from azure.core.pipeline.policies import AzureKeyCredentialPolicy, RetryPolicy

from skyward.errors import CapacityError, CredentialsError, ProviderError, QuotaError
from skyward.providers import retry
from skyward.providers.base import LaunchOrder

T = TypeVar("T")

# azure-core tells of every call at INFO; its own name is used to find out more.
logging.getLogger("azure.core.pipeline.policies.http_logging_policy").setLevel(logging.WARNING)

RETRIES: dict[str, Any] = {
    "retry_total": 6, "retry_connect": 4, "retry_read": 4, "retry_status": 6,
    "retry_backoff_factor": 0.5, "retry_backoff_max": 8,
}  # fmt: skip
"""The SDK's own, for what can be asked for twice without harm: about 15 s in all."""
PAUSES_S = (0.5, 2.0, 5.0)
"""Between attempts at what can't."""
_TIMEOUTS_S: dict[str, Any] = {"connection_timeout": 10, "read_timeout": 60, "timeout": 300}
_MOST_WAIT_S = 90.0  # for the burst limit of a minute, not for the hourly one
_PER_PAGE = 200


class _Retries(RetryPolicy):  # type: ignore[type-arg]
    """Tries again with jitter; not what may have made something, unless it was refused for its pace."""

    def is_retry(self, settings: dict[str, Any], response: Any) -> bool:
        if response.http_response.status_code == 429:
            return self.get_retry_after(response) <= _MOST_WAIT_S
        if response.http_request.method == "POST":
            return False
        return bool(super().is_retry(settings, response))

    def get_retry_after(self, response: Any) -> float:
        # With 429 comes `retry-after`; GitHub digitalocean/openapi 818, 2023-08-24.
        return (super().get_retry_after(response) or 0.0) * random.uniform(1.0, 1.2)

    def get_backoff_time(self, settings: dict[str, Any]) -> float:
        return super().get_backoff_time(settings) * random.uniform(0.5, 1.5)


def client(token: str, url: str) -> Any:
    """Return the SDK's client, to be closed."""
    return import_module("pydo").Client(  # not imported by name, as type checkers take minutes to read it
        token,
        endpoint=url,
        retry_policy=_Retries(**RETRIES, timeout=_TIMEOUTS_S["timeout"]),
        # The SDK's own refuses addresses without TLS, such as an emulator's.
        authentication_policy=AzureKeyCredentialPolicy(AzureKeyCredential(token), "Authorization", prefix="Bearer"),
        **_TIMEOUTS_S,
    )


# --- calls --------------------------------------------------------------------------------------------------


def call(do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a call answers. The SDK returns some refusals as if they were answers; they are raised here."""

    def check(pipeline: Any, body: Any, _: Any) -> Any:
        response = pipeline.http_response
        if response.status_code >= 400:
            kind = ResourceNotFoundError if response.status_code == 404 else HttpResponseError
            raise kind(response=response)
        return body

    return do(*args, cls=check, **kwargs)


def pages(do: Callable[..., Any], name: str, **kwargs: Any) -> list[dict[str, Any]]:
    """Return all items of a list that comes in pages, named `name` in each."""
    found: list[dict[str, Any]] = []
    page = 0
    while True:
        page += 1
        answer = call(do, per_page=_PER_PAGE, page=page, **kwargs)
        found += answer[name] or []
        if not (answer.get("links", {}).get("pages") or {}).get("next"):
            return found


def unless_missing(do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a call answers; None when what it is about is not there."""
    try:
        return call(do, *args, **kwargs)
    except ResourceNotFoundError:
        return None


def create_once(order: LaunchOrder, create: Callable[[], T], find: Callable[[], T | None]) -> T:
    """Return what `create` makes, or what `find` finds if it is there already or its answer was lost: never two."""

    def look_s(exc: Exception) -> float | None:
        if _is_there(exc):
            return retry.LISTED_S  # what is refused as it is there already may not be listed yet
        return 0.0 if is_unclear(exc) or _status(exc) in (409, 422) else None

    return retry.create_once(order, create, find, is_unclear=is_unclear, look_s=look_s, pauses_s=PAUSES_S)


def is_unclear(exc: BaseException) -> bool:
    """Tell whether a call may have been done although it has failed."""
    if isinstance(exc, HttpResponseError) and exc.status_code is not None:
        return exc.status_code >= 500
    return isinstance(exc, (AzureError, ValueError))


def _is_there(exc: Exception) -> bool:
    return _status(exc) in (409, 422) and bool(re.search("already|duplicate", str(exc), re.IGNORECASE))


def _status(exc: BaseException) -> int | None:
    return exc.status_code if isinstance(exc, HttpResponseError) else None


# --- errors -------------------------------------------------------------------------------------------------


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Raise the SDK's errors as ours; `doing` follows "could not"."""
    try:
        yield
    except HttpResponseError as exc:
        raise _translate(exc, doing) from exc
    except ServiceRequestError as exc:
        raise ProviderError(f"DigitalOcean's API could not be reached to {doing}: {exc.message}") from exc
    except AzureError as exc:
        raise ProviderError(f"DigitalOcean's API did not answer to {doing}: {exc.message}") from exc
    except (ValueError, KeyError) as exc:  # no JSON, or other JSON than is described
        raise ProviderError(f"DigitalOcean's API sent an answer to {doing} that can't be read: {exc!r}") from exc


def _translate(exc: HttpResponseError, doing: str) -> ProviderError:
    status, words = exc.status_code, _words(exc)
    match status:
        case 401:
            return CredentialsError(
                f"DigitalOcean refuses the token in DIGITALOCEAN_TOKEN or DIGITALOCEAN_ACCESS_TOKEN: {words}. It is "
                "wrong, revoked or expired: create a new one at https://cloud.digitalocean.com/account/api/tokens"
            )
        case 403:
            return CredentialsError(
                f"DigitalOcean's token may not {doing}: {words}. Give it the scopes droplet, image, actions, sizes, "
                "regions, firewall, ssh_key and tag at https://cloud.digitalocean.com/account/api/tokens"
            )
        case 429:
            response: Any = exc.response
            again = response.headers.get("retry-after")
            wait = f"; it answers again in {again} s" if again else ""
            return ProviderError(f"DigitalOcean's API got too many requests to {doing}: {words}{wait}")
    if status in (402, 422) and re.search(r"limit|quota", words, re.IGNORECASE):
        return QuotaError(
            f"DigitalOcean would not {doing}: {words}. The account's droplet limit is raised at "
            "https://cloud.digitalocean.com/account/team/droplet_limit_increase",
            rules_out="provider" if "droplet limit" in words.lower() else "offer",
        )
    if re.search(r"not available|unavailable|capacity|sold out|out of stock", words, re.IGNORECASE) and status == 422:
        return CapacityError(f"DigitalOcean could not {doing}: {words}")
    return ProviderError(f"DigitalOcean could not {doing}: {words} ({status})")


def _words(exc: HttpResponseError) -> str:
    """Return what an answer says of its error, shown as short as it is there."""
    try:
        response: Any = exc.response
        answer = response.json()
        return str(answer.get("message") or answer["error"]).rstrip(".")
    except (AttributeError, KeyError, TypeError, ValueError):
        return exc.reason or "no reason"
