"""A terminal's progress bar, and above it lines that stay; while a pool starts, its phases and nodes."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from skyward import events
from skyward.console import wording
from skyward.console.model import Model, Node, Work
from skyward.console.screen import Screen
from skyward.console.streams import speaks_unicode

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType

_PATIENCE_S = 0.5
"""Seconds that something takes before it is shown. Chosen, not measured: what is over at once needs no display."""
_WORK_S = 1.0
_FEW_NODES = 10
_NARROW = 80
_SPIN = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_SPIN_ASCII = "|/-\\"
_START = ("plan", "launch", "boot", "bootstrap", "workers")


class LiveView:
    """Draws a pool again and again. `one_line`: no more than one line of it. Used under the lock of its console."""

    moves = True

    def __init__(self, model: Model, screen: Screen, *, one_line: bool) -> None:
        self._model = model
        self._screen = screen
        self._one_line = one_line or model.info.is_here
        self._is_sparing = model.info.is_here and not one_line  # shows only what takes long
        self._frame = 0
        self._unicode = speaks_unicode(sys.stderr)
        self._rich: RichConsole | None = None  # loaded when it is needed, because that takes a while

    def say(self, lines: Iterable[str]) -> None:
        """Write lines that stay."""
        first, *others = lines
        width = self._screen.size[0] - 1
        self._screen.write(
            "stderr",
            [part for line in (f"skyward: {first}", *(f"  {line}" for line in others)) for part in _wrap(line, width)],
        )

    def show(self, event: Any, now: float) -> None:  # noqa: ARG002 - as the other view
        """Write what of an event is to stay, after the model has heard of it."""
        news = list(wording.news(event, self._model))
        if news:
            self.say(news)
        if isinstance(event, events.PoolStarted):
            self.say([wording.up(self._model)])

    def refresh(self, now: float) -> None:
        """Draw what moves."""
        self._frame += 1
        self._screen.draw(self._one(now) if self._one_line else self._block(now))

    def close(self, now: float) -> None:
        """Take away what moves, and write what the pool came to."""
        self._screen.clear()
        if self._model.is_up:
            self.say(wording.summary(self._model, now))
        elif self._model.phases:
            self.say([wording.not_started(self._model, now)])

    # --- one line -------------------------------------------------------------------------------------------

    def _one(self, now: float) -> list[str]:
        model = self._model
        if not model.phases:
            return []
        phase = model.phases[-1]
        if phase.name == "running":
            if self._work(now) is not None:
                return self._render(self._progress(now, f"{self._spin} "))
            if self._is_sparing:
                return []
            words = [f"running {wording.duration(phase.seconds(now))}", *self._cost(now)]
        else:
            seconds = phase.seconds(now) if phase.name == "ending" else now - model.phases[0].began
            if seconds < _PATIENCE_S:
                return []
            nodes = f", {model.ready} of {len(model.nodes)} nodes ready" if phase.name in ("boot", "bootstrap") else ""
            words = [f"{phase.name}{nodes}, {wording.duration(seconds)}"]
            if phase.name != "ending":
                words = [f"starting {model.info}", *words]
        return [self._cut(f"{self._spin} skyward: {', '.join(words)}")]

    @property
    def _spin(self) -> str:
        signs = _SPIN if self._unicode else _SPIN_ASCII
        return signs[self._frame % len(signs)]

    def _cut(self, line: str) -> str:
        width = self._screen.size[0] - 1
        return line if len(line) <= width else f"{line[: width - 3]}..."

    def _cost(self, now: float) -> list[str]:
        cost = self._model.cost
        return [] if cost is None else [wording.money(cost.now(now))]

    # --- several lines --------------------------------------------------------------------------------------

    def _block(self, now: float) -> list[str]:
        from rich.table import Table
        from rich.text import Text

        model = self._model
        if not model.phases or now - model.phases[0].began < _PATIENCE_S:
            return []
        columns, rows = self._screen.size
        phase = model.phases[-1]
        seconds = phase.seconds(now) if model.is_up else now - model.phases[0].began
        state = phase.name if model.is_up else "starting"
        heading = Text(f"{self._spin} skyward ", style="bold")
        heading.append(f"{model.info}, {state} {wording.duration(seconds)}", style="not bold")
        for text in self._cost(now):
            heading.append(f", {text} so far", style="not bold")
        parts: list[RenderableType] = [heading]
        if not model.is_up:
            phases = Table.grid(padding=(0, 2))
            for name, spent in model.by_phase(now).items():
                mark = self._spin if name == phase.name else "✓" if self._unicode else "+"
                phases.add_row(f"  {mark} {name}", wording.duration(spent), style=None if name == phase.name else "dim")
            parts.append(phases)
        parts.append(self._nodes(columns, max(1, min(_FEW_NODES, rows - len(_START) - 5))))
        if self._work(now) is not None:
            parts.append(self._progress(now, "  "))
        return self._render(*parts)[: rows - 2]

    def _nodes(self, columns: int, most: int) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        nodes = [self._model.nodes[number] for number in sorted(self._model.nodes)]
        shown = nodes if len(nodes) <= most else nodes[: most - 1]
        lines = []
        for node in shown:
            name, *facts = wording.node_facts(node)
            lines.append([f"  node {node.number}", *([name] if columns >= _NARROW else []), *facts, self._state(node)])
        for cells in zip(*(line[:-1] for line in lines), strict=True):
            table.add_column(no_wrap=True, min_width=max(map(len, cells)))
        table.add_column(no_wrap=True, overflow="ellipsis")  # what is shortened where there is little room
        for line in lines:
            table.add_row(*line)
        if len(nodes) == len(shown):
            return table
        rest = nodes[len(shown) :]
        return Group(table, f"  and {len(rest)} more, {sum(node.state == 'ready' for node in rest)} of them ready")

    def _state(self, node: Node) -> str:
        if node.state != "ready" or not node.busy:
            return node.state
        return ", ".join(f"{name} {percent:.0f} %" for name, percent in node.busy.items())

    def _work(self, now: float) -> Work | None:
        """Return the calls at hand, if they take long enough to be shown."""
        work = self._model.work
        if work is None or work.has_ended or self._model.phase != "running" or now - work.began < _WORK_S:
            return None
        return work

    def _progress(self, now: float, lead: str) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        work = self._model.work
        assert work is not None
        words = wording.progress(work, now)
        table = Table.grid(padding=(0, 1))
        room = self._screen.size[0] - 1 - len(lead) - len(words) - 2
        if work.total and room >= 10:
            table.add_row(lead.rstrip() or " ", ProgressBar(work.total, work.done, width=min(30, room)), words)
        else:
            table.add_row(f"{lead}{words}")
        return table

    def _render(self, *parts: RenderableType) -> list[str]:
        rich = self._console()
        with rich.capture() as captured:
            for part in parts:
                rich.print(part, no_wrap=True, overflow="ellipsis", crop=True)
        return captured.get().splitlines()

    def _console(self) -> RichConsole:
        from rich.console import Console

        if self._rich is None:
            terminal = self._screen.terminal
            self._rich = Console(file=terminal, force_jupyter=False, markup=False, highlight=False, emoji=False)
        columns, rows = self._screen.size
        self._rich.size = (columns - 1, rows)
        return self._rich


def _wrap(line: str, width: int) -> list[str]:
    """Break a line between words; what continues it is further to the right."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(
        line, max(40, width), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [line]
