"""``skyward offers``: which machines clouds have, at which price."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from skyward.cli.output import as_json, print_table, statuses, tell_failed
from skyward.errors import SpecError
from skyward.providers import clouds, resolve

if TYPE_CHECKING:
    from skyward.providers.base import Offer


def _complete_provider(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    return [cloud.name for cloud in clouds() if cloud.name.startswith(incomplete)]


@click.command(epilog=statuses("no offer matches, or no cloud could be asked", ""))
@click.option("--accelerator", metavar="NAME", help="For example A100, A100:4 or A100-40GB.")
@click.option("--cpu", type=int, help="Minimum number of vCPUs.")
@click.option("--memory", help="Minimum memory, for example 32GB.")
@click.option("--machine", metavar="TYPE", help="An exact machine type.")
@click.option("--architecture", type=click.Choice(["x86_64", "arm64"]))
@click.option(
    "--provider", "names", multiple=True, shell_complete=_complete_provider,
    help="aws, digitalocean or verda. Default: all.",
)  # fmt: skip
@click.option("--max-price", type=float, help="Maximum price in USD per hour of a machine.")
@click.option("--limit", default=20, show_default=True, help="Maximum number of offers.")
@as_json
def offers(names: tuple[str, ...], limit: int, as_json: bool, **options: Any) -> None:
    """List the machines that clouds offer.

    The list begins with the cheapest offer and includes spot machines.
    """
    from skyward.launch.offers_table import offers_table
    from skyward.launch.plan import make_plan
    from skyward.spec.pool import PoolSpec

    try:
        spec = PoolSpec(selection="cheapest", allocation="cheapest", **options)  # type: ignore[arg-type]  # settled there
        resolved = resolve(list(names)) if names else tuple(clouds())
        if not isinstance(resolved, tuple):
            accepted = ", ".join(cloud.name for cloud in clouds())
            raise click.UsageError(f"--provider {names[0]} is invalid: expected {accepted}")
        plan = make_plan(resolved, spec)
    except SpecError as exc:
        raise click.UsageError(str(exc)) from exc
    tell_failed(plan.failed, "could not be asked", meant=[name.lower() for name in names])
    found = list({(o.provider, o.region, o.instance.name): o for step in plan.steps for o in [step.offer]}.values())
    if as_json:
        click.echo(json.dumps([_offer_facts(offer) for offer in found], indent=2))
    else:
        print_table(offers_table([(offer, "") for offer in found], most=limit))


def _offer_facts(offer: Offer) -> dict[str, Any]:
    i = offer.instance
    return {
        "provider": offer.provider,
        "type": i.name,
        "region": offer.region,
        "architecture": offer.architecture,
        "accelerator": i.accelerator,
        "accelerator_count": i.accelerator_count,
        "accelerator_memory_gb": i.accelerator_memory_gb,
        "vcpu": i.vcpu,
        "memory_gb": i.memory_gb,
        "price_on_demand": i.price_on_demand,
        "price_spot": i.price_spot,
        "available": offer.available,
        "available_spot": offer.available_spot,
        "prices": offer.prices,
    }
