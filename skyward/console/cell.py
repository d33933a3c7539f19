"""A console for notebooks: HTML below the cell that enters the pool, which changes as the pool does.

Nothing is written to the cell's streams, where it would tear a bar of tqdm and be shown as an error.
"""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Iterable
from html import escape
from typing import Any

from skyward.console import wording
from skyward.console.model import Model
from skyward.console.notebook import line_html, table_html

_PERIOD_S = 0.5
"""Seconds between two changes at least. Chosen, not measured: each of them is a message to the browser."""
_WORK_S = 0.5
_SAID_LINES = 20


class CellView:
    """Shows a pool in a notebook. Made in the thread that runs the cell, used under the lock of its console."""

    moves = True

    def __init__(self, model: Model) -> None:
        self._model = model
        self._said: deque[str] = deque(maxlen=_SAID_LINES)
        self._html = ""
        self._changed_at = time.monotonic()
        display = importlib.import_module("IPython.display").display
        self._handle: Any = display(self._bundle(self._html), raw=True, display_id=True)

    def say(self, lines: Iterable[str]) -> None:
        """Show lines that stay, the last of them if they are many."""
        self._said.extend(lines)

    def show(self, event: Any, now: float) -> None:
        """Take in what of an event is to stay, after the model has heard of it."""
        self.say(wording.news(event, self._model))
        self.refresh(now)

    def refresh(self, now: float) -> None:
        """Show what has changed."""
        if now - self._changed_at >= _PERIOD_S:
            self._change(self._parts(now), now)

    def close(self, now: float) -> None:
        """Show what the pool came to."""
        model = self._model
        if model.is_up:
            self._change([line_html(str(model.info), *wording.summary(model, now)), *self._lines()], now)
        elif model.phases:
            self._change([line_html(wording.not_started(model, now)), *self._lines()], now)

    def _change(self, parts: list[str], now: float) -> None:
        html = f"<div>{''.join(parts)}</div>"
        if html != self._html:
            self._html, self._changed_at = html, now
            self._handle.update(self._bundle(html), raw=True)

    def _bundle(self, html: str) -> dict[str, str]:
        return {"text/html": html, "text/plain": f"skyward: {self._model.info}"}

    def _parts(self, now: float) -> list[str]:
        model = self._model
        if not model.phases:
            return []
        if model.phase == "running":
            words = [f"up in {wording.duration(model.start_s())}", *self._cost(now)]
            return [line_html(str(model.info), *words, link=model.link), *self._work(now), *self._lines()]
        started = model.phases[-1 if model.phase == "ending" else 0].began
        words = [f"starting {model.info}", str(model.phase)] if model.phase != "ending" else [f"ending {model.info}"]
        if model.phase in ("boot", "bootstrap"):
            words.append(f"{model.ready} of {len(model.nodes)} nodes ready")
        heading = line_html(*words, wording.duration(float(int(now - started))), *self._cost(now))
        return [heading, *self._nodes(), *self._lines()]

    def _cost(self, now: float) -> list[str]:
        cost = self._model.cost
        return [] if cost is None else [f"{wording.money(cost.now(now))} so far"]

    def _work(self, now: float) -> list[str]:
        work = self._model.work
        if work is None or work.has_ended or now - work.began < _WORK_S:
            return []
        bar = "" if work.total is None else f'<progress value="{work.done}" max="{work.total}"></progress> '
        return [f"<p>{bar}{escape(wording.progress(work, now))}</p>"]

    def _nodes(self) -> list[str]:
        """Return a table of the nodes of a pool elsewhere, and what their machines are doing."""
        nodes = [self._model.nodes[number] for number in sorted(self._model.nodes)]
        if self._model.info.is_here or not nodes:
            return []
        rows = [[str(node.number), *wording.node_facts(node), node.state] for node in nodes]
        return [table_html(("node", "machine", "type", "lease", "price", "state"), rows)]

    def _lines(self) -> list[str]:
        return [f"<pre>{escape(chr(10).join(self._said))}</pre>"] if self._said else []
