"""A pool as HTML."""

from __future__ import annotations

from skyward.console.notebook import pool_html
from skyward.spec import Instance

CHEAP = Instance(
    id="i-<1>", provider="aws", spot=True, public_ip="3.4.5.6", node=0,
    metadata={"instance_type": "m7i.large", "price": 0.03},
)  # fmt: skip


def test_nodes_cost_and_link_are_shown_and_escaped() -> None:
    shown = pool_html("<pool>", instances=[CHEAP], cost=0.0123, link='http://127.0.0.1:1/"status')

    assert "<b>&lt;pool&gt;</b> · 0.0123 USD so far" in shown
    assert 'href="http://127.0.0.1:1/&quot;status"' in shown
    for cell in ("0", "i-&lt;1&gt;", "m7i.large", "spot", "0.0300", "3.4.5.6"):
        assert f"<td>{cell}</td>" in shown


def test_of_many_nodes_some_are_shown() -> None:
    shown = pool_html("pool", instances=[CHEAP] * 100)

    assert shown.count("i-&lt;1&gt;") == 20
    assert "and 80 more" in shown
