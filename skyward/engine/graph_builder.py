"""The tasks of a graph's calls, and of the calls that these need."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from distributed import Client, Future

from skyward.compute.pending import PendingCompute
from skyward.engine.calls import Item, as_call
from skyward.engine.graph_task import GraphTask
from skyward.engine.packer import Packer
from skyward.errors import PoolError, SpecError

_MOST_CALLS = 100_000
"""Calls in one graph: Dask's scheduler takes about 1 ms and some kB for each. Chosen, not measured."""


class GraphBuilder:
    """Makes the tasks of one graph: one for each call, however many need its value."""

    def __init__(self, client: Client, packer: Packer) -> None:
        self._client = client
        self._packer = packer
        self._new: list[GraphTask] = []
        self.count: int = 0  # of all tasks made
        self._tasks: dict[int, GraphTask] = {}  # by the id of the pending call, as long as that is there
        self._computed: dict[int, tuple[Any, Future[Any]]] = {}  # Dask's own delayed values, by their id

    def __contains__(self, item: Item) -> bool:
        return id(item.call.origin) in self._tasks

    def add(self, item: Item) -> GraphTask:
        """Return the task of a call; make it, and those of the calls that it needs, unless they exist."""
        task, new = self._task(item)
        self.resolve(new)
        return task

    def resolve(self, tasks: list[GraphTask]) -> None:
        """Add what these calls need, and what that needs."""
        for task in tasks:  # which grows
            for need in task.item.needs:
                if isinstance(need, PendingCompute):
                    found, new = self._task(need)
                    if not found.is_needed:
                        found.refuse_sent(f"is needed by {task.item.call.label}()")
                    found.is_needed = True
                    found.dependents += 1
                    task.needs.append(found)
                    tasks += new
                elif isinstance(need, Future):
                    check_future(need, self._client, task.item.call.label)
                    task.needs.append(need)
                else:
                    if id(need) not in self._computed:
                        self._computed[id(need)] = need, self._client.compute(need)
                    task.needs.append(self._computed[id(need)][1])
        check_cycles(tasks)

    def _task(self, call: Item | PendingCompute[Any]) -> tuple[GraphTask, list[GraphTask]]:
        """Return the task of a call, and once more if it is new."""
        origin: Any = call
        if isinstance(call, Item) and call.call.origin is not None:
            origin = call.call.origin
        task = self._tasks.get(id(origin))
        if task is not None:
            return task, []
        if len(self._tasks) >= _MOST_CALLS:
            raise SpecError(
                f"more than {_MOST_CALLS:,} calls feed one another: let each call do more, or send them in parts and "
                "keep the values in between with pool.persist(...)"
            )
        item = call if isinstance(call, Item) else self._packer.pack(as_call(call))
        task = self._tasks[id(origin)] = GraphTask(item, f"{item.call.label}-{uuid.uuid4().hex}")
        self._new.append(task)
        self.count += 1
        return task, [task]

    @property
    def has_new(self) -> bool:
        """Whether there are tasks that `take_new` has not returned."""
        return bool(self._new)

    def take_new(self) -> list[GraphTask]:
        """Return the tasks made since the last time."""
        new, self._new = self._new, []
        return new

    def forget(self, origin: int) -> None:
        """Forget a pending call that is gone, before another one may have the same id."""
        self._tasks.pop(origin, None)

    def clear_computed(self) -> None:
        """Let go of Dask's delayed values, which the tasks that were sent need no more."""
        self._computed.clear()

    def clear(self) -> None:
        """Let go of all calls, and with them of their arguments."""
        self._tasks.clear()
        self._computed.clear()


def check_cycles(tasks: Sequence[GraphTask]) -> None:
    """Raise if a call needs itself."""
    checked: set[GraphTask] = set()
    for start in tasks:
        path: dict[GraphTask, Iterator[Any]] = {}
        stack = [start]
        while stack:
            task = stack[-1]
            if task not in path and task not in checked:
                path[task] = iter([need for need in task.needs if isinstance(need, GraphTask)])
            for need in path.get(task, ()):
                if need in path:
                    raise SpecError(f"{need.item.call.label}() needs its own value: calls can't feed one another so")
                if need not in checked:
                    stack.append(need)
                    break
            else:
                checked.add(task)
                path.pop(task, None)
                stack.pop()


def check_future(future: Future[Any], client: Any, label: str) -> None:
    """Raise if a call of this name that runs through `client` can't get the value of `future`."""
    if future.client.status == "closed":
        raise PoolError(f"{label}() can't get {future!r}: its pool is closed")
    if future.client is not client:
        raise SpecError(
            f"{label}() can't get {future!r}, which is on another cluster: fetch it with .result() and pass that, or "
            "run the call in the pool that has the value"
        )
    if future.status == "cancelled":
        raise PoolError(f"{label}() can't get {future!r}: it was cancelled")
