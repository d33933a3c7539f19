"""A pool as HTML."""

from __future__ import annotations

from dataclasses import replace

from skyward.console.notebook import pool_html
from skyward.spec.instance import Instance

CHEAP = Instance(
    id="i-<1>", provider="aws", spot=True, public_ip="3.4.5.6", node=0,
    metadata={"instance_type": "m7i.large", "price": 0.03},
)  # fmt: skip


def test_nodes_cost_and_link_are_shown_and_escaped() -> None:
    shown = pool_html(
        ["<pool>", "<active>"], instances=[CHEAP], states={0: "<ready>"}, cost=0.0123, link='http://127.0.0.1:1/"status'
    )

    assert "<b>&lt;pool&gt;</b> · &lt;active&gt; · 0.0123 USD so far" in shown
    assert 'href="http://127.0.0.1:1/&quot;status"' in shown
    for cell in ("0", "i-&lt;1&gt;", "&lt;ready&gt;", "m7i.large", "spot", "0.0300", "3.4.5.6"):
        assert f">{cell}</td>" in shown


def test_columns_with_nothing_in_them_are_left_out() -> None:
    shown = pool_html(["pool"], instances=[replace(CHEAP, metadata={})])

    assert all(f">{heading}</th>" in shown for heading in ("node", "machine", "address"))
    assert all(f">{heading}</th>" not in shown for heading in ("state", "type", "lease", "USD/h"))


def test_of_many_nodes_some_are_shown() -> None:
    shown = pool_html(["pool"], instances=[CHEAP] * 100)

    assert shown.count("i-&lt;1&gt;") == 20
    assert "and 80 more" in shown
