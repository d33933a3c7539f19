"""Choose machine types: which of those on offer have what is needed, the cheapest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from skyward.accelerators.catalog import memory_sizes
from skyward.accelerators.model import Accelerator
from skyward.errors import NoMatchingInstanceError, SpecError, invalid
from skyward.spec.instance import InstanceSpec

_SHOWN = 3  # nearest offers in an error's message


def select_instances(
    instances: Iterable[InstanceSpec],
    cpu: int = 1,
    memory_mb: int = 1024,
    accelerator: str | Accelerator | None = None,
    accelerator_count: int | Callable[[int], bool] = 1,
    prefer_spot: bool = False,
) -> list[InstanceSpec]:
    """Return the matching types by price; those with an unknown price come last.

    Parameters
    ----------
    cpu, memory_mb
        At least so many vCPUs, and so much memory in MB (10⁶ bytes); what providers list counts as GiB.
    accelerator
        Name or `Accelerator`; memory counts, so that ``"A100"`` is the one of 80 GB. None: with or without.
    accelerator_count
        Exactly so many, or a predicate of their number. The count of an `Accelerator` or of a text such as
        ``"A100:4"`` wins when it is not 1.
    prefer_spot
        Compare spot prices, and on-demand prices where there is no spot price.
    """
    return _matching(instances, wanted(cpu, memory_mb, accelerator, accelerator_count), prefer_spot)


def select_instance(
    instances: Iterable[InstanceSpec],
    cpu: int = 1,
    memory_mb: int = 1024,
    accelerator: str | Accelerator | None = None,
    accelerator_count: int | Callable[[int], bool] = 1,
    prefer_spot: bool = False,
) -> InstanceSpec:
    """Return the cheapest matching type; see `select_instances`.

    Raises
    ------
    NoMatchingInstanceError
        There is none; the message has the nearest ones.
    """
    offers = list(instances)
    need = wanted(cpu, memory_mb, accelerator, accelerator_count)
    found = _matching(offers, need, prefer_spot)
    if found:
        return found[0]
    raise NoMatchingInstanceError(f"no instance type has {need}. {nearest(offers, need, prefer_spot)}")


# --- what is needed -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a type has to have at least, and the one accelerator that it has to have."""

    cpu: int
    memory_mb: int
    accelerator: Accelerator | None
    count: int | None  # None: whatever `fits` says
    fits: Callable[[int], bool]

    def is_met(self, instance: InstanceSpec) -> bool:
        return self.shortfall(instance) == (0, False, 0)

    def shortfall(self, instance: InstanceSpec) -> tuple[int, bool, float]:
        """Return how far off a type is: by its accelerator, their number, and the missing share of the rest."""
        missing = max(0.0, 1 - instance.vcpu / self.cpu) + max(0.0, 1 - _memory_mb(instance) / self.memory_mb)
        if self.accelerator is None:
            return 0, False, missing
        return _distance(instance, self.accelerator), not self.fits(instance.accelerator_count), missing

    def __str__(self) -> str:
        text = f"{self.cpu} vCPUs, {self.memory_mb} MB of memory"
        if self.accelerator is None:
            return text
        count = "a number of" if self.count is None else f"{self.count} ×"
        return f"{text}, {count} {self.accelerator.name}"


def wanted(
    cpu: int,
    memory_mb: int,
    accelerator: str | Accelerator | None,
    accelerator_count: int | Callable[[int], bool] = 1,
) -> Wanted:
    """Return what is wanted; for the arguments see `select_instances`."""
    model = Accelerator.parse(accelerator) if accelerator is not None else None
    cpu, memory_mb = max(1, cpu), max(1, memory_mb)
    if callable(accelerator_count):
        return Wanted(cpu, memory_mb, model, None, accelerator_count)
    if isinstance(accelerator_count, bool) or not isinstance(accelerator_count, int) or accelerator_count < 1:
        accepted = "an integer >= 1, or a function of the number"
        raise invalid("accelerator_count", accelerator_count, accepted)
    exact = model.count if model is not None and model.count != 1 else accelerator_count
    return Wanted(cpu, memory_mb, model, exact, lambda n: n == exact)


def _memory_mb(instance: InstanceSpec) -> int:
    return math.ceil(instance.memory_gb * 1073.741824)  # rounded as `parse_memory` does


_SAME, _SAME_MODEL, _OTHER = range(3)


def _distance(instance: InstanceSpec, wanted: Accelerator) -> int:
    """Tell whether the instance's accelerator is the one meant, one of the model's other variants, or another."""
    if not instance.accelerator:
        return _OTHER
    try:
        there = Accelerator.parse(instance.accelerator)
    except SpecError:  # a name that only this provider knows
        return _SAME if instance.accelerator.lower() == wanted.name.lower() else _OTHER
    if there.model != wanted.model:
        return _OTHER
    if there.form_factor and wanted.form_factor and there.form_factor != wanted.form_factor:
        return _SAME_MODEL
    # Where a model comes in one size, what a provider lists can't tell variants apart: some list a node's memory.
    memory = instance.accelerator_memory_gb or there.memory
    # Providers round differently, e.g. 79.6 or 81 GB for a device sold as one of 80 GB.
    is_close = abs(memory - wanted.memory) <= 0.1 * wanted.memory
    return _SAME if is_close or len(memory_sizes(wanted.model)) == 1 else _SAME_MODEL


# --- prices and offers --------------------------------------------------------------------------------------


def _matching(instances: Iterable[InstanceSpec], need: Wanted, prefer_spot: bool) -> list[InstanceSpec]:
    found = [i for i in instances if need.is_met(i)]
    return sorted(found, key=lambda i: (_price(i, prefer_spot), i.vcpu, i.memory_gb, i.name))


def _price(instance: InstanceSpec, prefer_spot: bool) -> float:
    prices = [instance.price_spot, instance.price_on_demand] if prefer_spot else [instance.price_on_demand]
    return next((p for p in prices if p is not None), math.inf)


def nearest(offers: list[InstanceSpec], need: Wanted, prefer_spot: bool) -> str:
    """Return, in words, what comes nearest to `need` where nothing meets it."""
    if not offers:
        return "There are no types to choose from."
    ranked = sorted(offers, key=lambda i: (need.shortfall(i), _price(i, prefer_spot), i.name))
    if need.shortfall(ranked[0])[0] == _OTHER:
        names = sorted({i.accelerator for i in offers if i.accelerator})
        return f"There are these accelerators: {', '.join(names) or 'none'}."
    types: dict[str, InstanceSpec] = {}  # a type may be offered in several regions
    for i in ranked:
        if need.shortfall(i)[0] < _OTHER:
            types.setdefault(i.name, i)
    shown = [_shown(i, prefer_spot) for i in list(types.values())[:_SHOWN]]
    return f"Nearest: {'; '.join(shown)}."


def _shown(i: InstanceSpec, prefer_spot: bool) -> str:
    price = _price(i, prefer_spot)
    size = f" of {i.accelerator_memory_gb:g} GB" if i.accelerator_memory_gb else ""
    accelerator = f", {i.accelerator_count} × {i.accelerator}{size}" if i.accelerator else ""
    cost = "price not known" if price == math.inf else f"{price:g} USD/h"
    return f"{i.name} ({i.vcpu} vCPUs, {i.memory_gb:g} GB{accelerator}, {cost})"
