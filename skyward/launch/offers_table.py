"""Offers of providers as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from skyward.providers.base import Offer
from skyward.spec.instance import InstanceSpec

if TYPE_CHECKING:
    from rich.table import Table


def offers_table(rows: Sequence[tuple[Offer, str]], *, most: int) -> Table:
    """Return offers, each with what is to be said of it, as a table."""
    from rich import box
    from rich.table import Table

    note = "" if len(rows) <= most else f"{len(rows) - most} more are not shown"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=note or None)
    for heading, side in _COLUMNS:
        table.add_column(heading, justify=side)
    for offer, words in rows[:most]:
        i = offer.instance
        table.add_row(
            offer.provider, i.name, offer.region, _accelerators(i), str(i.vcpu), f"{i.memory_gb:g}",
            price_text(i.price_on_demand), price_text(i.price_spot),
            words if offer.prices == "live" else "; ".join(filter(None, [words, f"prices: {offer.prices}"])),
        )  # fmt: skip
    return table


_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("provider", "left"), ("type", "left"), ("region", "left"), ("accelerator", "left"), ("vCPU", "right"),
    ("GB", "right"), ("USD/h", "right"), ("spot", "right"), ("", "left"),
)  # fmt: skip


def _accelerators(i: InstanceSpec) -> str:
    if not i.accelerator:
        return ""
    size = "" if "GB" in i.accelerator or not i.accelerator_memory_gb else f" {i.accelerator_memory_gb:g} GB"
    return f"{i.accelerator_count} × {i.accelerator}{size}"


def price_text(price: float | None) -> str:
    return "–" if price is None else f"{price:.4f}"
