"""What is launched, in which order, and why not something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

import skyward as sky
from skyward.launch.plan import Plan, make_plan
from skyward.providers import prices
from skyward.providers.base import Need, Offer
from skyward.spec.instance import InstanceSpec
from skyward.spec.pool import PoolSpec


@dataclass(frozen=True)
class Tabled:
    """A cloud that offers what the table of prices has of it, or a few things, and launches nothing."""

    name: str
    only: tuple[Offer, ...] | None = None
    error: sky.ProviderError | None = None
    lacks: frozenset[tuple[str, str, bool]] = field(default_factory=frozenset)  # (type, region, spot)

    def settings(self) -> Mapping[str, Any]:
        return {}

    def check(self, spec: PoolSpec) -> None:
        pass

    def offers(self, need: Need) -> Sequence[Offer]:
        if self.error is not None:
            raise self.error
        if self.only is not None:
            return self.only
        return [self._offer(row) for row in prices.table(self.name)]

    def _offer(self, row: prices.TableRow) -> Offer:
        place = (row.instance_type, row.region)
        return Offer(
            provider=self.name, instance=row.instance(), region=row.region, architecture=row.architecture,
            available=False if (*place, False) in self.lacks else None,
            available_spot=False if (*place, True) in self.lacks else None,
        )  # fmt: skip

    def launch(self, *_: Any) -> Any:
        raise NotImplementedError

    machines = terminate = open_firewall = end = launch


AWS, DO, VERDA = Tabled("aws"), Tabled("digitalocean"), Tabled("verda")


def plan(*clouds: Tabled, **options: Any) -> Plan:
    return make_plan(clouds, PoolSpec(**options))


def offer(
    name: str, price: float | None, spot: float | None = None, region: str = "here", provider: str = "one", **facts: Any
) -> Offer:
    instance = InstanceSpec(name, 4, 16, price_on_demand=price, price_spot=spot)
    return Offer(provider=provider, instance=instance, region=region, **facts)


def parts(plan: Plan, step: int = 0) -> list[tuple[str, bool, int]]:
    return [(p.offer.instance.name, p.spot, p.count) for p in plan.steps[step].parts]


@pytest.mark.parametrize(
    ("allocation", "nodes", "spot", "on_demand"),
    [
        (0.8, 10, 8, 2),
        (0.75, 10, 8, 2),
        (1.0, 3, 3, 0),
        ("on-demand", 3, 0, 3),
        ("always-spot", 3, 3, 0),
        ("spot-if-available", 4, 3, 1),
        ("cheapest", 4, 3, 1),
        ("spot-if-available", 1, 1, 0),
    ],
)
def test_an_allocation_divides_the_nodes(allocation: Any, nodes: int, spot: int, on_demand: int) -> None:
    first = plan(VERDA, machine="CPU.8V.32G", nodes=nodes, allocation=allocation).steps[0]

    counts = {p.spot: p.count for p in first.parts}
    assert (counts.get(True, 0), counts.get(False, 0)) == (spot, on_demand)
    assert [p.spot for p in first.parts] == sorted(p.spot for p in first.parts)  # the scheduler's node comes first


def test_the_cheapest_of_two_clouds_is_the_cheapest_of_both_tables() -> None:
    found = plan(AWS, VERDA, selection="cheapest", accelerator="A100", allocation="on-demand")

    rows = [*prices.table("aws"), *prices.table("verda")]
    fitting = [r for r in rows if r.accelerator == "A100-80GB" and r.accelerator_count == 1 and r.price_on_demand]
    cheapest = min(r.price_on_demand for r in fitting if r.price_on_demand is not None)
    assert found.hourly == cheapest
    assert found.steps[0].offer.instance.name == "1A100.22V"


@pytest.mark.parametrize(("count", "cloud", "name"), [(8, AWS, "p4de.24xlarge"), (4, VERDA, "4A100.88V")])
def test_an_accelerator_is_taken_at_its_word(count: int, cloud: Tabled, name: str) -> None:
    found = plan(cloud, accelerator=f"A100:{count}", allocation="on-demand")

    assert {s.offer.instance.name for s in found.steps} == {name}
    assert any("A100" in why for _, why in found.refused)


def test_providers_come_in_the_order_given_unless_the_price_decides() -> None:
    dear = Tabled("one", only=(offer("big", 2.0),))
    cheap = Tabled("two", only=(offer("small", 1.0, provider="two"),))

    assert [s.provider.name for s in plan(dear, cheap).steps] == ["one", "two"]
    assert [s.provider.name for s in plan(dear, cheap, selection="cheapest").steps] == ["two", "one"]


def test_a_failure_is_followed_by_the_next_offer_region_then_provider() -> None:
    one = Tabled("one", only=(offer("a", 1.0), offer("b", 2.0), offer("a", 1.5, region="there")))
    two = Tabled("two", only=(offer("c", 0.1, provider="two"),))

    found = plan(one, two, allocation="on-demand")

    assert [(s.offer.region, s.offer.instance.name) for s in found.steps] == [
        ("here", "a"), ("here", "b"), ("there", "a"), ("here", "c")
    ]  # fmt: skip


def test_what_is_known_to_be_in_stock_comes_first_when_asked_for() -> None:
    one = Tabled("one", only=(offer("a", 1.0),))
    two = Tabled("two", only=(offer("b", 2.0, provider="two", available=True),))

    found = plan(one, two, selection="available", allocation="on-demand")

    assert [s.offer.instance.name for s in found.steps] == ["b", "a"]


def test_what_is_sold_out_is_not_tried() -> None:
    cloud = Tabled("verda", lacks=frozenset({("1A100.22V", "FIN-01", False), ("1A100.22V", "FIN-03", True)}))

    found = plan(cloud, accelerator="A100", nodes=1, allocation="spot-if-available")

    assert [(s.offer.region, s.parts[0].spot) for s in found.steps] == [("FIN-01", True), ("FIN-03", False)]


def test_a_function_chooses_the_provider() -> None:
    def last(providers: tuple[Any, ...], spec: Any) -> Any:
        return providers[-1]

    assert plan(AWS, VERDA, selection=last, cpu=4).steps[0].provider is VERDA
    assert plan(AWS, VERDA, selection=sky.select_first, cpu=4).steps[0].provider is AWS
    cheapest = plan(AWS, VERDA, selection=sky.select_cheapest, accelerator="A100")
    assert cheapest.steps[0].provider is VERDA
    with pytest.raises(sky.SpecError, match="one of the providers"):
        plan(AWS, VERDA, selection=lambda providers, spec: "aws")


def test_no_price_is_above_max_price() -> None:
    found = plan(AWS, VERDA, DO, accelerator=None, cpu=8, nodes=4, allocation=0.5, max_price=0.2)

    assert found.steps
    assert all(p.price is not None and p.price <= 0.2 for s in found.steps for p in s.parts)


def test_a_price_that_is_not_known_is_above_max_price() -> None:
    cloud = Tabled("one", only=(offer("a", None),))

    assert plan(cloud).hourly is None
    with pytest.raises(sky.NoAvailableProviderError, match="price not known"):
        plan(cloud, max_price=1.0)


def test_a_max_price_below_all_offers_names_the_cheapest() -> None:
    with pytest.raises(sky.NoAvailableProviderError, match=r"1A100.22V.*1\.29.*above max_price=0\.1"):
        plan(AWS, VERDA, accelerator="A100", allocation="on-demand", max_price=0.1)


def test_an_unknown_type_names_the_nearest() -> None:
    with pytest.raises(sky.NoAvailableProviderError, match=r"no type machine='m6i.2xlargee'.*m6i\.2xlarge"):
        plan(AWS, machine="m6i.2xlargee")


def test_an_accelerator_that_a_provider_lacks_names_what_it_has() -> None:
    with pytest.raises(sky.NoAvailableProviderError, match=r"digitalocean: .*H100"):
        plan(DO, accelerator="A100")


def test_spot_where_there_is_none_is_refused() -> None:
    with pytest.raises(sky.NoAvailableProviderError, match="no spot machines"):
        plan(DO, cpu=4, allocation="always-spot")


def test_an_architecture_is_kept_to() -> None:
    found = plan(AWS, architecture="arm64")

    assert {s.offer.architecture for s in found.steps} == {"arm64"}


def test_a_provider_that_can_not_be_asked_does_not_stop_the_others() -> None:
    broken = Tabled("aws", error=sky.CredentialsError("no credentials"))

    found = plan(broken, VERDA, cpu=4)

    assert found.steps[0].provider is VERDA
    assert [name for name, _ in found.failed] == ["aws"]
    assert "aws could not be asked: no credentials" in str(found)


def test_when_no_provider_can_be_asked_all_reasons_are_told() -> None:
    one = Tabled("aws", error=sky.CredentialsError("no credentials"))
    two = Tabled("verda", error=sky.ProviderError("down"))

    with pytest.raises(sky.CredentialsError):
        plan(one)
    with pytest.raises(sky.AllProvidersFailedError, match=r"(?s)aws: no credentials.*verda: down") as info:
        plan(one, two)
    assert set(info.value.reasons) == {"aws", "verda"}


def test_slots_need_cores_and_memory_where_nothing_else_is_said() -> None:
    chosen = plan(AWS, VERDA, concurrency=8, selection="cheapest", allocation="on-demand").steps[0].offer.instance

    assert chosen.vcpu >= 8
    assert chosen.memory_gb >= 12


def test_the_plan_of_a_pool_shows_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    image = sky.Image(pip=["no-such-package==1.0"], not_reproduced={"pywin32": "it works on Windows alone"})
    monkeypatch.setattr("skyward.launch.plan.make_plan", lambda *_: plan(VERDA, cpu=4))

    shown = sky.ComputePool(sky.Verda(), image=image).plan()

    assert "no-such-package==1.0" in shown.packages
    assert "packages: " in str(shown)
    assert "not as here: pywin32: it works on Windows alone" in str(shown)


@pytest.mark.parametrize("provider", [sky.Verda(), sky.SSH(["nobody@host.invalid"])], ids=["cloud", "hosts"])
def test_an_image_that_can_not_work_raises_before_a_machine_is_used(
    provider: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: Any) -> None:
        raise AssertionError("asked for machines")

    monkeypatch.setattr("skyward.launch.plan.make_plan", launch)
    monkeypatch.setattr(sky.SSH, "machines", launch)
    pool = sky.ComputePool(provider, image=sky.Image(pip=["dask==2020.1"]), display="quiet")

    with pytest.raises(sky.SpecError, match="both sides need the same"):
        pool.start()


def test_a_plan_shows_prices_and_reasons() -> None:
    text = str(plan(VERDA, accelerator="A100", nodes=2, allocation="on-demand"))

    assert "chosen: 2 on-demand, 2.5800 USD/h" in text
    assert "4 × A100-80GB, not 1 × A100" in text
    assert "<pre>" in plan(VERDA, cpu=4)._repr_html_()
