"""A console of plain lines with time stamps: for logs, pipes, and terminals that can't do more."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from skyward import events
from skyward.console import wording
from skyward.console.model import Model, counted
from skyward.console.streams import Streams

_FEW_NODES = 8
"""Up to so many nodes each has its own lines. Chosen, not measured: of more, totals are shown."""
_TOGETHER_S = 5.0
_PROGRESS_S = (5.0, 10.0, 30.0, 60.0)
"""Pauses between lines about progress and cost, the last of them from then on. Chosen, not measured."""


class PlainView:
    """Writes what is worth a line. Used under the lock of its console."""

    moves = False

    def __init__(self, model: Model, streams: Streams) -> None:
        self._model = model
        self._streams = streams
        self._told_ready = 0
        self._told_at = -_TOGETHER_S
        self._progress_lines = 0
        self._progress_at = 0.0

    def say(self, lines: Iterable[str]) -> None:
        """Write lines, the first with time stamp and name."""
        stamp = time.strftime("%H:%M:%S")
        first = True
        for line in lines:
            self._streams.status(f"{stamp} skyward: {line}" if first else f"{' ' * len(stamp)}   {line}")
            first = False

    def show(self, event: Any, now: float) -> None:
        """Write what an event is worth, after the model has heard of it."""
        model, info = self._model, self._model.info
        for line in self._lines(event, now):
            self.say([line])
        news = list(wording.news(event, model))
        if news:
            self.say(news)
        match event:
            case events.PoolStarted():
                self.say([wording.up(model)])
                self._progress_at = now + _PROGRESS_S[0]
            case events.PoolStopping() if not info.is_here:
                self.say([f"ending {counted(len(model.nodes), 'machine')}"])
            case events.TaskProgress() | events.CostUpdate():
                self._progress(now)

    def _lines(self, event: Any, now: float) -> Iterable[str]:
        """Yield what is news of a start that takes long: that of machines elsewhere."""
        model, info = self._model, self._model.info
        match event:
            case events.InfraCreating() if not info.is_here:
                yield f"pool {info.pool_id}: {info}"
            case events.InstanceLaunching(count=count, instance_type=kind, provider=provider):
                yield f"launching {count} × {kind} on {provider}{f' in {model.region}' if model.region else ''}"
            case events.InstanceProvisioned(node=number) if not info.is_here and len(model.nodes) <= _FEW_NODES:
                yield f"node {number}: {', '.join(filter(None, wording.node_facts(model.nodes[number])))}"
            case events.BootstrapProgress(instance_id=name, step=step) if not info.is_here:
                node = model.node_of(name)
                if node is not None and len(model.nodes) <= _FEW_NODES:
                    yield f"node {node.number}: {step if step != 'ssh' else 'waiting for SSH'}"
            case events.BootstrapProgress(step=step) if model.phases and len(model.phases) < 4:
                yield f"installing what is missing ({step})"
            case events.BootstrapCompleted() if not info.is_here and not model.is_up:
                ready, nodes = model.ready, len(model.nodes)
                if ready > self._told_ready and (ready == nodes or now - self._told_at >= _TOGETHER_S):
                    self._told_ready, self._told_at = ready, now
                    yield f"{ready} of {counted(nodes, 'node')} ready"

    def _progress(self, now: float) -> None:
        model = self._model
        if not model.is_up or now < self._progress_at:
            return
        parts = []
        if model.work is not None and now - model.work.began >= _PROGRESS_S[0]:
            parts.append(wording.progress(model.work, now))
        if model.cost is not None:
            parts.append(f"{wording.money(model.cost.now(now))} so far")
        if parts:
            self.say(["; ".join(parts)])
            self._progress_at = now + _PROGRESS_S[min(self._progress_lines, len(_PROGRESS_S) - 1)]
            self._progress_lines += 1

    def close(self, now: float) -> None:
        """Write what the pool came to."""
        if self._model.is_up:
            self.say(wording.summary(self._model, now))
        elif self._model.phases:
            self.say([wording.not_started(self._model, now)])

    def refresh(self, now: float) -> None:
        """Nothing moves here."""
