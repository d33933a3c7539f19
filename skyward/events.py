"""What happens to a pool, as values: one frozen dataclass per kind of event, and ways to hear of them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, TypeAlias

from skyward import user_errors

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class InfraCreating:
    """The pool has begun to request resources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InfraCreated:
    """Networks, keys and groups exist."""

    region: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLaunching:
    """`count` machines were requested."""

    count: int
    instance_type: str
    provider: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceProvisioned:
    """A machine was launched. Prices are in USD per hour."""

    instance_id: str
    node: int
    spot: bool
    provider: str
    ip: str | None = None
    instance_type: str | None = None
    price_on_demand: float | None = None
    price_spot: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisioningCompleted:
    """All machines are launched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionAutoSelected:
    """A region with available machines was chosen."""

    region: str
    provider: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapStarting:
    """A machine is being prepared."""

    instance_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapProgress:
    """A step of the preparation has begun."""

    instance_id: str
    step: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapCompleted:
    """A machine is prepared."""

    instance_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSetupCompleted:
    """Scheduler and workers are up and connected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStarted:
    """The pool takes calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPoolInitCompleted:
    """The engine knows its slots."""

    slots: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The load of a machine. GPU values are None without a GPU; temperature is in degrees Celsius."""

    instance_id: str
    node: int
    cpu_percent: float
    memory_percent: float
    memory_used_mb: float
    memory_total_mb: float
    gpu_utilization: float | None = None
    gpu_memory_used_mb: float | None = None
    gpu_memory_total_mb: float | None = None
    gpu_temperature: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A line that a call, or a program that it runs, has printed.

    `timestamp` is in seconds since the epoch, by the worker's clock; `stream` is the stream that it was printed to.
    """

    node: int
    instance_id: str
    line: str
    timestamp: float
    stream: Literal["stdout", "stderr"] = "stdout"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStopping:
    """A machine is being destroyed."""

    instance_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLost:
    """A machine was lost."""

    instance_id: str
    node: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceReplaced:
    """A new machine has replaced a lost one."""

    instance_id: str
    node: int
    replaced_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerMoved:
    """The Dask scheduler was lost, and node `node` has another one. `reason`: why the last one was lost."""

    instance_id: str
    node: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStopping:
    """The pool is shutting down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostUpdate:
    """The pool's cost so far in USD, and its rate in USD per hour."""

    elapsed_seconds: float
    accumulated_cost: float
    hourly_rate: float
    spot_count: int
    ondemand_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CostFinal:
    """The pool's total cost in USD; `savings_vs_ondemand` is the saving by spot machines."""

    total_cost: float
    total_seconds: float
    hourly_rate: float
    spot_count: int
    ondemand_count: int
    savings_vs_ondemand: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProgress:
    """`done` of `total` calls have ended, `failed` of them with an exception. Emitted at most four times a second.

    Counts all calls until none is left: then `done` equals `total`, and later calls count from 0 again. `total` is None
    while calls still come from a generator. A joblib task and a broadcast count as one call each; cancelled calls don't
    count.
    """

    done: int
    total: int | None = None
    failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """Something failed, on a machine if `instance_id` is set."""

    message: str
    instance_id: str | None = None


SkywardEvent: TypeAlias = (
    InfraCreating
    | InfraCreated
    | InstanceLaunching
    | InstanceProvisioned
    | ProvisioningCompleted
    | RegionAutoSelected
    | BootstrapStarting
    | BootstrapProgress
    | BootstrapCompleted
    | ClusterSetupCompleted
    | PoolStarted
    | TaskPoolInitCompleted
    | Metrics
    | LogLine
    | InstanceStopping
    | InstanceLost
    | InstanceReplaced
    | SchedulerMoved
    | PoolStopping
    | CostUpdate
    | CostFinal
    | TaskProgress
    | Error
)
"""Any event of a pool."""

Callback: TypeAlias = Callable[[SkywardEvent], SkywardEvent | Sequence[SkywardEvent] | None]
"""Hears of events; those that it returns are emitted too."""

_MOST_ANSWERS = 500  # to one event, and to its answers, and so on; chosen, not measured: beyond this it is a circle


def _events_of(answer: object) -> list[SkywardEvent]:
    """Return the events in what a callback has returned. A lambda may return anything: the rest is ignored."""
    answers = answer if isinstance(answer, Sequence) else (answer,)
    return [a for a in answers if isinstance(a, SkywardEvent)]


class _Listener:
    """A callback, and whether a failure of it was logged."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback
        self._failed = False

    def hear(self, event: SkywardEvent) -> list[SkywardEvent]:
        try:
            return _events_of(self._callback(event))
        except BaseException as exc:  # whatever a user's callback raises: it must not end a run that it only watches
            if user_errors.ends_program(exc):
                raise
            if not self._failed:
                self._failed = True
                user_errors.log(
                    logger, "callback %r failed at %r; further failures of it are not logged", self._callback, event
                )
            return []


class _Chain:
    """An event from outside and all that answers it."""

    def __init__(self) -> None:
        self.answers = 0
        self.is_cut = False


class _Emitter:
    """Brings events to callbacks, one at a time and in order, from whatever thread they come."""

    def __init__(self, *listeners: _Listener) -> None:
        self._listeners = listeners
        self._lock = threading.Lock()
        self._waiting: deque[tuple[SkywardEvent, _Chain]] = deque()
        self._delivering = False

    @property
    def is_heard(self) -> bool:
        return bool(self._listeners)

    def add(self, callback: Callback) -> None:
        """Let `callback` hear of what is emitted from now on."""
        self._listeners = (*self._listeners, *_listeners(callback))

    def emit(self, event: SkywardEvent) -> None:
        """Deliver `event`, and before this returns whatever answers it.

        While another thread delivers (or a callback emits from within), the event is left to that one.
        """
        with self._lock:
            self._waiting.append((event, _Chain()))
            if self._delivering:
                return
            self._delivering = True
        try:
            while (item := self._next()) is not None:
                for listener in self._listeners:
                    self._queue(listener.hear(item[0]), item[1])
        except BaseException:  # Ctrl-C in a callback: the next event must be delivered all the same
            with self._lock:
                self._delivering = False
            raise

    def _next(self) -> tuple[SkywardEvent, _Chain] | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._delivering = False  # under the same lock as the look, or an event could be left behind
            return None

    def _queue(self, answers: list[SkywardEvent], chain: _Chain) -> None:
        taken = answers[: _MOST_ANSWERS - chain.answers]
        chain.answers += len(taken)
        if len(taken) < len(answers) and not chain.is_cut:
            chain.is_cut = True
            logger.error("callbacks emit events endlessly; %r and later ones are dropped", answers[len(taken)])
        with self._lock:
            self._waiting.extend((answer, chain) for answer in taken)


class _Composed:
    """Several callbacks in one. An emitter takes it apart, so that one that raises does not silence the others."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = tuple(part for callback in callbacks for part in _parts(callback))

    def __call__(self, event: SkywardEvent) -> list[SkywardEvent]:
        return [answer for callback in self.callbacks for answer in _events_of(callback(event))]


def _parts(callback: Callback) -> tuple[Callback, ...]:
    return callback.callbacks if isinstance(callback, _Composed) else (callback,)


def _listeners(*callbacks: Callback) -> tuple[_Listener, ...]:
    return tuple(_Listener(part) for callback in callbacks for part in _parts(callback))


_installed: ContextVar[tuple[_Listener, ...]] = ContextVar("skyward_callbacks", default=())


def emitter(*callbacks: Callback) -> _Emitter:
    """Return an emitter to `callbacks` and to those that `use_callback` has installed here."""
    return _Emitter(*_listeners(*callbacks), *_installed.get())


def compose(*callbacks: Callback) -> Callback:
    """Return one callback that calls all `callbacks` in order; events that they return are emitted."""
    return _Composed(callbacks)


def emit(event: SkywardEvent) -> None:
    """Send `event` to the callbacks that `use_callback` has installed here."""
    emitter().emit(event)


@contextmanager
def use_callback(callback: Callback) -> Iterator[None]:
    """Call `callback` with the events of `emit` and of all pools that are entered inside the block."""
    token = _installed.set((*_installed.get(), *_listeners(callback)))
    try:
        yield
    finally:
        _installed.reset(token)
