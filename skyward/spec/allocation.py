"""How many of a pool's machines may be spot machines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from skyward.spec.validation import (
    Problems,
    check_allocation_share,
    check_choice,
)

KINDS = ("always-spot", "spot-if-available", "on-demand", "cheapest", "percent")


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many of the nodes are spot machines, which cost less and may be taken away.

    Made by ``Allocation.AlwaysSpot()``, ``.SpotIfAvailable()``, ``.OnDemand()``, ``.Cheapest()`` and
    ``.Percent(spot=0.8)``, or by `parse`.
    """

    kind: str
    spot: float = 0.0

    def __post_init__(self) -> None:
        problems = Problems("Allocation")
        problems.check("kind", self.kind, check_choice(KINDS))
        problems.check("spot", self.spot, check_allocation_share)
        problems.raise_if_any()

    def __call__(self) -> Allocation:
        """Return itself, so that ``Allocation.OnDemand`` and ``Allocation.OnDemand()`` are the same."""
        return self

    AlwaysSpot: ClassVar[Allocation]
    SpotIfAvailable: ClassVar[Allocation]
    OnDemand: ClassVar[Allocation]
    Cheapest: ClassVar[Allocation]

    @classmethod
    def Percent(cls, spot: float) -> Allocation:  # noqa: N802 - beside its siblings
        """Return an allocation with at least the share `spot` (0 to 1) of spot machines, in whole nodes."""
        problems = Problems("Allocation.Percent")
        problems.check("spot", spot, check_allocation_share)
        problems.raise_if_any()
        return cls("percent", float(spot))

    @classmethod
    def parse(cls, value: str | float | Allocation) -> Allocation:
        """Return what ``"always-spot"``, ``"spot-if-available"``, ``"on-demand"``, ``"cheapest"`` or a share means.

        Raises
        ------
        SpecError
            None of these.
        """
        problems = Problems()
        found = problems.check("allocation", value, check_allocation)
        problems.raise_if_any()
        assert isinstance(found, Allocation)
        return found

    def spot_nodes(self, nodes: int) -> int:
        """Return how many of `nodes` must be spot machines, at least."""
        if self.kind == "always-spot":
            return nodes
        return math.ceil(round(self.spot * nodes, 9))


Allocation.AlwaysSpot = Allocation("always-spot", 1.0)
Allocation.SpotIfAvailable = Allocation("spot-if-available")
Allocation.OnDemand = Allocation("on-demand")
Allocation.Cheapest = Allocation("cheapest")
_ALLOCATIONS = {
    a.kind: a for a in (Allocation.AlwaysSpot, Allocation.SpotIfAvailable, Allocation.OnDemand, Allocation.Cheapest)
}


def check_allocation(value: Any) -> Allocation:
    if isinstance(value, Allocation):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Allocation("percent", check_allocation_share(value))
    return _ALLOCATIONS[check_choice(tuple(_ALLOCATIONS), "a share of spot machines from 0 to 1")(value)]
