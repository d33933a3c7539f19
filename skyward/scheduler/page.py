"""The dashboard's page of skyward: nodes with their machines, prices and load, GPUs and cost beside Dask's own plots.

Loads Dask's dashboard and bokeh: imported where that is loaded already.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.models import ColumnDataSource, DataRange1d, Div, NumeralTickFormatter, Range1d
from bokeh.plotting import column, figure
from distributed.dashboard import scheduler as dashboard
from distributed.dashboard.components import add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.dashboard.utils import update

from skyward.scheduler.page_data import PAGE_DATA, SHARES, PageDataPlugin

PAGE = "skyward"
_PERIOD_MS = 2000
_TEXTS = {"node": "node", "machine": "machine", "type": "type", "lease": "lease", "state": "state"}
_NUMBERS = {
    "price": ("USD/h", ".4f"), "cpu": ("CPU %", ".0f"), "memory": ("memory %", ".0f"), "gpu": ("GPU %", ".0f"),
    "gpu_memory": ("GPU memory %", ".0f"), "gpu_temperature": ("GPU °C", ".0f"),
}  # fmt: skip
"""Headings of the columns with numbers, and how these are written."""
_ORDER = ("node", "machine", "type", "lease", "price", "state", "cpu", "memory", "gpu", "gpu_memory", "gpu_temperature")
_ALWAYS = ("node", "machine", "state", "cpu", "memory")
"""Columns that are shown also when there is nothing in them."""
_COLOURS = {"cpu": "#1f77b4", "memory": "#ff7f0e", "gpu": "#2ca02c", "gpu_memory": "#9467bd"}
_STYLE = """<style>
.scroll { max-height: 340px; overflow: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: 4px 14px 4px 0; text-align: left; white-space: nowrap; }
th { border-bottom: 1px solid #999; position: sticky; top: 0; background: #fafafa; }
td { border-bottom: 1px solid #ddd; }
.number { text-align: right; }
p { font-size: 14px; margin: 0 0 8px; }
</style>"""


def add_page(scheduler: Any) -> None:
    """Let the dashboard have the page, and a link to it in its bar; before it is connected to the scheduler."""
    dashboard.applications[f"/{PAGE}"] = _document
    pages = dashboard.template_variables(scheduler)["pages"]
    if PAGE not in pages:
        pages.append(PAGE)


class _PageView:
    """What one browser sees. What there are no figures of, such as GPUs or a cost, takes no room."""

    def __init__(self, plugin: PageDataPlugin) -> None:
        self._plugin = plugin
        self._history = ColumnDataSource({name: [] for name in ("time", "cost", *SHARES)})
        # Not Bokeh's own table, which stays as it is when rows change and their number does not (3.9).
        self._nodes = Div(sizing_mode="stretch_width", margin=(12, 25, 12, 25))
        self._lines: dict[str, Any] = {}
        self._shares = self._share_plot()
        self._costs = self._plot("Cost so far, in USD (times are UTC)")
        self._costs.y_range = DataRange1d(start=0, default_span=0.01)  # the span where nothing has changed yet
        self._costs.yaxis.formatter = NumeralTickFormatter(format="0.00[00]")
        self._costs.line("time", "cost", source=self._history, color="#d62728", line_width=2)
        self.root = column(self._nodes, self._shares, self._costs, sizing_mode="stretch_width")
        self.update()

    def _share_plot(self) -> Any:
        plot = self._plot("Mean of all nodes, in percent (times are UTC)")
        plot.y_range = Range1d(0, 105)
        for share in SHARES:
            label = _NUMBERS[share][0].removesuffix(" %")
            self._lines[share] = plot.line(
                "time", share, source=self._history, legend_label=label, color=_COLOURS[share], line_width=2
            )
        plot.add_layout(plot.legend[0], "right")  # where no line is behind it
        return plot

    @staticmethod
    def _plot(title: str) -> Any:
        return figure(title=title, x_axis_type="datetime", height=240, tools="", sizing_mode="stretch_width")

    def update(self) -> None:
        """Show what has come; called again and again."""
        history = list(self._plugin.history)
        data: dict[str, list[Any]] = {
            name: [_number(moment[name]) for moment in history] for name in ("cost", *SHARES)
        }
        data["time"] = [_number(moment["time"]) * 1000 for moment in history]
        update(self._history, data)
        known = {name for name in ("cost", *SHARES) if not all(map(math.isnan, data[name]))}
        for (share, line), item in zip(self._lines.items(), self._shares.legend[0].items, strict=True):
            _set(line, visible=share in known)
            _set(item, visible=share in known)
        _set(self._costs, visible="cost" in known)
        _set(self._nodes, text=_STYLE + _heading(self._plugin.heading) + _table(self._plugin.nodes))


def _heading(parts: Sequence[str]) -> str:
    return f"<p>{html.escape(' · '.join(parts) or 'The pool has not told of itself yet.')}</p>"


def _table(nodes: Sequence[Mapping[str, Any]]) -> str:
    shown = [name for name in _ORDER if name in _ALWAYS or any(node.get(name) not in (None, "") for node in nodes)]
    headings = "".join(_cell("th", name, _TEXTS.get(name) or _NUMBERS[name][0]) for name in shown)
    rows = ["".join(_cell("td", name, _text(name, node.get(name))) for name in shown) for node in nodes]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{headings}</tr>{body}</table></div>'


def _cell(kind: str, name: str, text: str) -> str:
    return f"<{kind}{' class=number' if name in _NUMBERS else ''}>{html.escape(text)}</{kind}>"


def _text(name: str, value: Any) -> str:
    if value is None:
        return "–" if name in _NUMBERS else ""
    return format(value, _NUMBERS[name][1]) if name in _NUMBERS else str(value)


def _set(model: Any, **values: Any) -> None:
    """Set what is different: each change is a message to the browser."""
    for name, value in values.items():
        if getattr(model, name) != value:
            setattr(model, name, value)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _document(scheduler: Any, extra: dict[str, Any], document: Any) -> None:
    view = _PageView(scheduler.plugins[PAGE_DATA])
    add_periodic_callback(document, view, _PERIOD_MS)
    document.add_root(view.root)
    document.title = "skyward"
    document.template = env.get_template("simple.html")
    document.template_variables.update(extra)
    document.theme = BOKEH_THEME
