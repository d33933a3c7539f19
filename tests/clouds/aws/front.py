"""What stands before moto: credentials, counted calls, and faults of the API as a whole."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from tests.clouds.aws.cloud import AwsCloud

Start = Callable[..., Any]

# How each kind of service says the same: HTTP status and code. Amazon EC2 API Reference, "Error codes"; "Common Error
# Types" of SSM (JSON) and STS (query); Amazon S3 API Reference, "Error responses".
_CODES = {
    "wrong": {
        "ec2": (401, "AuthFailure"),
        "query": (403, "InvalidClientTokenId"),
        "json": (400, "UnrecognizedClientException"),
        "s3": (403, "InvalidAccessKeyId"),
    },
    "missing": {
        "ec2": (401, "AuthFailure"),
        "query": (403, "MissingAuthenticationToken"),
        "json": (400, "MissingAuthenticationToken"),
        "s3": (403, "AccessDenied"),
    },
    "expired": {
        "ec2": (400, "RequestExpired"),
        "query": (403, "ExpiredToken"),
        "json": (400, "ExpiredTokenException"),
        "s3": (400, "ExpiredToken"),
    },
    "throttled": {
        "ec2": (503, "RequestLimitExceeded"),
        "query": (400, "Throttling"),
        "json": (400, "ThrottlingException"),
        "s3": (503, "SlowDown"),
    },
    "unavailable": {
        "ec2": (503, "Unavailable"),
        "query": (503, "ServiceUnavailable"),
        "json": (503, "ServiceUnavailable"),
        "s3": (503, "ServiceUnavailable"),
    },
}
_MESSAGES = {
    "wrong": "AWS was not able to validate the provided access credentials",
    "missing": "Request is missing Authentication Token",
    "expired": "The security token included in the request is expired",
    "throttled": "Request limit exceeded.",
    "unavailable": "The server is overloaded and can't handle the request.",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request is for, and who asks."""

    service: str
    action: str
    kind: str
    access_key: str | None
    token: str | None
    body: bytes


class Front:
    """A WSGI application around another."""

    def __init__(self, cloud: AwsCloud, inner: Callable[[dict[str, Any], Start], Iterable[bytes]]) -> None:
        self._cloud, self._inner = cloud, inner

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        asked, faults = _read(environ), self._cloud.faults
        self._cloud.calls[asked.action] += 1
        if faults.take("cut", asked.action):
            return _hang_up(environ, start)
        for kind in ("unavailable", "throttled"):
            if faults.take(kind, asked.action):
                return _refuse(asked, kind, start)
        if problem := self._doubt(asked):
            return _refuse(asked, problem, start)
        answer = list(self._answer(asked, environ, start))
        if faults.take("lost", asked.action):
            return _hang_up(environ, None)
        return answer

    def _doubt(self, asked: Asked) -> str | None:
        cloud = self._cloud
        if asked.access_key is None:
            return None if asked.kind == "s3" else "missing"
        if asked.token == cloud.expired_token:
            return "expired"
        given = {cloud.access_key: None, **cloud.temporary}
        if asked.access_key not in given or given[asked.access_key] != asked.token:
            return "wrong"
        return None

    def _answer(self, asked: Asked, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        if asked.service != "pricing":
            return self._inner(environ, start)
        from tests.clouds.aws import catalog

        start("200 OK", [("Content-Type", "application/x-amz-json-1.1")])
        return [json.dumps(catalog.products(json.loads(asked.body))).encode()]


def _read(environ: dict[str, Any]) -> Asked:
    service, access_key = "s3", None
    parts = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2].split(",")[0].split("/")
    if len(parts) == 5:
        access_key, service = parts[0], parts[3]
    target, body, action = environ.get("HTTP_X_AMZ_TARGET", ""), b"", ""
    if target or environ.get("CONTENT_TYPE", "").startswith("application/x-www-form-urlencoded"):
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        action = target.rpartition(".")[2] or parse_qs(body.decode()).get("Action", [""])[0]
    kind = "s3" if service == "s3" and not action else "ec2" if service == "ec2" else "json" if target else "query"
    return Asked(
        service=service,
        action=action or f"{service}:{environ['REQUEST_METHOD']}",
        kind=kind,
        access_key=access_key,
        token=environ.get("HTTP_X_AMZ_SECURITY_TOKEN"),
        body=body,
    )


def _refuse(asked: Asked, problem: str, start: Start) -> Iterable[bytes]:
    status, code = _CODES[problem][asked.kind]
    message = _MESSAGES[problem]
    error = f"<Code>{code}</Code><Message>{message}</Message>"
    text = {
        "ec2": f"<Response><Errors><Error>{error}</Error></Errors><RequestID>0</RequestID></Response>",
        "query": f"<ErrorResponse><Error><Type>Sender</Type>{error}</Error><RequestId>0</RequestId></ErrorResponse>",
        "s3": f"<Error>{error}<RequestId>0</RequestId></Error>",
        "json": json.dumps({"__type": code, "message": message}),
    }[asked.kind]
    content = "application/x-amz-json-1.1" if asked.kind == "json" else "text/xml"
    start(f"{status} refused", [("Content-Type", content), ("Content-Length", str(len(text)))])
    return [text.encode()]


def _hang_up(environ: dict[str, Any], start: Start | None) -> Iterable[bytes]:
    """Close the connection; whatever the server writes to it afterwards does not arrive."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    if start is not None:
        start("500 hung up", [])
    return [b""]
