"""A cloud's notice that it will take this machine away, as seen on the machine."""

from __future__ import annotations

import datetime
import json
import logging
import urllib.error
import urllib.request

logger = logging.getLogger(__name__)

PERIOD_S = 5.0
"""Between two looks; recommended in the Amazon EC2 User Guide, "Spot Instance interruption notices"."""
_METADATA = "http://169.254.169.254/latest"
_WAIT_S = 2.0


def seconds_left(cloud: str) -> float | None:
    """Return how many seconds this machine still has; None when there is no notice, or none can be had.

    Raises
    ------
    ValueError
        A cloud that gives no notices.
    """
    if cloud != "aws":
        raise ValueError(f"no notices are known of {cloud!r}")
    try:
        token = _ask("/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
        action = json.loads(_ask("/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))
        at = datetime.datetime.fromisoformat(action["time"])
    except urllib.error.HTTPError as exc:
        if exc.code != 404:  # which says that there is no notice
            logger.warning("no answer from the instance metadata: %s", exc)
        return None
    except (OSError, ValueError, KeyError) as exc:
        logger.warning("no answer from the instance metadata: %s", exc)
        return None
    return max(0.0, (at - datetime.datetime.now(datetime.UTC)).total_seconds())


def _ask(path: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(_METADATA + path, headers=headers, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=_WAIT_S) as answer:
        text: str = answer.read().decode()
    return text
