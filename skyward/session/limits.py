"""The limits of a pool: `timeout`, `idle_timeout` and `max_cost`, watched by threads until the pool is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from skyward.errors import PoolBudgetError, PoolTimeoutError
from skyward.events import CostUpdate

_LOOK_AT_COST_S = 1.0
_TELL_COST_S = 30.0


def watch_time(
    started: float,
    timeout: float,
    idle_timeout: float | None,
    *,
    idle_since: Callable[[], float],
    over: threading.Event,
    end: Callable[[PoolTimeoutError], None],
) -> None:
    """Call `end` when `timeout` seconds have passed since `started`, or `idle_timeout` since `idle_since()`."""
    deadline = started + timeout

    def watch() -> None:
        while True:
            limit = deadline
            if idle_timeout is not None:
                limit = min(limit, idle_since() + idle_timeout)
            left = limit - time.monotonic()
            if left <= 0:
                break
            if over.wait(left):
                return
        what = "timeout" if limit == deadline else "idle_timeout"
        seconds = timeout if limit == deadline else idle_timeout
        end(
            PoolTimeoutError(
                f"the pool's {what} of {seconds:g} s has passed: its machines were destroyed and calls that "
                f"had not finished are lost. Raise {what}=, or enter the pool again."
            )
        )

    threading.Thread(target=watch, name="skyward-timeout", daemon=True).start()


def watch_cost(
    cost: Callable[[], CostUpdate],
    max_cost: float | None,
    *,
    over: threading.Event,
    emit: Callable[[CostUpdate], None],
    is_up: Callable[[], bool],
    end: Callable[[PoolBudgetError], None],
    abort: Callable[[PoolBudgetError], None],
) -> None:
    """Emit the cost now and then. When it reaches `max_cost`, call `end`, or `abort` while the pool still starts."""

    def watch() -> None:
        emit_at = 0.0
        while not over.wait(_LOOK_AT_COST_S):
            now = cost()
            if time.monotonic() >= emit_at and now.elapsed_seconds:
                emit(now)
                emit_at = time.monotonic() + _TELL_COST_S
            if max_cost is None or now.accumulated_cost < max_cost:
                continue
            text = f"the pool has cost {now.accumulated_cost:.4f} USD, and max_cost is {max_cost:g}: its machines were"
            if is_up():
                end(PoolBudgetError(f"{text} destroyed and calls that had not finished are lost. Raise max_cost="))
                return
            abort(PoolBudgetError(f"{text} destroyed before they were ready. Raise max_cost="))

    threading.Thread(target=watch, name="skyward-cost", daemon=True).start()
