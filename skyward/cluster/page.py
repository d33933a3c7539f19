"""The dashboard's page of skyward: nodes with their machines, prices and load, GPUs and cost beside Dask's own plots.

Loads Dask's dashboard and bokeh: imported where that is loaded already.
"""

from __future__ import annotations

import math
from typing import Any

from bokeh.models import ColumnDataSource, DataTable, NumberFormatter, Range1d, TableColumn
from bokeh.plotting import column, figure
from distributed.dashboard import scheduler as dashboard
from distributed.dashboard.components import add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.dashboard.utils import update

from skyward.cluster.figures import FIGURES, SHARES, FiguresPlugin

PAGE = "skyward"
_PERIOD_MS = 2000
_COLUMNS = {
    "node": "node", "machine": "machine", "type": "type", "lease": "", "price": "USD/h", "state": "state",
    "cpu": "CPU %", "memory": "memory %", "gpu": "GPU %", "gpu_memory": "GPU memory %", "gpu_temperature": "GPU °C",
}  # fmt: skip
_TEXTS = ("node", "machine", "type", "lease", "state")
_COLOURS = {"cpu": "#1f77b4", "memory": "#ff7f0e", "gpu": "#2ca02c", "gpu_memory": "#9467bd"}


def add_page(scheduler: Any) -> None:
    """Let the dashboard have the page, and a link to it in its bar; before it is connected to the scheduler."""
    dashboard.applications[f"/{PAGE}"] = _document
    pages = dashboard.template_variables(scheduler)["pages"]
    if PAGE not in pages:
        pages.append(PAGE)


class _Figures:
    """What one browser sees."""

    def __init__(self, plugin: FiguresPlugin) -> None:
        self._plugin = plugin
        self._nodes = ColumnDataSource({name: [] for name in _COLUMNS})
        self._history = ColumnDataSource({name: [] for name in ("time", "cost", *SHARES)})
        self.root = column(self._table(), self._shares(), self._costs(), sizing_mode="stretch_width")
        self.update()

    def _table(self) -> Any:
        number = NumberFormatter(format="0.[0000]", nan_format="–")
        columns = [
            TableColumn(field=name, title=title, **({} if name in _TEXTS else {"formatter": number}))
            for name, title in _COLUMNS.items()
        ]
        return DataTable(
            source=self._nodes, columns=columns, index_position=None, sizing_mode="stretch_width", height=220
        )

    def _shares(self) -> Any:
        plot = self._plot("Mean of all nodes, in percent")
        plot.y_range = Range1d(0, 100)
        for share in SHARES:
            label = _COLUMNS[share].removesuffix(" %")
            plot.line("time", share, source=self._history, legend_label=label, color=_COLOURS[share], line_width=2)
        plot.legend.location = "top_left"
        return plot

    def _costs(self) -> Any:
        plot = self._plot("Cost so far, in USD")
        plot.line("time", "cost", source=self._history, color="#d62728", line_width=2)
        return plot

    @staticmethod
    def _plot(title: str) -> Any:
        return figure(title=title, x_axis_type="datetime", height=220, tools="", sizing_mode="stretch_width")

    def update(self) -> None:
        """Show what has come; called again and again."""
        history = list(self._plugin.history)
        data: dict[str, list[Any]] = {
            name: [_number(moment[name]) for moment in history] for name in ("cost", *SHARES)
        }
        data["time"] = [_number(moment["time"]) * 1000 for moment in history]
        update(self._history, data)
        nodes = self._plugin.nodes
        shown = {
            name: [str(node.get(name) or "") if name in _TEXTS else _number(node.get(name)) for node in nodes]
            for name in _COLUMNS
        }
        update(self._nodes, {**shown, "node": [str(node["node"]) for node in nodes]})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _document(scheduler: Any, extra: dict[str, Any], document: Any) -> None:
    figures = _Figures(scheduler.plugins[FIGURES])
    add_periodic_callback(document, figures, _PERIOD_MS)
    document.add_root(figures.root)
    document.title = "skyward"
    document.template = env.get_template("simple.html")
    document.template_variables.update(extra)
    document.theme = BOKEH_THEME
