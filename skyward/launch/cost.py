"""What a pool costs: prices times hours as each provider bills them, and the events that tell of it.

Machines alone: disks, addresses and traffic are not in it. Pure; the caller passes the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from skyward.events import CostFinal, CostUpdate
from skyward.providers.base import Machine
from skyward.providers.billing import BILLING, Billing

_HOUR_S = 3600.0


@dataclass(slots=True)
class _BilledMachine:
    """One machine in the pool's service. `ended` is in seconds since the epoch; None: it runs."""

    machine: Machine
    billing: Billing
    ended: float | None = None
    reclaimed: bool = False

    @property
    def is_known(self) -> bool:
        return self.machine.price is not None and self.machine.launched is not None

    def cost(self, now: float) -> float:
        return 0.0 if self._was_free(now) else self._at(self.machine.price, now)

    def saved(self, now: float) -> float:
        if not (self.machine.spot and self.is_known and self.machine.price_on_demand is not None):
            return 0.0
        return self._at(self.machine.price_on_demand, now) - self.cost(now)

    def _at(self, price: float | None, now: float) -> float:
        launched = self.machine.launched
        until = now if self.ended is None else min(now, self.ended)
        if price is None or launched is None or until < launched:
            return 0.0
        return self.billing.cost(until - launched, price)

    def _was_free(self, now: float) -> bool:
        launched = self.machine.launched
        if not (self.reclaimed and self.machine.spot) or launched is None or self.ended is None:
            return False
        return self.ended <= now and self.ended - launched < self.billing.free_if_reclaimed_s


class Meter:
    """Counts what machines cost, from the launch of each to its end. For one thread.

    Costs are those that would be to pay if every machine ended at the time that is asked about. So they never fall
    as time goes by, unless a spot machine was taken back early enough to cost nothing.
    """

    def __init__(self) -> None:
        self._billed: dict[str, _BilledMachine] = {}

    def add(self, machine: Machine, billing: Billing | None = None) -> None:
        """Count a machine from its launch on, by its provider's rule or `billing`; a second time changes nothing."""
        rule = billing or BILLING.get(machine.provider, Billing())
        self._billed.setdefault(machine.id, _BilledMachine(machine, rule))

    def end(self, machine_id: str, at: float, *, reclaimed: bool = False) -> None:
        """Count a machine no further than `at`; the first end counts, and an unknown machine is left alone.

        `reclaimed`: the provider took it back, by no wish of ours.
        """
        one = self._billed.get(machine_id)
        if one is not None and one.ended is None:
            one.ended, one.reclaimed = at, reclaimed

    @property
    def unknown(self) -> tuple[str, ...]:
        """The machines that are counted as nothing, since their price or launch is not known."""
        return tuple(name for name, one in self._billed.items() if not one.is_known)

    @property
    def began(self) -> float | None:
        """When the first machine was launched; None: not known."""
        return min((s.machine.launched for s in self._billed.values() if s.machine.launched is not None), default=None)

    @property
    def ended(self) -> float | None:
        """When the last machine ended; None: some run."""
        ends = [one.ended for one in self._billed.values()]
        return max((end for end in ends if end is not None), default=None) if None not in ends else None

    def cost(self, now: float) -> float:
        """Return the cost in USD up to `now`."""
        return math.fsum(one.cost(now) for one in self._billed.values())

    def savings(self, now: float) -> float:
        """Return how much more the spot machines would have cost as others, where both prices are known."""
        return math.fsum(one.saved(now) for one in self._billed.values())

    def hourly_rate(self) -> float:
        """Return what the machines that run cost together, in USD per hour."""
        return math.fsum(one.machine.price or 0.0 for one in self._running())

    def counts(self, *, ended: bool = False) -> tuple[int, int]:
        """Return how many spot machines and others run, or with `ended` have ever run."""
        billed = list(self._billed.values()) if ended else self._running()
        spot = sum(one.machine.spot for one in billed)
        return spot, len(billed) - spot

    def _running(self) -> list[_BilledMachine]:
        return [one for one in self._billed.values() if one.ended is None]


def update(meter: Meter, now: float) -> CostUpdate:
    """Return what the pool costs at present: counts and rate are of the machines that run."""
    spot, others = meter.counts()
    return CostUpdate(
        elapsed_seconds=_elapsed_s(meter, now),
        accumulated_cost=meter.cost(now),
        hourly_rate=meter.hourly_rate(),
        spot_count=spot,
        ondemand_count=others,
    )


def final(meter: Meter, now: float) -> CostFinal:
    """Return what the pool has cost: counts are of all machines that it has had, the rate is that of its whole time."""
    spot, others = meter.counts(ended=True)
    total, seconds = meter.cost(now), _elapsed_s(meter, now)
    return CostFinal(
        total_cost=total,
        total_seconds=seconds,
        hourly_rate=total * _HOUR_S / seconds if seconds else 0.0,
        spot_count=spot,
        ondemand_count=others,
        savings_vs_ondemand=meter.savings(now),
    )


def _elapsed_s(meter: Meter, now: float) -> float:
    until = now if meter.ended is None else min(now, meter.ended)
    return max(0.0, until - meter.began) if meter.began is not None else 0.0
