"""How a console puts things: durations, prices, nodes, progress, what has failed, and what a pool came to."""

from __future__ import annotations

from collections.abc import Iterator

from skyward import events
from skyward.console.model import Model, Node, Work, counted

_SHORTEST_S = 0.05
_LAST_LINES = 6
"""Lines of a machine's last words that a console shows. The error has more, and the kept log all."""


def duration(seconds: float) -> str:
    """Return a time as ``"0.8 s"``, ``"42 s"``, ``"3 min 04 s"`` or ``"2 h 05 min"``."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def money(usd: float) -> str:
    return f"{usd:.2f} USD" if usd >= 10 else f"{usd:.4f} USD"


def node_facts(node: Node) -> list[str]:
    """Return name, type, kind and price of a node's machine, each empty where it has none."""
    kind = "" if node.spot is None else "spot" if node.spot else "on-demand"
    price = "" if node.price is None else f"{node.price:.4f} USD/h"
    return [node.instance_id, node.instance_type or "", kind, price]


def progress(work: Work, now: float) -> str:
    """Return a line such as ``"120 of 500 calls, 12/s, 32 s left"``."""
    done = counted(work.done, "call") if work.total is None else f"{work.done:,} of {counted(work.total, 'call')}"
    parts = [done]
    if work.failed:
        parts.append(f"{work.failed:,} failed")
    rate = work.per_second()
    if rate is not None:
        parts.append(_rate(rate))
    left = work.seconds_left(now)
    if left is not None and not work.has_ended:
        parts.append(f"{duration(left) if left < 9.5 else duration(round(left))} left")
    return ", ".join(parts)


def _rate(rate: float) -> str:
    if rate >= 10:
        return f"{rate:,.0f}/s"
    return f"{rate:.1f}/s" if rate >= 0.1 else f"{rate * 60:.1f}/min"


def up(model: Model) -> str:
    """Return the line that says that the pool takes calls."""
    where = f", dashboard at {model.link}" if model.link else ""
    return f"{model.info} up in {duration(model.start_s())}{where}"


def state(model: Model, now: float) -> list[str]:
    """Return what there is to say of a pool that is up: which it is, its calls, and its cost."""
    calls, failed = model.total_calls()
    parts = [f"pool {model.info.pool_id}", str(model.info)]
    if model.work is not None and not model.work.has_ended:
        parts.append(progress(model.work, now))
    elif calls:
        parts.append(f"{counted(calls, 'call')} so far" + (f", {failed:,} failed" if failed else ""))
    if model.cost is not None:
        parts.append(f"{money(model.cost.now(now))} so far, {money(model.cost.hourly)}/h")
    return parts


def summary(model: Model, now: float) -> list[str]:
    """Return what a pool came to, in a line or two: the first says it all, the second where the time went."""
    seconds = model.by_phase(now)
    calls, failed = model.total_calls()
    parts = [counted(calls, "call")] if calls else []
    if failed:
        parts.append(f"{failed:,} failed")
    if model.lost:
        parts.append(f"{counted(model.lost, 'machine')} lost")
    if model.cost is not None:
        parts.append(f"cost {money(model.cost.total)}")
        if model.cost.saved:
            parts.append(f"{money(model.cost.saved)} less than on-demand")
    lines = [": ".join([f"ended after {duration(sum(seconds.values()))}", *([", ".join(parts)] if parts else [])])]
    if not model.info.is_here:
        lines.append(", ".join(f"{name} {duration(s)}" for name, s in seconds.items() if s >= _SHORTEST_S))
    return lines


def not_started(model: Model, now: float) -> str:
    return f"{model.info} did not start; ended after {duration(sum(model.by_phase(now).values()))}"


def failure(model: Model, error: events.Error) -> list[str]:
    """Return what has failed: which machine, what it said last, and what to do about it."""
    node = model.node_of(error.instance_id)
    heading, *rest = error.message.splitlines() or [""]
    said = [line for line in rest if line.startswith("  ")]
    advice = [line for line in rest if not line.startswith("  ")]
    if len(said) > _LAST_LINES:
        said = ["  ...", *said[-_LAST_LINES:]]
    name = f"node {node.number} failed: " if node is not None else ""
    return [f"{name}{heading}", *said, *advice]


def news(event: object, model: Model) -> Iterator[str]:
    """Yield the lines that an event is worth, whatever the console: what is lost, replaced, tried in vain."""
    match event:
        case events.Error():
            yield from failure(model, event)
        case events.InstanceLost(instance_id=instance_id, node=node, reason=reason):
            yield f"node {node} is lost ({instance_id}): {reason}; its calls run again elsewhere"
        case events.InstanceReplaced(instance_id=instance_id, node=node, replaced_id=replaced):
            yield f"node {node} is up: {instance_id} in the place of {replaced}"
        case events.SchedulerMoved(instance_id=instance_id, node=node, reason=reason):
            yield f"the Dask scheduler is on node {node} now ({instance_id}); the last one was lost: {reason}"
        case events.RegionAutoSelected(region=region, provider=provider):
            yield f"region {region}{f' of {provider}' if provider else ''} was chosen"
