"""Choosing machine types, on real ones."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import skyward as sky
from skyward.spec.validation import parse_memory

ROWS = list(csv.DictReader((Path(__file__).parents[1] / "data" / "prices.csv").read_text().splitlines()))


def _number(text: str) -> float | None:
    return float(text) if text else None


OFFERS = [
    sky.InstanceSpec(
        name=f"{r['provider']}:{r['instance_type']}:{r['region']}",
        vcpu=int(float(r["vcpus"] or 0)),
        memory_gb=float(r["memory_gb"] or 0),
        accelerator=r["accelerator"] or None,
        accelerator_count=int(float(r["accelerator_count"] or 0)),
        accelerator_memory_gb=float(r["accelerator_memory_gb"] or 0),
        price_on_demand=_number(r["price_on_demand"]),
        price_spot=_number(r["price_spot"]),
    )
    for r in ROWS
]


def test_the_cheapest_that_fits_is_chosen() -> None:
    chosen = sky.select_instance(OFFERS, cpu=8, memory_mb=parse_memory("32GiB"))

    cheaper = [i for i in OFFERS if (i.price_on_demand or math.inf) < (chosen.price_on_demand or math.inf)]
    assert chosen.vcpu >= 8
    assert chosen.memory_gb >= 32
    assert all(i.vcpu < 8 or i.memory_gb < 32 for i in cheaper)


def test_a_machine_listed_with_32_gb_has_what_is_called_32_gb_or_32_gib() -> None:
    machine = sky.InstanceSpec("m", 4, 32)

    assert sky.select_instance([machine], memory_mb=parse_memory("32GB")) is machine
    assert sky.select_instance([machine], memory_mb=parse_memory("32GiB")) is machine
    assert sky.select_instances([machine], memory_mb=parse_memory("33GiB")) == []


def test_the_smallest_machines_are_found_by_default() -> None:
    small = sky.InstanceSpec("s-1vcpu-1gb", 1, 1, price_on_demand=0.009)

    assert sky.select_instance([small]) is small


def test_a100_is_the_one_of_80_gb_and_the_other_is_exact() -> None:
    large = sky.select_instances(OFFERS, accelerator="A100", accelerator_count=8)
    small = sky.select_instances(OFFERS, accelerator="A100-40GB", accelerator_count=8)

    assert {round(i.accelerator_memory_gb / 80) for i in large} == {1}
    assert {i.accelerator_memory_gb for i in small} <= {40.0}
    assert not {i.name for i in large} & {i.name for i in small}


@pytest.mark.parametrize("accelerator", sorted({i.accelerator for i in OFFERS if i.accelerator}))
def test_every_accelerator_on_offer_is_found_by_its_name(accelerator: str) -> None:
    named = {i.name for i in OFFERS if i.accelerator == accelerator}
    memory = {i.accelerator_memory_gb for i in OFFERS if i.accelerator == accelerator}
    wanted = "A100-40GB" if (accelerator, memory) == ("A100", {40.0}) else accelerator

    found = {i.name for i in sky.select_instances(OFFERS, accelerator=wanted, accelerator_count=lambda n: n > 0)}

    assert found == named


def test_an_accelerator_only_its_provider_knows_is_found_by_exact_name() -> None:
    offers = [sky.InstanceSpec("x", 4, 16, "Gizmo-9", 1), sky.InstanceSpec("y", 4, 16, "H100-PCIe", 1, 80)]

    assert [i.name for i in sky.select_instances(offers, accelerator="H100")] == ["y"]
    assert sky.select_instances(offers, accelerator="H100-SXM") == []
    assert sky.select_instances(offers, accelerator="A100") == []


@pytest.mark.parametrize("count", [0, True, 1.5, "2"])
def test_a_number_of_accelerators_that_can_not_be_is_refused(count: Any) -> None:
    with pytest.raises(sky.SpecError, match=r"accelerator_count=.*an integer >= 1, or a function"):
        sky.select_instances(OFFERS, accelerator="T4", accelerator_count=count)


def test_the_number_of_accelerators_is_exact_or_a_predicate() -> None:
    one = sky.select_instances(OFFERS, accelerator="T4")
    several = sky.select_instances(OFFERS, accelerator="T4", accelerator_count=lambda n: n >= 4)
    written = sky.select_instances(OFFERS, accelerator="T4:4")

    assert {i.accelerator_count for i in one} == {1}
    assert min(i.accelerator_count for i in several) >= 4
    assert {i.accelerator_count for i in written} == {4}


def test_preferred_spot_prices_are_compared_and_unknown_ones_come_last() -> None:
    a = sky.InstanceSpec("a", 4, 16, price_on_demand=1.0, price_spot=0.9)
    b = sky.InstanceSpec("b", 4, 16, price_on_demand=2.0, price_spot=0.1)
    unknown = sky.InstanceSpec("c", 4, 16)

    assert [i.name for i in sky.select_instances([unknown, b, a])] == ["a", "b", "c"]
    assert [i.name for i in sky.select_instances([unknown, a, b], prefer_spot=True)] == ["b", "a", "c"]


def test_no_match_names_the_nearest_offers() -> None:
    with pytest.raises(sky.NoMatchingInstanceError, match=r"no instance type has 100000 vCPUs.*Nearest: ") as info:
        sky.select_instance(OFFERS, cpu=100_000)
    with pytest.raises(sky.NoMatchingInstanceError, match=r"There are these accelerators: .*A100"):
        sky.select_instance(OFFERS, accelerator="RTX-5090")
    with pytest.raises(sky.NoMatchingInstanceError, match="no types to choose from"):
        sky.select_instance([])

    assert isinstance(info.value, ValueError)


def test_what_is_nearest_lacks_least_and_is_said_once() -> None:
    large = sky.InstanceSpec("large", 8, 64, price_on_demand=2.0)
    offers = [sky.InstanceSpec("tiny", 1, 1, price_on_demand=0.1), large, large, sky.InstanceSpec("mid", 4, 32)]

    with pytest.raises(sky.NoMatchingInstanceError) as info:
        sky.select_instance(offers, cpu=8, memory_mb=128_000)

    assert str(info.value) == (
        "no instance type has 8 vCPUs, 128000 MB of memory. Nearest: large (8 vCPUs, 64 GB, 2 USD/h); "
        "mid (4 vCPUs, 32 GB, price not known); tiny (1 vCPUs, 1 GB, 0.1 USD/h)."
    )


def test_of_an_accelerator_the_other_numbers_and_sizes_are_nearest() -> None:
    offers = [
        sky.InstanceSpec("cpu", 8, 64),
        sky.InstanceSpec("small", 96, 1152, "A100", 8, 40, 32.77),
        sky.InstanceSpec("one", 22, 120, "A100-80GB", 1, 80, 1.29),
    ]

    with pytest.raises(sky.NoMatchingInstanceError, match=r"3 × A100\. Nearest: one .*; small .*8 × A100 of 40 GB"):
        sky.select_instance(offers, accelerator="A100:3")
    with pytest.raises(sky.NoMatchingInstanceError, match="a number of A100"):
        sky.select_instance(offers, accelerator="A100", accelerator_count=lambda n: n > 8)


@given(cpu=st.integers(1, 200), memory=st.integers(1, 2_000_000), spot=st.booleans())
def test_everything_found_fits_and_is_sorted(cpu: int, memory: int, spot: bool) -> None:
    found = sky.select_instances(OFFERS, cpu, memory, prefer_spot=spot)

    prices = [(i.price_spot if spot and i.price_spot is not None else i.price_on_demand) for i in found]
    known = [p for p in prices if p is not None]
    assert all(i.vcpu >= cpu and i.memory_gb * 1024**3 > (memory - 1) * 10**6 for i in found)
    assert known == sorted(known)
    assert None not in prices[: len(known)]
