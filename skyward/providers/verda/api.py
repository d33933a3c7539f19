"""Verda's API as `sky.Verda` uses it: the SDK's services with time-outs and retries, and its errors as ours.

Imports the SDK, so it is itself imported on first use. Knows nothing of pools and machines.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar

import requests
from verda.authentication import AuthenticationService
from verda.balance import BalanceService
from verda.constants import ErrorCodes
from verda.exceptions import APIException
from verda.http_client import HTTPClient, handle_error
from verda.images import ImagesService
from verda.instance_types import InstanceTypesService
from verda.instances import InstancesService
from verda.ssh_keys import SSHKeysService
from verda.startup_scripts import StartupScriptsService
from verda.volumes import VolumesService

from skyward.errors import CapacityError, CredentialsError, ProviderError, QuotaError
from skyward.providers import retry
from skyward.providers.base import LaunchOrder

T = TypeVar("T")

DEFAULT_URL = "https://api.verda.com/v1"
"""The SDK's own default."""
LOOKED_FOR = "VERDA_CLIENT_ID and VERDA_CLIENT_SECRET, or VERDA_API_KEY as 'id:secret'"
_TIMEOUTS_S = (10.0, 60.0)
"""Seconds to connect, and for each part of an answer."""
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Between attempts, before jitter: 15 s in all. The SDK does not show what Retry-After says."""
_CREATES = 3
"""Times that something is asked for while answers are lost. No pauses: it is looked for in between."""

# Error codes: api.verda.com/v1/docs, which has one that the SDK does not list.
_TOO_FAST = "rate_limit_exceeded"
_OUTAGES = (ErrorCodes.SERVER_ERROR, ErrorCodes.SERVICE_UNAVAILABLE, None, "")
_WRONG_STATE = (ErrorCodes.INVALID_REQUEST, ErrorCodes.NOT_FOUND)


class Api:
    """The services of one account."""

    def __init__(self, client_id: str, client_secret: str, url: str) -> None:
        http = _Http(_Authentication(client_id, client_secret, url), url)
        self.balance: Any = BalanceService(http)
        self.images: Any = ImagesService(http)
        self.instances: Any = InstancesService(http)
        self.instance_types: Any = InstanceTypesService(http)
        self.scripts: Any = StartupScriptsService(http)
        self.ssh_keys: Any = SSHKeysService(http)
        self.volumes: Any = VolumesService(http)


@lru_cache(maxsize=8)
def api(client_id: str, client_secret: str, url: str) -> Api:
    """Return the services of an account, logged in to.

    Raises
    ------
    CredentialsError, ProviderError
        Verda does not let us in, or does not answer.
    """
    return Api(client_id, client_secret, url)


class _Authentication(AuthenticationService):  # type: ignore[misc] # the SDK is untyped
    """Logs in as the SDK does, with a time-out. It has the credentials at hand and needs no refresh tokens."""

    def authenticate(self) -> dict[str, Any]:
        with explained("log in"):
            return retry.patiently(self._log_in, _may_pass, _PAUSES_S)

    refresh = authenticate

    def _log_in(self) -> dict[str, Any]:
        credentials = {"client_id": self._client_id, "client_secret": self._client_secret}
        response = requests.post(
            f"{self._base_url}/oauth2/token",
            json={"grant_type": "client_credentials", **credentials},
            headers=self._generate_headers(),
            timeout=_TIMEOUTS_S,
        )
        try:
            handle_error(response)
        except APIException as exc:
            if response.status_code not in (400, 401, 403):
                raise
            raise _refused(exc) from exc
        answer: dict[str, Any] = response.json()
        self._access_token = answer["access_token"]
        self._expires_at = time.time() + answer["expires_in"]
        return answer


class _Http(HTTPClient):  # type: ignore[misc] # the SDK is untyped
    """Sends as the SDK does, with time-outs, and again where that can do no harm."""

    def _request(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        send = partial(super()._request, method, url, *args, timeout=_TIMEOUTS_S, **kwargs)
        # A POST that may have arrived is its caller's affair; one that was refused for its pace has done nothing.
        again = _is_too_fast if method == "POST" else _may_pass
        try:
            return retry.patiently(send, again, _PAUSES_S)
        except APIException as exc:
            if exc.code != ErrorCodes.UNAUTHORIZED_REQUEST:
                raise
        self._auth_service.authenticate()  # the token has ended before its time
        return retry.patiently(send, again, _PAUSES_S)


def _is_too_fast(exc: Exception) -> bool:
    return isinstance(exc, APIException) and exc.code == _TOO_FAST


def _may_pass(exc: Exception) -> bool:
    return _is_too_fast(exc) or is_unclear(exc)


def is_unclear(exc: Exception) -> bool:
    """Tell whether a call may have been done although it has failed. What is no JSON is a gateway's answer."""
    if isinstance(exc, APIException):
        return exc.code in _OUTAGES
    return isinstance(exc, (requests.RequestException, ValueError))


def is_wrong_state(exc: Exception) -> bool:
    """Tell whether a call was refused because something isn't there, or not in the state that it would have to be."""
    return isinstance(exc, APIException) and exc.code in _WRONG_STATE


def is_no_capacity(exc: Exception) -> bool:
    """Tell whether a request for a machine was refused because there is none: 503, api.verda.com/v1/docs."""
    return isinstance(exc, APIException) and (
        exc.code == ErrorCodes.SERVICE_UNAVAILABLE or "capacity" in (exc.message or "").lower()
    )


def create_once(order: LaunchOrder, create: Callable[[], T], find: Callable[[], T | None]) -> T:
    """Return what `create` makes, or what `find` finds of it if its answer was lost: never two.

    The SDK asks for what it has made before it returns it, so that any error may mean that it is there, though it may
    not be listed yet.
    """

    def may_be_there(exc: Exception) -> bool:
        is_unknown = isinstance(exc, APIException) and exc.code == ErrorCodes.NOT_FOUND
        return (is_unclear(exc) or is_unknown) and not is_no_capacity(exc)

    return retry.create_once(
        order,
        create,
        find,
        is_unclear=may_be_there,
        look_s=lambda exc: retry.LISTED_S if may_be_there(exc) else 0.0,
        pauses_s=(0.0,) * _CREATES,
    )


# --- errors -------------------------------------------------------------------------------------------------


@contextmanager
def explained(doing: str, *, creates: bool = False) -> Iterator[None]:
    """Raise the SDK's errors as ours. `creates`: it asks for a machine, and 503 means that there is none."""
    try:
        yield
    except APIException as exc:
        raise _translate(exc, doing, creates) from exc
    except requests.RequestException as exc:
        raise ProviderError(f"Verda's API could not be reached to {doing}: {type(exc).__name__}: {exc}") from exc
    except (ValueError, KeyError) as exc:  # no JSON, or other JSON than the SDK expects
        raise ProviderError(f"Verda's API sent an answer to {doing} that can't be read: {exc!r}") from exc


def _translate(exc: APIException, doing: str, creates: bool) -> ProviderError:
    words = f"{exc.message or exc.code or 'no reason'}"
    if exc.code == ErrorCodes.UNAUTHORIZED_REQUEST:
        return _refused(exc)
    if exc.code == ErrorCodes.INSUFFICIENT_FUNDS:
        return QuotaError(
            f"Verda would not {doing}: {words}. The account's balance is used up: add to it at console.verda.com, "
            "Billing"
        )
    if re.search(r"quota|limit", words, re.IGNORECASE) and exc.code != _TOO_FAST:
        return QuotaError(f"Verda would not {doing}: {words}. Ask support@verda.com to raise the account's limit")
    if creates and is_no_capacity(exc):
        return CapacityError(f"Verda could not {doing}: {words}")
    return ProviderError(f"Verda could not {doing}: {words} ({exc.code or 'no code'})")


def _refused(exc: APIException) -> CredentialsError:
    return CredentialsError(
        f"Verda refuses the credentials in {LOOKED_FOR}: {exc.message or exc.code}. They are wrong, deleted or "
        "expired: create new ones at console.verda.com, Keys"
    )
