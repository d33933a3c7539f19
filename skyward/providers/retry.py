"""Attempts at what a cloud refuses or doesn't show for a while: pauses, deadlines, and creates whose answer is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from skyward.providers.base import LaunchOrder

T = TypeVar("T")

LISTED_S = 30.0
"""Seconds after which a machine that a cloud may have made is listed, or was not made.

Amazon EC2 advises to ask again after a couple of seconds and for up to a few minutes ("Eventual consistency in the
Amazon EC2 API", Amazon EC2 Developer Guide, 2026-11). Droplets are listed some seconds after their create call (GitHub
digitalocean/api-v2 202, 2025-05). Verda documents nothing. Chosen, not measured.
"""
LATE_S = 5.0
"""Seconds from the first look of a pool's end to its last one. Chosen, not measured: launches have ended by then."""
PAUSES_S = (0.2, 3.0)
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


def sleep_until_late(began: float) -> None:
    """Sleep until `LATE_S` seconds have passed since `began`, a time of `time.monotonic`."""
    time.sleep(max(0.0, began + LATE_S - time.monotonic()))


def patiently(call: Callable[[], T], may_pass: Callable[[Exception], bool], pauses_s: Sequence[float]) -> T:
    """Return what `call` returns. While `may_pass` says so of its error, it is called again after each pause."""
    for pause_s in pauses_s:
        try:
            return call()
        except Exception as exc:  # judged by `may_pass`
            if not may_pass(exc):
                raise
        time.sleep(jittered(pause_s))
    return call()


def create_once(
    order: LaunchOrder,
    create: Callable[[], T],
    find: Callable[[], T | None],
    *,
    is_unclear: Callable[[Exception], bool],
    look_s: Callable[[Exception], float | None],
    pauses_s: Sequence[float],
) -> T:
    """Return what `create` makes, or what `find` finds of it if its answer was lost: never two.

    Parameters
    ----------
    is_unclear
        Tells of an error whether it may have been made all the same. If it is not found then, it is asked for again.
    look_s
        Tells for how many seconds to look for it after an error; None: it was not made, and the error is raised.
    pauses_s
        Seconds from an unclear error to the first look, for each attempt; before jitter.
    """
    for pause_s in pauses_s:
        order.creating()
        try:
            return create()
        except Exception as exc:  # judged by `look_s`
            within_s = look_s(exc)
            if within_s is None:
                raise
            if is_unclear(exc):
                order.pause(jittered(pause_s))
            for _ in looks(within_s, order.pause):
                if (found := find()) is not None:
                    return found
            if not is_unclear(exc):
                raise
            error = exc
    raise error


def jittered(seconds: float) -> float:
    return seconds * random.uniform(0.5, 1.5)
