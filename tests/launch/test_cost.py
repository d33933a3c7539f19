"""What machines cost, as their providers bill it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyward.events import CostFinal, CostUpdate
from skyward.launch.cost import Meter, final, update
from skyward.providers.base import Login, Machine
from skyward.providers.billing import BILLING, Billing

START = 1_790_000_000.0
HOUR = 3600.0


def machine(name: str = "i-1", **facts: Any) -> Machine:
    made = Machine(id=name, provider="aws", login=Login(host="h"), price=3.6, price_on_demand=3.6, launched=START)
    return replace(made, **facts)


def metered(*machines: Machine) -> Meter:
    meter = Meter()
    for one in machines:
        meter.add(one)
    return meter


prices = st.floats(0, 500)
seconds = st.floats(0, 1e7)
billings = st.builds(
    Billing,
    increment_s=st.sampled_from([1.0, 60.0, 600.0, HOUR]),
    minimum_s=st.sampled_from([0.0, 60.0, 600.0, HOUR]),
    minimum_usd=st.sampled_from([0.0, 0.01]),
)


# --- rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "ran_s", "expected"),
    [
        ("aws", 10, 0.06),  # 60 s at least
        ("aws", 60.2, 0.061),
        ("aws", 7200, 7.2),
        ("digitalocean", 10, 0.06),
        ("digitalocean", 3600, 3.6),
        ("verda", 10, 0.01),
        ("verda", 601, 0.601),
        ("elsewhere", 0.5, 0.001),
    ],
)
def test_each_provider_bills_in_its_own_way(provider: str, ran_s: float, expected: float) -> None:
    meter = metered(machine(provider=provider))

    assert meter.cost(START + ran_s) == pytest.approx(expected)


def test_a_cheap_droplet_costs_a_cent_at_least() -> None:
    meter = metered(machine(provider="digitalocean", price=0.00595))

    assert meter.cost(START + 120) == 0.01
    assert meter.cost(START + 10 * HOUR) == pytest.approx(0.0595)


@pytest.mark.parametrize(
    ("spot", "reclaimed", "ran_s", "expected"),
    [
        (True, True, HOUR - 1, 0.0),
        (True, True, 2 * HOUR, 7.2),
        (True, False, HOUR / 2, 1.8),
        (False, True, HOUR / 2, 1.8),
    ],
)
def test_a_spot_machine_that_aws_takes_back_in_its_first_hour_is_free(
    spot: bool, reclaimed: bool, ran_s: float, expected: float
) -> None:
    meter = metered(machine(spot=spot))

    meter.end("i-1", START + ran_s, reclaimed=reclaimed)

    assert meter.cost(START + 9 * HOUR) == pytest.approx(expected)


def test_the_clock_of_the_epoch_does_not_round_a_full_increment_up() -> None:
    for begun in range(1000):
        start = START + begun / 7
        meter = Meter()
        meter.add(machine(launched=start), Billing(increment_s=600))
        assert meter.cost(start + 600) == pytest.approx(0.6)


@given(billings, seconds, prices)
def test_rounding_adds_less_than_one_increment_and_never_subtracts(
    billing: Billing, ran_s: float, price: float
) -> None:
    cost = billing.cost(ran_s, price)

    exact = ran_s * price / HOUR
    assert cost >= exact - 2e-6 * price / HOUR
    least = max(billing.minimum_s * price / HOUR, billing.minimum_usd)
    assert cost <= max(least, exact + billing.increment_s * price / HOUR) + 1e-9


@given(billings, prices, st.lists(seconds, min_size=2, max_size=5))
def test_cost_never_falls_while_time_goes_by(billing: Billing, price: float, times: list[float]) -> None:
    meter = Meter()
    meter.add(machine(price=price), billing)

    costs = [meter.cost(START + t) for t in sorted(times)]

    assert costs == sorted(costs)


# --- the meter ----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(prices, seconds, st.none() | seconds, billings), max_size=5), seconds)
def test_the_whole_is_the_sum_of_its_machines(stays: list[Any], asked_s: float) -> None:
    whole, parts = Meter(), []
    for number, (price, launched_s, ran_s, billing) in enumerate(stays):
        one = machine(f"i-{number}", price=price, launched=START + launched_s)
        part = Meter()
        for meter in (whole, part):
            meter.add(one, billing)
            if ran_s is not None:
                meter.end(one.id, START + launched_s + ran_s)
        parts.append(part)

    now = START + asked_s
    assert whole.cost(now) == pytest.approx(sum(part.cost(now) for part in parts))
    assert whole.hourly_rate() == pytest.approx(sum(part.hourly_rate() for part in parts))


def test_a_machine_costs_until_its_first_end_and_nothing_before_its_launch() -> None:
    meter = metered(machine())

    meter.end("i-1", START + 100)
    meter.end("i-1", START + 5000, reclaimed=True)
    meter.end("i-unheard-of", START)

    assert meter.cost(START - 10) == 0
    assert meter.cost(START + 50) == pytest.approx(0.06)
    assert meter.cost(START + 9 * HOUR) == pytest.approx(0.1)
    assert meter.hourly_rate() == 0


def test_a_machine_that_is_added_again_is_counted_once() -> None:
    meter = metered(machine(), machine(), machine(price=100.0))

    assert meter.cost(START + HOUR) == pytest.approx(3.6)
    assert meter.counts() == (0, 1)


def test_what_is_not_known_counts_as_nothing_and_is_named() -> None:
    meter = metered(
        machine("i-1"), machine("i-2", price=None), machine("i-3", launched=None), machine("i-4", price=0.0)
    )

    assert meter.cost(START + HOUR) == pytest.approx(3.6)
    assert meter.unknown == ("i-2", "i-3")
    assert meter.counts() == (0, 4)


def test_savings_are_what_spot_machines_would_have_cost_as_others() -> None:
    meter = metered(
        machine("spot", spot=True, price=1.0, price_on_demand=4.0),
        machine("other", price=4.0, price_on_demand=4.0),
        machine("unheard", spot=True, price=1.0, price_on_demand=None),
        machine("reclaimed", spot=True, price=1.0, price_on_demand=4.0),
    )
    meter.end("reclaimed", START + HOUR / 2, reclaimed=True)

    assert meter.savings(START + HOUR) == pytest.approx(3.0 + 2.0)


# --- events -------------------------------------------------------------------------------------------------


def test_updates_tell_of_what_runs_and_the_last_event_of_all_that_has_run() -> None:
    meter = metered(
        machine("a", price=1.0, price_on_demand=4.0, spot=True),
        machine("b", price=4.0, launched=START + HOUR),
    )
    meter.end("a", START + HOUR)
    now = update(meter, START + 2 * HOUR)
    meter.end("b", START + 3 * HOUR)
    last = final(meter, START + 3 * HOUR + 20)

    assert now == CostUpdate(
        elapsed_seconds=2 * HOUR, accumulated_cost=5.0, hourly_rate=4.0, spot_count=0, ondemand_count=1
    )
    assert last == CostFinal(
        total_cost=9.0,
        total_seconds=3 * HOUR,
        hourly_rate=3.0,
        spot_count=1,
        ondemand_count=1,
        savings_vs_ondemand=3.0,
    )


def test_a_pool_without_machines_costs_nothing() -> None:
    meter = Meter()

    assert update(meter, START) == CostUpdate(
        elapsed_seconds=0.0, accumulated_cost=0.0, hourly_rate=0.0, spot_count=0, ondemand_count=0
    )
    assert final(meter, START).total_cost == 0
    assert set(BILLING) == {"aws", "digitalocean", "verda"}
