"""The caller's side of many calls: feed them in as they are wanted, take their values out as they come.

Runs in the caller's thread, so Ctrl-C lands here; the engine's loop does the rest.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from skyward.compute.pending import PendingBatch, PendingCompute
from skyward.engine.calls import Call, Item
from skyward.engine.engine import Engine
from skyward.engine.future import ItemOutcomes
from skyward.engine.graph import Graph
from skyward.engine.group import Group
from skyward.engine.packer import Packer
from skyward.engine.value_stream import ValueStream
from skyward.transfer.wire import Outcome

_CHUNKS_AHEAD = 4
"""Chunks per slot that may be on their way: some run, some wait, and some are being made meanwhile."""
_AHEAD_CALLS = 50_000
"""Calls that may be on their way, where there are not even more slots.
Chosen, not measured: a few dozen MB of small ones."""
_AHEAD_BYTES = 256 << 20
"""Pickled arguments and new large buffers that may wait for a slot (bytes), beyond two calls per slot.

Chosen, not measured."""
_HELD_CALLS = 10_000
"""Calls of a batch among which a later one may need the value of an earlier one. Chosen, not measured."""
_MAY_NEED = frozenset({list, tuple, dict, PendingCompute, PendingBatch})


def run_one(engine: Engine, call: Call) -> Any:
    """Run one call and return its value, or raise the user's exception."""
    engine.loop.check_thread()
    arrived: queue.SimpleQueue[ItemOutcomes] = queue.SimpleQueue()
    packer = Packer(engine.store, engine.sources, unchanged=True)
    item = packer.pack(call)
    running: Group | Graph = Group(engine.dispatcher, arrived.put, size=1)
    try:
        if item.needs:
            running = engine.graphs.send_one(item, packer, arrived.put)
        else:
            running.put(item)
        ((item, outcome),) = arrived.get()
    except BaseException:  # Ctrl-C
        running.cancel()
        raise
    ok, value = engine.decoder.decode(item.call, outcome)
    if not ok:
        raise value
    return value


def run_generator(engine: Engine, call: Call) -> Iterator[Any]:
    """Start a call of a generator function, and return an iterator over its values. Closing that ends the call."""
    values = _values(engine, engine.stream(call))
    next(values)  # to where closing it, or letting go of it, ends the call
    return values


def _values(engine: Engine, stream: ValueStream) -> Generator[Any, None, None]:
    is_over = False
    try:
        yield None
        while True:
            engine.dispatcher.check_open()
            is_over, outcome = stream.get()
            ok, value = engine.decoder.decode(stream.call, outcome)
            if not ok:
                raise value
            if is_over:
                return
            yield value
    finally:
        if not is_over and engine.dispatcher.failure is None:
            stream.close()
        stream.release()


def run_all(engine: Engine, calls: Sequence[Call], *, return_exceptions: bool = False) -> tuple[Any, ...]:
    """Run `calls`, which must not change meanwhile, and return their values in order.

    The first failure among those that have arrived, in order, cancels the others and is raised; with
    `return_exceptions`, exceptions take their places among the values.
    """
    found: dict[int, Any] = {}
    with contextlib.closing(_outcomes(engine, calls, ordered=False, unchanged=True)) as outcomes:
        for index, ok, value in outcomes:
            if not ok and not return_exceptions:
                raise value
            found[index] = value
    return tuple(found[i] for i in range(len(found)))


def stream(
    engine: Engine, calls: Iterable[Call], *, ordered: bool = True, return_exceptions: bool = False
) -> Iterator[Any]:
    """Yield values as they come, or in order; a failure is raised in its turn and cancels what is left.

    `calls` is read only as far ahead as the slots need, so it may be endless. Closing the iterator cancels.
    """
    with contextlib.closing(_outcomes(engine, calls, ordered=ordered)) as outcomes:
        for _, ok, value in outcomes:
            if not ok and not return_exceptions:
                raise value
            yield value


def _outcomes(
    engine: Engine, calls: Iterable[Call], *, ordered: bool, unchanged: bool = False
) -> Generator[tuple[int, bool, Any], None, None]:
    """Yield (index, ok, value or exception) as calls end, or in order. Leaving early cancels the rest.

    Calls are taken from the iterable only while those on their way, and those that came before their turn, are few.
    """
    engine.loop.check_thread()
    arrived: queue.SimpleQueue[ItemOutcomes] = queue.SimpleQueue()
    packer = Packer(engine.store, engine.sources, unchanged=unchanged)
    source = enumerate(calls)
    known = len(calls) if isinstance(calls, (list, tuple)) else None
    group = Group(engine.dispatcher, arrived.put, size=known)
    graph: Graph | None = None
    # Not sent yet, because later calls may need their values.
    held: list[Item] | None = [] if unchanged and any(map(_may_need, calls)) else None
    held_bytes = 0
    early: dict[int, tuple[Item, Outcome | BaseException]] = {}
    fed = ended = turn = 0
    digest = ""  # of the last function
    exhausted = False
    finished = False
    if known is None:
        group.may_grow = lambda: not exhausted
    try:
        while True:
            while not exhausted and (
                (held is not None and fed < _HELD_CALLS and held_bytes < _AHEAD_BYTES)
                or (
                    fed - ended < (most := _window(engine, digest))
                    and len(early) < 4 * most
                    and (group.pending_bytes < _AHEAD_BYTES or fed - ended < 2 * engine.slots)
                )
            ):
                index, call = next(source, (-1, None))
                if call is None:
                    exhausted = True
                    group.note()
                    break
                fed += 1
                group.expected = None if known is None else known - fed
                item = packer.pack(call, index)
                digest = item.function.digest
                if item.needs:
                    graph = graph or engine.graphs.graph(packer, arrived.put)
                    graph.put(item)
                    group.leave_out()
                elif held is not None:
                    held.append(item)
                    held_bytes += item.size
                else:
                    group.put(item)
            for item in held or ():
                if graph is not None and item in graph:
                    graph.put(item)
                    group.leave_out()
                else:
                    group.put(item)
            held = None
            if graph is not None:
                graph.send(is_last=exhausted)
            if fed == ended:
                finished = True
                return
            if engine.loop.left is not None:
                raise engine.loop.left
            delivery = list(arrived.get())
            while not arrived.empty():
                delivery += arrived.get()
            ended += len(delivery)
            if ordered:
                early.update((item.index, (item, outcome)) for item, outcome in delivery)
                delivery = []
                while turn in early:
                    delivery.append(early.pop(turn))
                    turn += 1
            else:
                delivery.sort(key=lambda entry: entry[0].index)
            for item, outcome in delivery:
                ok, value = engine.decoder.decode(item.call, outcome)
                yield item.index, ok, value
    finally:
        if not finished:
            group.cancel()
        if graph is not None:
            (graph.close if finished else graph.cancel)()


def _may_need(call: Call) -> bool:
    """Tell whether a call may need the values of others, by a look at its arguments that costs next to nothing."""
    kwargs = call.kwargs
    return not _MAY_NEED.isdisjoint(map(type, call.args)) or (
        bool(kwargs) and not _MAY_NEED.isdisjoint(map(type, kwargs.values()))
    )


def _window(engine: Engine, digest: str) -> int:
    """Return how many calls of a function may be on their way: a few chunks per slot, as far as their size is known."""
    slots = max(1, engine.slots)
    chunks = _CHUNKS_AHEAD * slots * engine.estimates.chunk_calls(digest)
    return max(64, 8 * slots, min(chunks, _AHEAD_CALLS))
