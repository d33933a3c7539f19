"""One call of a graph, and the Dask task that runs it."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dask.delayed import Delayed, DelayedAttr, DelayedLeaf
from distributed import Future

from skyward.compute.pending import PendingBatch, PendingCompute, PendingGenerator, PendingStream
from skyward.engine.calls import Item
from skyward.engine.persisted import Persisted
from skyward.errors import SpecError
from skyward.transfer.dependencies import STAND_INS, need_value, need_values
from skyward.worker import graph


def _need_batch(batch: PendingBatch[*tuple[Any, ...]], needs: list[Any]) -> Any:
    if batch.return_exceptions:
        raise SpecError("a batch with return_exceptions=True can't be an argument: a failed call has no value")
    return need_values(batch.calls, needs)


def _refuse_stream(_: Any, __: list[Any]) -> Any:
    raise SpecError("gather(..., stream=True) can't be an argument: pass gather(...), whose values are a tuple")


def _refuse_generator(call: PendingGenerator[Any], _: list[Any]) -> Any:
    try:
        call.refuse()
    except TypeError as exc:
        raise SpecError(f"an argument has no single value: {exc}") from None


SENT = "-sent"
"""What the key of the task that gives the caller a call's value ends with, if others need the value too."""

STAND_INS.update(dict.fromkeys((PendingCompute, Future, Persisted, Delayed, DelayedAttr, DelayedLeaf), need_value))
STAND_INS[PendingBatch] = _need_batch
STAND_INS[PendingStream] = _refuse_stream
STAND_INS[PendingGenerator] = _refuse_generator


@dataclass(slots=True, eq=False)
class GraphTask:
    """A call in a graph, and the key of its Dask task. `wanted` is what the caller waits for, if it does."""

    item: Item
    key: str
    needs: list[GraphTask | Future[Any]] = field(default_factory=list)
    wanted: Item | None = None
    is_needed: bool = False  # by other calls, or kept for later ones
    is_sent: bool = False
    losses: int = 0  # of large arguments of the graph, before it was sent
    dependents: int = 0  # calls that need its value and may have to be run again
    has_ended: bool = False
    is_over: bool = False  # no other call can need it any more
    origin: weakref.ref[Any] | None = None  # tells when its pending call is gone

    @property
    def sent_key(self) -> str:
        """The key of the Dask task that gives the caller the call's value."""
        return f"{self.key}{SENT}" if self.is_needed else self.key

    def dask_task(
        self, arguments: Sequence[Any], beside: Collection[GraphTask], before: Mapping[str, Future[Any]]
    ) -> tuple[Any, ...]:
        """Return what Dask is to run: with the keys of the calls `beside` it, and the futures of those `before`."""
        (chunk, *blobs), call = arguments, self.item.call
        needs: list[Any] = []
        for need in self.needs:
            if isinstance(need, GraphTask):
                needs.append(need.key if need in beside else before.get(need.key, need.key))
            else:
                needs.append(need)
        if self.is_needed:
            return (graph.run_call, call.label, call.retries, chunk, needs, blobs)
        return (graph.run_last, call.retries, chunk, needs, blobs)

    def refuse_sent(self, why: str) -> None:
        """Raise if the call was sent: what others need has to stay on the cluster from then on."""
        if self.is_sent:
            raise SpecError(
                f"{self.item.call.label}() {why} after it was sent: keep its value with pool.persist(...), and pass "
                "that"
            )


def add_needs(tasks: dict[GraphTask, None]) -> None:
    """Add the calls whose values these need, and so on."""
    for task in (found := list(tasks)):  # which grows
        new = [need for need in task.needs if isinstance(need, GraphTask) and need not in tasks]
        found += new
        tasks.update(dict.fromkeys(new))
