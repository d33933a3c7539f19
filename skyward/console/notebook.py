"""A pool as HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from skyward.console.wording import money
from skyward.spec.instance import Instance

_MOST = 20
_HEADINGS = ("node", "machine", "state", "type", "lease", "USD/h", "address")


def pool_html(
    title: Sequence[str],
    *,
    instances: Sequence[Instance] = (),
    states: Mapping[int, str] | None = None,
    cost: float = 0.0,
    link: str = "",
) -> str:
    """Return what is said of a pool, its cost, its nodes with their states, and a link to its dashboard.

    Everything in it is escaped.
    """
    spent = [f"{money(cost)} so far"] if cost else []
    parts = [line_html(*title, *spent, link=link)]
    if instances:
        parts.append(table_html(_HEADINGS, [_cells(i, (states or {}).get(i.node, "")) for i in instances]))
    return f"<div>{''.join(parts)}</div>"


def line_html(*parts: str, link: str = "") -> str:
    """Return a line of what is said, the first part of it bold, and a link to the dashboard."""
    texts = [f"<b>{html.escape(parts[0])}</b>", *map(html.escape, parts[1:])]
    if link:
        texts.append(f'<a href="{html.escape(link)}" target="_blank">dashboard</a>')
    return f"<p>{' · '.join(texts)}</p>"


def table_html(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of the first rows, without those columns that have nothing in them, and how many rows more."""
    first = rows[:_MOST]
    shown = [number for number in range(len(headings)) if any(row[number] for row in first)]
    lines = [_row("th", [headings[number] for number in shown])]
    lines += [_row("td", [row[number] for number in shown]) for row in first]
    more = f"<p>and {len(rows) - _MOST} more</p>" if len(rows) > _MOST else ""
    return f"<table>{''.join(lines)}</table>{more}"


def _cells(instance: Instance, state: str) -> list[str]:
    facts = instance.metadata
    price = facts.get("price")
    lease = "" if price is None else "spot" if instance.spot else "on-demand"
    return [
        str(instance.node),
        instance.id,
        state,
        str(facts.get("instance_type", "")),
        lease,
        "" if price is None else f"{price:.4f}",
        instance.public_ip or instance.private_ip or "",
    ]


def _row(kind: str, cells: Sequence[str]) -> str:
    left = ' style="text-align: left"'  # as Jupyter has it for no tables but its own
    return f"<tr>{''.join(f'<{kind}{left}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"
