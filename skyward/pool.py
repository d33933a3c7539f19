"""Pools: machines that live as long as a `with` block, and the operators' way to run calls on them.

Imports only calls at the top: specifications are loaded when a pool is made, Dask and the engine when one is entered,
so that ``import skyward`` stays fast.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypedDict, TypeVar, TypeVarTuple, Unpack, overload

from skyward import forks
from skyward.compute import ComputeFunction, PendingBatch, PendingCompute, PendingStream, compute
from skyward.current import enter, leave
from skyward.errors import NoActivePoolError, PoolError, SkywardError, VolumeError, invalid
from skyward.spec.configurable import configurable
from skyward.worker.context import host_of

if TYPE_CHECKING:
    from concurrent.futures import Future

    from distributed import Client

    from skyward import events
    from skyward.accelerators.model import Accelerator
    from skyward.cluster.base import SkyCluster
    from skyward.console.output import Output
    from skyward.engine import Call, Engine
    from skyward.launch.plan import Plan
    from skyward.providers import ProviderLike
    from skyward.session.session import Session
    from skyward.spec.allocation import Allocation
    from skyward.spec.image import Image
    from skyward.spec.instance import Instance
    from skyward.spec.log import LogConfig
    from skyward.spec.volume import Volume


P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class PoolOptions(TypedDict, total=False):
    """The keyword options of `ComputePool`, for those that hand them on."""

    selection: Any
    image: Image | None
    nodes: int
    machine: str | None
    accelerator: str | Accelerator | None
    architecture: Literal["x86_64", "arm64"] | None
    cpu: int | None
    memory: str | int | None
    volume: Volume | Sequence[Volume]
    allocation: str | float | Allocation
    timeout: float
    env: Mapping[str, str] | None
    concurrency: int
    display: Literal["auto", "log", "spinner", "quiet"]
    on_event: events.Callback | None
    collect_metrics: bool
    logging: LogConfig | None
    max_price: float | None
    max_cost: float | None
    idle_timeout: float | None
    boot_timeout: float | None
    heartbeat_timeout: float
    retries: int


_DASHBOARD_S = 10.0
"""Seconds to wait for the dashboard at most. Chosen, not measured: it takes less than one."""


class Slots:
    """Every slot of a pool as a target: ``fn() @ pool.slots``."""

    def __init__(self, pool: ComputePool) -> None:
        self._pool = pool

    def broadcast(self, pending: PendingCompute[R]) -> tuple[R, ...]:
        """Run `pending` once on every slot, started together; return the results by node and slot."""
        return self._pool._broadcast(pending, every_slot=True)


class ComputePool:
    """Machines that exist for as long as a ``with`` block.

    Building one checks every option and starts nothing; entering it brings the machines up, and leaving it, however
    that happens, destroys them. A pool that was left can be entered again.

    Parameters
    ----------
    provider
        Where machines come from: a provider such as ``sky.Local()`` or ``sky.Dask(client)``, or its name.
        None: what is configured, else this machine.
    nodes, concurrency
        Number of machines, and of slots (worker processes, each running one call at a time) on each.
    accelerator
        ``"A100"``, ``"A100:4"`` or an `Accelerator`, for each node.
    timeout
        Seconds from entering until everything is destroyed, whatever happens.
    idle_timeout
        Seconds without a call until everything is destroyed; None: no limit.
    boot_timeout
        Seconds that a cloud's machine may take to get its address, and then to let us in; None: 300, or 1200 for bare
        metal and for types with 8 accelerators or more. Verda's machines have at least 900 for their addresses.
    heartbeat_timeout
        Seconds without a heartbeat from this process after which each machine shuts itself down; at least 10, at most
        `timeout`. Raise it where this computer may sleep or this process may be suspended for longer. Machines are
        billed for that long if this computer fails. Local and joined pools have no heartbeats.
    retries
        How often a call is run again that was lost with its machine or worker process.
    env
        Environment variables of the workers, on top of those of `image`.
    display
        ``"auto"``: a display that moves on a terminal, lines with time stamps elsewhere. ``"log"``: always such lines;
        ``"spinner"``: one line that moves; ``"quiet"``: nothing. What calls print goes to standard output.
    on_event
        Called with every `SkywardEvent`.

    Options whose default is shown as "configured, else" are taken from environment variables and files where they are
    not given: docs/configuration.md says which.

    Raises
    ------
    SpecError
        An option can't work; the message lists every such option, with what would. Or a file of the configuration
        can't be read.
    """

    def __init__(
        self,
        provider: ProviderLike = None,
        *,
        selection: Any = configurable("first"),
        image: Image | None = None,
        nodes: int = 1,
        machine: str | None = None,
        accelerator: str | Accelerator | None = None,
        architecture: Literal["x86_64", "arm64"] | None = None,
        cpu: int | None = None,
        memory: str | int | None = None,
        volume: Volume | Sequence[Volume] = (),
        allocation: str | float | Allocation = configurable("spot-if-available"),
        timeout: float = configurable(3600),
        env: Mapping[str, str] | None = None,
        concurrency: int = 1,
        display: Literal["auto", "log", "spinner", "quiet"] = configurable("auto"),
        on_event: events.Callback | None = None,
        collect_metrics: bool = True,
        logging: LogConfig | None = None,
        max_price: float | None = configurable(None),
        max_cost: float | None = configurable(None),
        idle_timeout: float | None = configurable(None),
        boot_timeout: float | None = configurable(None),
        heartbeat_timeout: float = configurable(120),
        retries: int = configurable(3),
    ) -> None:
        from skyward.config import load
        from skyward.providers import resolve
        from skyward.spec.image import Image
        from skyward.spec.pool import PoolSpec

        settings = load()
        filled, configured = settings.fill(
            {
                "selection": selection,
                "allocation": allocation,
                "timeout": timeout,
                "display": display,
                "max_price": max_price,
                "max_cost": max_cost,
                "idle_timeout": idle_timeout,
                "boot_timeout": boot_timeout,
                "heartbeat_timeout": heartbeat_timeout,
                "retries": retries,
            }
        )
        if provider is None:
            provider = settings.get("provider")
            configured.add("provider")
        with settings.explaining(configured | {"region"}):
            self.provider = resolve(provider, settings.get("region"))
        with settings.explaining(configured):
            # What some of these may be, and what PoolSpec makes of it, are different types.
            self.spec = PoolSpec(
                image=image if image is not None else Image(),
                nodes=nodes,
                machine=machine,
                accelerator=accelerator,  # type: ignore[arg-type]
                architecture=architecture,
                cpu=cpu,
                memory=memory,  # type: ignore[arg-type]
                volume=volume,  # type: ignore[arg-type]
                env=env,
                concurrency=concurrency,
                on_event=on_event,
                collect_metrics=collect_metrics,
                logging=logging,
                **filled,
            )
            for one in self.provider if isinstance(self.provider, tuple) else (self.provider,):
                one.check(self.spec)
        self._handlers: list[events.Callback] = []
        self._lock = threading.RLock()
        self._session: Session | None = None
        self._ended: BaseException | None = None
        self._last_cost = 0.0
        self._loss: VolumeError | None = None  # of which the user has not been told by an exception
        self._output: Output | None = None  # of the last run

    # --- life -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._start()
        enter(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        leave(self)
        try:
            self._stop()
        except VolumeError:
            if exc_info[0] is None:
                raise

    def start(self) -> Self:
        """Do what entering the block does: bring the machines up, and make this the pool that ``>> sky`` means.

        For notebooks, and where a block does not fit. `close` ends it; so does the end of the program. Raises what
        entering raises.
        """
        return self.__enter__()

    def close(self) -> None:
        """Do what leaving the block does: destroy the machines. May be called twice.

        Raises
        ------
        VolumeError
            What was written to a volume could not be sent. The machines are destroyed all the same.
        """
        leave(self)
        self._stop()

    async def __aenter__(self) -> Self:
        import asyncio

        await asyncio.to_thread(self._start)
        enter(self)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        import asyncio

        leave(self)
        try:
            # Shielded: a task that is cancelled must not leave machines behind.
            await asyncio.shield(asyncio.to_thread(self._stop))
        except VolumeError:
            if exc_info[0] is None:
                raise

    def _start(self) -> None:
        with self._lock:
            if self._session is not None:
                raise PoolError("this pool is active already; make a second ComputePool to have another one")
            self._ended = self._loss = None
            self._last_cost = 0.0
            from skyward.session.session import Session

            session = Session(self.spec, self.provider, self.callbacks(), lambda reason: self._end(session, reason))
            self._session = session
            self._output = session.output
            forks.tell(self)
            try:
                session.start()
            except BaseException as exc:
                self._session = None
                try:
                    session.stop(PoolError("the pool did not start"))
                finally:
                    self._last_cost = session.cost
                if isinstance(exc, SkywardError):  # its message says it all; the way it came is ours and long
                    raise exc.with_traceback(None) from exc.__cause__
                raise

    def _stop(self, reason: BaseException | None = None) -> None:
        """End the pool, or with a `reason` end it before its user does, who is told of lost data when they do.

        Raises
        ------
        VolumeError
            What was written to a volume could not be sent. Everything has ended all the same.
        """
        with self._lock:
            session, self._session = self._session, None
            if session is not None:
                self._ended = reason
                try:
                    session.stop(reason or PoolError("the pool is closed"))
                finally:
                    self._last_cost = session.cost
                    self._loss = session.loss
            if reason is None and self._loss is not None:
                loss, self._loss = self._loss, None
                raise loss

    def _end(self, session: Session, reason: BaseException) -> None:
        """End the pool because it has reached a limit, unless its user has ended it, and maybe entered it again."""
        with self._lock:
            if self._session is session:
                self._stop(reason)

    def forked(self) -> None:
        """Leave the pool to the parent of this process, which was forked from it."""
        self._lock = threading.RLock()
        session, self._session = self._session, None
        if session is not None:
            self._ended = PoolError(
                f"this pool belongs to process {os.getppid()}, from which this process was forked. Use it there, or "
                "start this process with multiprocessing's method 'spawn' and open a pool in it."
            )
            session.forked(self._ended)

    def _abandon(self) -> None:
        """Let a start that runs in another thread fail soon. Does not wait for it."""
        session = self._session
        if session is not None:
            session.abandon()

    def _active(self) -> Session:
        session = self._session
        if session is None:
            if self._ended is not None:
                raise self._ended
            raise NoActivePoolError(
                "this pool is not active: its machines exist only inside its `with` block.\n"
                "    with pool:\n"
                "        result = fn(...) >> pool"
            )
        return session

    @property
    def is_active(self) -> bool:
        """Whether the machines are there."""
        return self._session is not None

    # --- running calls --------------------------------------------------------------------------------------

    def run(self, pending: PendingCompute[R]) -> R:
        """Run one call on one worker and return its value; the same as ``pending >> pool``."""
        from skyward.engine.run import run_one

        value: R = run_one(self.engine, _call(pending))
        return value

    def run_batch(self, batch: PendingBatch[*Ts]) -> tuple[*Ts]:
        """Run calls in parallel and return their values in order; the same as ``batch >> pool``."""
        from skyward.engine.run import run_all

        calls = [_call(p) for p in batch.calls]
        values: Any = run_all(self.engine, calls, return_exceptions=batch.return_exceptions)
        return values  # type: ignore[no-any-return]

    def run_stream(self, stream: PendingStream[R]) -> Iterator[R]:
        """Yield values while calls are taken from an iterable only as fast as slots get free."""
        from skyward.engine.run import stream as run_stream

        return run_stream(
            self.engine,
            map(_call, stream.calls),
            ordered=stream.ordered,
            return_exceptions=stream.return_exceptions,
        )

    def broadcast(self, pending: PendingCompute[R]) -> tuple[R, ...]:
        """Run a call once on every node, started together; the same as ``pending @ pool``."""
        return self._broadcast(pending, every_slot=False)

    def _broadcast(self, pending: PendingCompute[R], *, every_slot: bool) -> tuple[R, ...]:
        return tuple(self.engine.broadcast(_call(pending), every_slot=every_slot))

    def submit(self, pending: PendingCompute[R]) -> Future[R]:
        """Start a call and return its future at once. Cancelling the future ends the call, even a running one."""
        return self.engine.submit(_call(pending))

    @overload
    def map(self, fn: ComputeFunction[..., R], *iterables: Iterable[Any]) -> Iterator[R]: ...
    @overload
    def map(self, fn: Callable[..., R], *iterables: Iterable[Any]) -> Iterator[R]: ...
    def map(self, fn: Any, *iterables: Iterable[Any]) -> Iterator[Any]:
        """Yield ``fn(*args)`` for the items of `iterables` in step, in order, as slots get free.

        The iterables are read only a little ahead of what has been yielded.
        """
        function: ComputeFunction[..., Any] = fn if isinstance(fn, ComputeFunction) else compute(fn)
        calls = (function(*args) for args in zip(*iterables, strict=False))
        return self.run_stream(PendingStream(calls))

    @property
    def slots(self) -> Slots:
        """The target for a broadcast to every slot: ``fn() @ pool.slots``."""
        return Slots(self)

    # --- looking in -----------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine that runs this pool's calls, for backends."""
        return _started(self._active().engine)

    @property
    def client(self) -> Client:
        """A `distributed.Client` of the pool's Dask cluster."""
        return _started(self._active().client)

    @property
    def cluster(self) -> SkyCluster:
        """The pool's Dask cluster, a `distributed.deploy.Cluster`."""
        return _started(self._active().cluster)

    @property
    def _known_cluster(self) -> SkyCluster | None:
        session = self._session
        return session.cluster if session is not None else None

    @property
    def dashboard_link(self) -> str:
        """URL of the Dask dashboard, which comes up a moment after the pool: this waits for it."""
        self.cluster.has_dashboard.wait(_DASHBOARD_S)
        return str(self.cluster.dashboard_link)

    @property
    def total_slots(self) -> int:
        """How many calls can run at once, now."""
        return self.engine.slots

    @property
    def instance_count(self) -> int:
        """Number of nodes that are there now; 0 outside the block."""
        return len(self.instances)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The nodes that are there now, in order; empty outside the block."""
        cluster = self._known_cluster
        if cluster is None:
            return ()
        from skyward.spec.instance import Instance

        hosts = {slot.node: slot.address for slot in reversed(cluster.slots())}

        def instance(node: int) -> Instance:
            machine = cluster.machine(node)
            facts = ("instance_type", "region", "zone", "price", "price_on_demand", "launched")
            return Instance(
                id=cluster.instance_id(node),
                provider=machine.provider if machine else self.provider.name,  # type: ignore[union-attr]  # no cloud
                spot=machine.spot if machine else False,
                private_ip=host_of(hosts[node]),
                public_ip=machine.public_ip if machine else None,
                node=node,
                metadata={f: v for f in facts if (v := getattr(machine, f, None)) is not None},
            )

        return tuple(map(instance, sorted(hosts)))

    def plan(self) -> Plan:
        """Return what would be launched and at which price, launching nothing. Shown as a table.

        Raises
        ------
        SpecError
            The provider is no cloud: its machines are there already.
        NoAvailableProviderError
            No cloud offers what is needed; the message has the nearest.
        CredentialsError, ProviderError, AllProvidersFailedError
            The clouds could not be asked.
        """
        from skyward.launch.plan import make_plan

        if not isinstance(self.provider, tuple):
            accepted = "sky.AWS(), sky.DigitalOcean(), sky.Verda() or several of them, for a pool with a plan"
            raise invalid("provider", self.provider, accepted)
        return make_plan(self.provider, self.spec)

    @property
    def cost(self) -> float:
        """What the pool's machines have cost since it was entered, in USD; 0 where they are no cloud's.

        Counted from prices that were known at the launch; disks, addresses and traffic are not in it.
        """
        session = self._session
        return session.cost if session is not None else self._last_cost

    def scale(self, nodes: int) -> None:
        """Grow or shrink to `nodes` nodes. Returns at once; calls on a removed node are run again elsewhere."""
        self.cluster.scale(nodes)

    def adapt(self, minimum: int, maximum: int) -> None:
        """Keep between `minimum` and `maximum` nodes from now on, as many as waiting calls can use."""
        self.cluster.adapt(minimum=minimum, maximum=maximum)

    def logs(self, node: int | None = None) -> list[str]:
        """Return the last lines that calls have printed, of one node or all; kept until the pool is entered again."""
        return self._output.lines(node) if self._output is not None else []

    def on(self, event_type: type[Any], handler: Callable[[Any], None]) -> None:
        """Call `handler` with every event of `event_type` from now on."""

        def only(event: events.SkywardEvent) -> None:
            if isinstance(event, event_type):
                handler(event)

        self._handlers.append(only)
        if self._session is not None:
            self._session.listen(only)

    def __repr__(self) -> str:
        state, size = self._state()
        return f"<ComputePool {state}: {size}>"

    def _state(self) -> tuple[str, str]:
        """Return whether the pool is active, and what it has been asked for."""
        from skyward.console.model import PoolInfo
        from skyward.providers import provider_names

        state = "active" if self.is_active else "not active"
        return state, str(PoolInfo("", self.spec.nodes, self.spec.slots_per_node, provider_names(self.provider)))

    def _repr_html_(self) -> str:
        from skyward.console.notebook import pool_html

        cluster = self._known_cluster
        title = [type(self).__name__, *self._state()]
        if cluster is None:  # not active, or about to be
            return pool_html(title, cost=self.cost)
        instances = self.instances
        missing = len(getattr(cluster, "plan", instances)) - len(instances)  # a joined cluster has no plan
        if missing > 0:
            title.append(f"{missing} not there now")
        # Not by way of `dashboard_link`, which waits for it.
        link = str(cluster.dashboard_link)
        return pool_html(title, instances=instances, states=self._node_states(), cost=self.cost, link=link)

    def _node_states(self) -> dict[int, str]:
        """Return what is to be said of each node that is there: ready, or how many of its slots are."""
        there = Counter(slot.node for slot in self.cluster.slots())
        most = self.spec.slots_per_node
        return {node: "ready" if n >= most else f"{n} of {most} slots ready" for node, n in there.items()}

    def callbacks(self) -> list[events.Callback]:
        """Return who hears of this pool's events: `on_event`, and what `on` has added."""
        return [*([self.spec.on_event] if self.spec.on_event is not None else []), *self._handlers]


def _started(part: R | None) -> R:
    """Return a part of the session, which another thread may still be starting."""
    if part is None:
        raise NoActivePoolError("this pool is still starting: it can be used when entering its `with` block has ended")
    return part


def _call(pending: PendingCompute[Any]) -> Call:
    from skyward.engine import Call

    return Call(
        pending.fn, pending.args, pending.kwargs, retries=pending.retries, timeout=pending.timeout
    )


# --- @sky.pool ----------------------------------------------------------------------------------------------


class _PoolDecorator:
    """What ``sky.pool(...)`` returns: wraps a function so that a pool is there around each run of its body."""

    def __init__(self, provider: ProviderLike, options: PoolOptions) -> None:
        self._make = functools.partial(ComputePool, provider, **options)
        self._make()  # bad options are found where they are written, not at the first call

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]: ...
    def __call__(self, fn: Callable[P, Any]) -> Callable[P, Any]:
        if inspect.iscoroutinefunction(fn):

            @functools.wraps(fn)
            async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                async with self._make():
                    return await fn(*args, **kwargs)

            return run_async

        @functools.wraps(fn)
        def run(*args: P.args, **kwargs: P.kwargs) -> Any:
            with self._make():
                return fn(*args, **kwargs)

        return run


def pool(provider: ProviderLike = None, **options: Unpack[PoolOptions]) -> _PoolDecorator:
    """Return a decorator that provisions a pool around each call of the function.

    Takes the options of `ComputePool`. Inside the function, ``sky`` is the pool: ``train(0.1) >> sky``.

    Examples
    --------
    >>> import skyward as sky
    >>> @sky.compute
    ... def double(x: int) -> int:
    ...     return 2 * x
    >>> @sky.pool("local", display="quiet")
    ... def main() -> int:
    ...     return double(21) >> sky
    >>> main()
    42
    """
    if inspect.isroutine(provider):
        raise TypeError("@sky.pool needs parentheses: @sky.pool() or @sky.pool(provider=..., nodes=...)")
    return _PoolDecorator(provider, options)
