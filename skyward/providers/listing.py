"""How long clouds may take to list what they have made, and looks that allow for it. Imports nothing of skyward."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

LISTED_S = 30.0
"""Seconds after which a machine that a cloud may have made is listed, or was not made.

Amazon EC2 advises to ask again after a couple of seconds and for up to a few minutes ("Eventual consistency in the
Amazon EC2 API", Amazon EC2 Developer Guide, 2026-11). Droplets are listed some seconds after their create call (GitHub
digitalocean/api-v2 202, 2025-05). Verda documents nothing. Chosen, not measured.
"""
LATE_S = 5.0
"""Seconds from the first look of a pool's end to its last one. Chosen, not measured: launches have ended by then."""
PAUSES_S = (0.5, 3.0)
"""Seconds between looks, which grow from the one to the other."""


def looks(within_s: float, sleep: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Yield at once, then after pauses that grow, and for the last time when `within_s` seconds have passed."""
    deadline = time.monotonic() + within_s
    pause_s, most_s = PAUSES_S
    yield
    while (left_s := deadline - time.monotonic()) > 0:
        sleep(min(left_s, pause_s * random.uniform(0.8, 1.2)))
        pause_s = min(most_s, 1.5 * pause_s)
        yield
