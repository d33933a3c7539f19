"""Choose machine types: which of those on offer have what is needed, the cheapest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from skyward.accelerators import Accelerator
from skyward.errors import NoMatchingInstanceError, SpecError
from skyward.spec import InstanceSpec

_SHOWN = 3  # nearest offers in an error's message


def select_instances(
    instances: Iterable[InstanceSpec],
    cpu: int = 1,
    memory_mb: int = 1024,
    accelerator: str | Accelerator | None = None,
    accelerator_count: int | Callable[[int], bool] = 1,
    prefer_spot: bool = False,
) -> list[InstanceSpec]:
    """Return the types that have what is needed, by price; those whose price is not known come last.

    Parameters
    ----------
    cpu, memory_mb
        At least so many vCPUs, and so much memory in MB.
    accelerator
        Name or `Accelerator`; memory counts, so that ``"A100"`` is the one of 80 GB. None: with or without.
    accelerator_count
        Exactly so many, or a predicate of their number. The count of an `Accelerator` or of a text such as
        ``"A100:4"`` wins when it is not 1.
    prefer_spot
        Compare spot prices, and on-demand prices where there is no spot price.
    """
    wanted = Accelerator.parse(accelerator) if accelerator is not None else None
    fits = _count_predicate(wanted, accelerator_count)
    found = [
        i
        for i in instances
        if i.vcpu >= cpu
        and i.memory_gb * 1000 >= memory_mb
        and (wanted is None or (_is_same(i, wanted) and fits(i.accelerator_count)))
    ]
    return sorted(found, key=lambda i: (_price(i, prefer_spot), i.vcpu, i.memory_gb, i.name))


def select_instance(
    instances: Iterable[InstanceSpec],
    cpu: int = 1,
    memory_mb: int = 1024,
    accelerator: str | Accelerator | None = None,
    accelerator_count: int | Callable[[int], bool] = 1,
    prefer_spot: bool = False,
) -> InstanceSpec:
    """Return the cheapest type that has what is needed; see `select_instances`.

    Raises
    ------
    NoMatchingInstanceError
        There is none; the message has the nearest ones.
    """
    offers = list(instances)
    found = select_instances(offers, cpu, memory_mb, accelerator, accelerator_count, prefer_spot)
    if found:
        return found[0]
    need = f"{cpu} vCPUs, {memory_mb} MB of memory"
    if accelerator is not None:
        count = "as many as the predicate wants" if callable(accelerator_count) else accelerator_count
        need += f", accelerator {accelerator} ({count})"
    raise NoMatchingInstanceError(f"no instance type has {need}. {_nearest(offers, accelerator, prefer_spot)}")


def _count_predicate(
    wanted: Accelerator | None, accelerator_count: int | Callable[[int], bool]
) -> Callable[[int], bool]:
    if callable(accelerator_count):
        return accelerator_count
    if isinstance(accelerator_count, bool) or not isinstance(accelerator_count, int) or accelerator_count < 1:
        accepted = "a whole number from 1, or a function of the number"
        raise SpecError(
            f"accelerator_count={accelerator_count!r}: accepted is {accepted}",
            option="accelerator_count",
            value=accelerator_count,
            accepted=accepted,
        )
    exact = wanted.count if wanted is not None and wanted.count != 1 else accelerator_count
    return lambda n: n == exact


def _is_same(instance: InstanceSpec, wanted: Accelerator) -> bool:
    """Tell whether the instance's accelerator is the one meant: the same model and, where it is said, memory."""
    if not instance.accelerator:
        return False
    try:
        there = Accelerator.parse(instance.accelerator)
    except SpecError:  # a name that only this provider knows
        return instance.accelerator.lower() == wanted.name.lower()
    if there.model != wanted.model:
        return False
    # Providers round differently, e.g. 79.6 or 81 GB for a device sold as one of 80 GB.
    memory = instance.accelerator_memory_gb or there.memory
    return abs(memory - wanted.memory) <= 0.1 * wanted.memory


def _price(instance: InstanceSpec, prefer_spot: bool) -> float:
    prices = [instance.price_spot, instance.price_on_demand] if prefer_spot else [instance.price_on_demand]
    return next((p for p in prices if p is not None), math.inf)


def _nearest(offers: list[InstanceSpec], accelerator: str | Accelerator | None, prefer_spot: bool) -> str:
    if not offers:
        return "There are no types to choose from."
    if accelerator is not None:
        wanted = Accelerator.parse(accelerator)
        near = [i for i in offers if i.accelerator and _is_same(i, wanted)]
        if not near:
            names = sorted({i.accelerator for i in offers if i.accelerator})
            return f"There are these accelerators: {', '.join(names) or 'none'}."
    else:
        near = sorted(offers, key=lambda i: (-i.vcpu, -i.memory_gb))
    shown = [_shown(i, prefer_spot) for i in near[:_SHOWN]]
    return f"Nearest: {'; '.join(shown)}."


def _shown(i: InstanceSpec, prefer_spot: bool) -> str:
    price = _price(i, prefer_spot)
    accelerator = f", {i.accelerator_count} × {i.accelerator}" if i.accelerator else ""
    cost = "price not known" if price == math.inf else f"{price:g} USD/h"
    return f"{i.name} ({i.vcpu} vCPUs, {i.memory_gb:g} GB{accelerator}, {cost})"
