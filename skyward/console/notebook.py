"""A pool as HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

from skyward.console.wording import money
from skyward.spec import Instance

_MOST = 20
_HEADINGS = ("node", "machine", "type", "", "USD/h", "address")


def pool_html(title: str, *, instances: Sequence[Instance] = (), cost: float = 0.0, link: str = "") -> str:
    """Return a pool's title, cost, nodes, and a link to its dashboard. Everything in it is escaped."""
    facts = [f"<b>{html.escape(title)}</b>"]
    if cost:
        facts.append(f"{money(cost)} so far")
    if link:
        facts.append(f'<a href="{html.escape(link)}" target="_blank">dashboard</a>')
    parts = [f"<p>{' · '.join(facts)}</p>"]
    if instances:
        parts.append(_row("th", _HEADINGS))
        parts += [_row("td", _cells(instance)) for instance in instances[:_MOST]]
        parts[1:] = [f"<table>{''.join(parts[1:])}</table>"]
    if len(instances) > _MOST:
        parts.append(f"<p>and {len(instances) - _MOST} more</p>")
    return f"<div>{''.join(parts)}</div>"


def _cells(instance: Instance) -> list[str]:
    facts = instance.metadata
    price = facts.get("price")
    lease = "" if price is None else "spot" if instance.spot else "on-demand"
    return [
        str(instance.node),
        instance.id,
        str(facts.get("instance_type", "")),
        lease,
        "" if price is None else f"{price:.4f}",
        instance.public_ip or instance.private_ip or "",
    ]


def _row(kind: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"
