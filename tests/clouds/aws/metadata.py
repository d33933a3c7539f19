"""The instance metadata service, version 2 alone, which knows machines by their addresses."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tests.clouds.aws.cloud import Lent, credentials_of, identity, instant

if TYPE_CHECKING:
    from tests.clouds.aws.cloud import AwsCloud

_TOKEN = "/latest/api/token"
_LONGEST_S = 21600


class Metadata:
    """A WSGI application. Amazon EC2 User Guide, "Use the Instance Metadata Service to access instance metadata"."""

    def __init__(self, cloud: AwsCloud) -> None:
        self._cloud = cloud
        self._tokens: dict[str, tuple[str, float]] = {}

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        status, text = self._answer(environ)
        headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(text.encode())))]
        if environ["PATH_INFO"] == _TOKEN and status.startswith("200"):  # SDKs want to know for how long it is good
            seconds = environ["HTTP_X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS"]
            headers.append(("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", seconds))
        start(status, headers)
        return [text.encode()]

    def _answer(self, environ: dict[str, Any]) -> tuple[str, str]:
        path, method, address = environ["PATH_INFO"], environ["REQUEST_METHOD"], environ["REMOTE_ADDR"]
        lent = self._cloud.at_address(address)
        if lent is None:
            return "404 Not Found", "no machine has this address"
        if path == _TOKEN:
            asked = environ.get("HTTP_X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS", "")
            if method != "PUT":
                return "405 Not Allowed", ""
            if not asked.isdigit() or not 1 <= int(asked) <= _LONGEST_S:
                return "400 Bad Request", ""
            token = secrets.token_urlsafe(32)
            self._tokens[token] = (address, time.time() + int(asked))
            return "200 OK", token
        owner, until = self._tokens.get(environ.get("HTTP_X_AWS_EC2_METADATA_TOKEN", ""), ("", 0.0))
        if owner != address or time.time() > until:
            return "401 Unauthorized", ""
        found = self._find(lent, path)
        return ("404 Not Found", "") if found is None else ("200 OK", found)

    def _find(self, lent: Lent, path: str) -> str | None:
        """Return what is at a path; for a folder, what is in it."""
        pages = self._pages(lent)
        if path in pages:
            return pages[path]
        folder = path.rstrip("/") + "/"
        inside = [page.removeprefix(folder) for page in pages if page.startswith(folder)]
        names = dict.fromkeys(name.split("/")[0] + ("/" if "/" in name else "") for name in inside)
        return "\n".join(names) if names else None

    def _pages(self, lent: Lent) -> dict[str, str]:
        instance = lent.instance
        data = {
            "ami-id": instance.image_id,
            "instance-id": instance.id,
            "instance-life-cycle": lent.place.market,
            "instance-type": instance.instance_type,
            "local-ipv4": lent.address,
            "placement/availability-zone": lent.place.zone,
            "placement/region": lent.region,
        }
        if lent.is_public:
            data["public-ipv4"] = lent.address
        if lent.notice_until is not None:
            when = instant(lent.notice_until)
            data["spot/instance-action"] = json.dumps({"action": "terminate", "time": when})
            data["spot/termination-time"] = when
        if (given := credentials_of(self._cloud, lent)) is not None:
            role, credentials = given
            data["iam/info"] = json.dumps(
                {"Code": "Success", "InstanceProfileArn": instance.iam_instance_profile["Arn"]}
            )
            data[f"iam/security-credentials/{role}"] = json.dumps(credentials, indent=2)
        pages = {f"/latest/meta-data/{name}": text for name, text in data.items()}
        pages["/latest/dynamic/instance-identity/document"] = identity(lent)
        if lent.user_data:
            pages["/latest/user-data"] = lent.user_data
        return pages
