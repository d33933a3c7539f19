"""From what a pool needs and what providers offer to an ordered list of things to try, each with its price.

Asks providers for offers; launches nothing. Every step is for the whole pool: one type of machine in one region of one
provider, because the machines talk to each other. What is tried next when a step fails is the next step.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from skyward.environment.found import by_reason
from skyward.errors import AllProvidersFailedError, NoAvailableProviderError, ProviderError, SpecError
from skyward.launch.offers_table import offers_table, price_text
from skyward.launch.selection import Wanted, nearest, wanted
from skyward.providers import ask_all
from skyward.providers.base import Cloud, Need, Offer
from skyward.spec.pool import PoolSpec

if TYPE_CHECKING:
    from rich.table import Table

_LEAST_CPU, _LEAST_MEMORY_MB, _MEMORY_PER_SLOT_MB = 2, 3500, 1500
"""What a node has at least where the pool does not say. Chosen, not measured: Python, Dask and scikit-learn need so
much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """So many machines of an offer, as spot machines or not."""

    offer: Offer
    spot: bool
    count: int

    @property
    def price(self) -> float | None:
        """USD per hour of one machine; None: not known."""
        return self.offer.instance.price_spot if self.spot else self.offer.instance.price_on_demand


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is tried at once: all machines of the pool, those that are no spot machines first."""

    provider: Cloud
    parts: tuple[Part, ...]

    @property
    def offer(self) -> Offer:
        return self.parts[0].offer

    @property
    def hourly(self) -> float | None:
        """USD per hour of all machines; None: not known."""
        prices = [(part.price, part.count) for part in self.parts]
        return None if any(p is None for p, _ in prices) else math.fsum(p * n for p, n in prices if p is not None)

    @property
    def what(self) -> str:
        """How many machines of which kind, such as ``"1 on-demand + 3 spot"``."""
        return " + ".join(f"{part.count} {'spot' if part.spot else 'on-demand'}" for part in self.parts)

    def __str__(self) -> str:
        return f"{self.provider.name} {self.offer.region} {self.offer.instance.name} ({self.what})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What would be launched, in which order, and why other offers would not.

    Attributes
    ----------
    steps
        The first is what is launched; each other one is tried when all before it have failed.
    refused
        Offers that are not used, and why.
    failed
        Providers that could not be asked, by name.
    packages
        What is installed on each machine beside skyward, as requirements and names of wheels.
    not_reproduced
        What is not installed there as it is here, each with the reason: `Image.not_reproduced`.
    """

    steps: tuple[Step, ...]
    refused: tuple[tuple[Offer, str], ...] = ()
    failed: tuple[tuple[str, ProviderError], ...] = ()
    packages: tuple[str, ...] = ()
    not_reproduced: Mapping[str, str] = field(default_factory=dict)

    @property
    def hourly(self) -> float | None:
        """USD per hour of what is launched first; None: not known."""
        return self.steps[0].hourly if self.steps else None

    def table(self, *, most: int = 40) -> Table:
        """Return it as a table of at most so many offers, best first."""
        return offers_table(self._rows(), most=most)

    def _rows(self) -> list[tuple[Offer, str]]:
        seen: dict[tuple[str, str, str], tuple[Offer, str]] = {}
        for number, step in enumerate(self.steps):
            words = f"chosen: {_words(step)}" if number == 0 else f"{number + 1}. choice: {_words(step)}"
            seen.setdefault(_place(step.offer), (step.offer, words))
        return [*seen.values(), *self.refused]

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=200, color_system=None, force_terminal=False)
        with console.capture() as shown:
            console.print(self.table())
            for name, error in self.failed:
                console.print(f"{name} could not be asked: {error}", markup=False, highlight=False)
            if self.packages:
                console.print(f"packages: {', '.join(self.packages)}", markup=False, highlight=False)
            for why, names in by_reason(self.not_reproduced).items():
                console.print(f"not as here: {', '.join(names)}: {why}", markup=False, highlight=False)
        return "\n".join(line.rstrip() for line in shown.get().splitlines())

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"


def _words(step: Step) -> str:
    return step.what if step.hourly is None else f"{step.what}, {step.hourly:.4f} USD/h"


def _place(offer: Offer) -> tuple[str, str, str]:
    return offer.provider, offer.region, offer.instance.name


# --- making one ---------------------------------------------------------------------------------------------


def need_of(spec: PoolSpec) -> Need:
    """Return what each machine of a pool has to be; what the pool leaves open depends on its slots."""
    if spec.machine is not None:
        return Need(
            cpu=spec.cpu or 1, memory_mb=spec.memory or 1, accelerator=spec.accelerator,
            architecture=spec.architecture, machine=spec.machine,
        )  # fmt: skip
    return Need(
        cpu=spec.cpu or max(_LEAST_CPU, spec.slots_per_node),
        memory_mb=spec.memory or max(_LEAST_MEMORY_MB, _MEMORY_PER_SLOT_MB * spec.slots_per_node),
        accelerator=spec.accelerator,
        architecture=spec.architecture,
    )


def pool_plan(providers: Sequence[Cloud], spec: PoolSpec) -> Plan:
    """Return the plan of a pool, with what its machines install. Raises what `make_plan` and `environment` raise."""
    from skyward.cluster.machines import environment
    from skyward.cluster.requirements import described

    packages = described(environment(spec))
    return replace(make_plan(providers, spec), packages=packages, not_reproduced=spec.image.not_reproduced)


def make_plan(providers: Sequence[Cloud], spec: PoolSpec) -> Plan:
    """Ask all providers, side by side, for what they offer, and put it in order.

    Raises
    ------
    NoAvailableProviderError
        Nothing on offer is what is needed; the message has the nearest.
    ProviderError
        The only provider could not be asked.
    AllProvidersFailedError
        None of several providers could be asked.
    """
    need = need_of(spec)
    answers = ask_all(providers, lambda provider: provider.offers(need))
    failed = tuple((p.name, a) for p, a in zip(providers, answers, strict=True) if isinstance(a, ProviderError))
    if len(failed) == len(providers):
        raise _all_failed(failed)
    steps: list[Step] = []
    refused: list[tuple[Offer, str]] = []
    want = wanted(need.cpu, need.memory_mb, need.accelerator)
    for provider, answer in zip(providers, answers, strict=True):
        for offer in answer if not isinstance(answer, ProviderError) else ():
            found, why = _steps(provider, offer, need, want, spec)
            steps += found
            if not found:
                refused.append((offer, why))
    if not steps:
        raise _nothing(providers, refused, failed, need, want, spec)
    order = _order(providers, steps, spec)
    steps.sort(key=lambda step: (*order(step), _cost(step), step.offer.instance.vcpu, step.offer.instance.name))
    near = sorted(refused, key=lambda pair: (want.shortfall(pair[0].instance), _cheapest(pair[0]), _place(pair[0])))
    return Plan(steps=tuple(steps), refused=tuple(near), failed=failed)


def _steps(
    provider: Cloud, offer: Offer, need: Need, want: Wanted, spec: PoolSpec
) -> tuple[list[Step], str]:
    """Return the ways to have all of a pool's machines from one offer; when there is none, why."""
    why = _mismatch(offer, need, want)
    if why:
        return [], why
    steps, reasons = [], []
    for parts in _divisions(offer, spec):
        if why := next(filter(None, (_barred(part, spec) for part in parts)), ""):
            reasons.append(why)
        else:
            steps.append(Step(provider=provider, parts=parts))
    return steps, "; ".join(dict.fromkeys(reasons))


def _mismatch(offer: Offer, need: Need, want: Wanted) -> str:
    """Return why a type is not what is needed; empty when it is."""
    i = offer.instance
    if need.machine is not None and i.name != need.machine:
        return f"not {need.machine}"
    if need.architecture is not None and offer.architecture != need.architecture:
        return f"{offer.architecture}, not {need.architecture}"
    if want.is_met(i):
        return ""
    if need.accelerator is not None and want.shortfall(i)[:2] != (0, False):
        there = f"{i.accelerator_count} × {i.accelerator}" if i.accelerator else "no accelerator"
        return f"{there}, not {need.accelerator.count} × {need.accelerator.name}"
    return f"{i.vcpu} vCPUs, fewer than {need.cpu}" if i.vcpu < need.cpu else f"less than {need.memory_mb} MB"


def _divisions(offer: Offer, spec: PoolSpec) -> list[tuple[Part, ...]]:
    """Return the ways to divide a pool into spot machines and others that its allocation allows.

    The scheduler is on node 0 at first. When it moves, all that runs begins again: node 0 is no spot machine unless all
    have to be, or it is the only one.
    """
    nodes, kind = spec.nodes, spec.allocation.kind
    least = spec.allocation.spot_nodes(nodes)
    most = nodes if kind == "always-spot" or nodes == 1 else nodes - 1
    match kind:
        case "on-demand":
            counts = [0]
        case "spot-if-available" | "cheapest":
            counts = [most, 0]
        case _:
            counts = [least]
    return [_parts(offer, nodes - spot, spot) for spot in counts]


def _parts(offer: Offer, on_demand: int, spot: int) -> tuple[Part, ...]:
    both = (Part(offer=offer, spot=False, count=on_demand), Part(offer=offer, spot=True, count=spot))
    return tuple(part for part in both if part.count)


def _barred(part: Part, spec: PoolSpec) -> str:
    """Return why a part can't be had; empty when it can, as far as is known."""
    offer, kind = part.offer, "spot" if part.spot else "on-demand"
    if part.spot and part.price is None:
        return "no spot machines"
    if (offer.available_spot if part.spot else offer.available) is False:
        return f"no {kind} machines left at present"
    for option in ("max_price", "max_cost"):
        if part.price is None and getattr(spec, option) is not None:
            return f"{kind} price not known, and {option}={getattr(spec, option):g} is set"
    if spec.max_price is not None and part.price is not None and part.price > spec.max_price:
        return f"{kind} {part.price:g} USD/h, above max_price={spec.max_price:g}"
    return ""


def _order(providers: Sequence[Cloud], steps: Sequence[Step], spec: PoolSpec) -> Callable[[Step], tuple[Any, ...]]:
    """Return what steps are sorted by before their price: after one, others in its region, then other regions."""
    rank = {id(p): i for i, p in enumerate(_preferred(providers, spec))}
    regions: dict[tuple[int, str], float] = {}
    for step in steps:
        region = (id(step.provider), step.offer.region)
        regions[region] = min(_cost(step), regions.get(region, math.inf))

    def place(step: Step) -> tuple[Any, ...]:
        region = step.offer.region
        return rank[id(step.provider)], regions[id(step.provider), region], region

    match spec.selection:
        case "cheapest":
            return lambda _: ()
        case "available":
            return lambda step: (not _is_known_available(step), *place(step))
        case _:
            return place


def _preferred(providers: Sequence[Cloud], spec: PoolSpec) -> list[Cloud]:
    if not callable(spec.selection):
        return list(providers)
    chosen = spec.selection(tuple(providers), spec)
    if all(chosen is not p for p in providers):
        accepted = "a function that returns one of the providers that it is given"
        raise SpecError(
            f"selection={spec.selection!r} returned {chosen!r}: expected {accepted}",
            option="selection", value=spec.selection, accepted=accepted,
        )  # fmt: skip
    return [chosen, *(p for p in providers if p is not chosen)]


def _is_known_available(step: Step) -> bool:
    return all((p.offer.available_spot if p.spot else p.offer.available) is True for p in step.parts)


def _cost(step: Step) -> float:
    return math.inf if step.hourly is None else step.hourly


def _cheapest(offer: Offer) -> float:
    prices = [p for p in (offer.instance.price_on_demand, offer.instance.price_spot) if p is not None]
    return min(prices, default=math.inf)


# --- nothing to be had --------------------------------------------------------------------------------------


def _all_failed(failed: Sequence[tuple[str, ProviderError]]) -> Exception:
    if len(failed) == 1:
        return failed[0][1]
    lines = "\n  ".join(f"{name}: {error}" for name, error in failed)
    return AllProvidersFailedError(f"no provider could be asked:\n  {lines}", reasons=dict(failed))


def _nothing(
    providers: Sequence[Cloud],
    refused: Sequence[tuple[Offer, str]],
    failed: Sequence[tuple[str, ProviderError]],
    need: Need,
    want: Wanted,
    spec: PoolSpec,
) -> NoAvailableProviderError:
    names = " or ".join(p.name for p in providers)
    offers = [offer for offer, _ in refused]
    fit = [(offer, why) for offer, why in refused if not _mismatch(offer, need, want)]
    if fit:
        offer, why = min(fit, key=lambda pair: _cheapest(pair[0]))
        i = offer.instance
        text = (
            f"{names}: there are matching machines, but none is available. The cheapest is {offer.provider} {i.name} "
            f"in {offer.region}, {price_text(i.price_on_demand)} USD/h on demand, {price_text(i.price_spot)} as a spot "
            f"machine: {why}"
        )
    elif need.machine is not None and all(o.instance.name != need.machine for o in offers):
        near = difflib.get_close_matches(need.machine, {o.instance.name for o in offers}, 3, 0.4)
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        text = f"{names}: there is no type machine={need.machine!r}{hint}"
    else:
        near_by = nearest([o.instance for o in offers], want, False)
        text = f"{names}: no machine has {_requirements(want, need, spec)}. {near_by}"
    text += "".join(f"\n  {name} could not be asked: {error}" for name, error in failed)
    return NoAvailableProviderError(text)


def _requirements(want: Wanted, need: Need, spec: PoolSpec) -> str:
    parts = [str(want)]
    if need.machine:
        parts.append(f"type {need.machine}")
    if spec.architecture:
        parts.append(spec.architecture)
    return ", ".join(parts)


# --- choosing a provider ------------------------------------------------------------------------------------


def select_first(providers: tuple[Cloud, ...], spec: PoolSpec) -> Cloud:  # noqa: ARG001 - as all such functions
    """Return the first provider; for ``selection=``."""
    return providers[0]


def select_cheapest(providers: tuple[Cloud, ...], spec: PoolSpec) -> Cloud:
    """Return the provider that has what the pool needs at the lowest price; for ``selection=``. Asks all of them."""
    return _best(providers, spec, "cheapest")


def select_available(providers: tuple[Cloud, ...], spec: PoolSpec) -> Cloud:
    """Return the first provider that is known to have what the pool needs in stock; for ``selection=``."""
    return _best(providers, spec, "available")


def _best(providers: tuple[Cloud, ...], spec: PoolSpec, selection: str) -> Cloud:
    return make_plan(providers, replace(spec, selection=selection)).steps[0].provider
