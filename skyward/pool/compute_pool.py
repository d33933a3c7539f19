"""A pool: machines that live as long as a `with` block, and the operators' way to run calls on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, TypeVarTuple, overload

from skyward.compute import (
    ComputeFunction,
    PendingBatch,
    PendingCompute,
    PendingGenerator,
    PendingStream,
    compute,
    one_value,
)
from skyward.current import enter, leave
from skyward.errors import NoActivePoolError, VolumeError, invalid
from skyward.pool.lifecycle import Lifecycle
from skyward.pool.options import read_options
from skyward.spec.configurable import configurable

if TYPE_CHECKING:
    from concurrent.futures import Future

    from distributed import Client

    from skyward import events
    from skyward.accelerators.model import Accelerator
    from skyward.cluster.base import SkyCluster
    from skyward.engine import Call, Engine
    from skyward.engine.persisted import Persisted
    from skyward.launch.plan import Plan
    from skyward.providers import ProviderLike, Resolved
    from skyward.spec.allocation import Allocation
    from skyward.spec.image import Image
    from skyward.spec.instance import Instance
    from skyward.spec.log import LogConfig
    from skyward.spec.pool import PoolSpec
    from skyward.spec.volume import Volume


R = TypeVar("R")
Ts = TypeVarTuple("Ts")

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

    Creating a pool only validates its options. Entering it starts the machines, and leaving it, for whatever reason,
    destroys them. You can enter a pool again.

    Parameters
    ----------
    provider
        Where machines come from: a provider such as ``sky.Local()`` or ``sky.Dask(client)``, or its name.
        None: the configured provider, else this machine.
    nodes, concurrency
        Number of machines, and of slots (worker processes, each running one call at a time) on each.
    accelerator
        ``"A100"``, ``"A100:4"`` or an `Accelerator`, for each node.
    timeout
        Seconds after entering the pool when everything is destroyed.
    idle_timeout
        Seconds without a call after which everything is destroyed; None: no limit.
    boot_timeout
        Seconds in which a cloud machine must get its address, and again in which it must then accept SSH; None: 300, or
        1200 for bare metal and for types with 8 accelerators or more. Verda's machines have at least 900 for their
        addresses.
    heartbeat_timeout
        Seconds without a heartbeat from this process after which each machine shuts itself down; at least 10, at most
        `timeout`. Raise it if this computer may sleep or this process may be suspended for longer. If this computer
        fails, machines are billed for that long. Local and joined pools have no heartbeats.
    retries
        How often a call that was lost with its machine or worker process runs again, and how often in a row the Dask
        scheduler may be lost without a call that ends in between.
    env
        Environment variables of the workers, in addition to those of `image`.
    display
        ``"auto"``: a live display on a terminal, lines with timestamps elsewhere. ``"log"``: always such lines;
        ``"spinner"``: one moving line; ``"quiet"``: nothing. The output of calls goes to standard output and standard
        error.
    on_event
        Called with every `SkywardEvent`.

    If you omit an option whose default is shown as "configured, else", its value comes from environment variables and
    files: see docs/configuration.md.

    Raises
    ------
    SpecError
        An option is invalid; the message lists all invalid options and what is expected. Or a configuration file can't
        be read.
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
        self.provider: Resolved
        self.spec: PoolSpec
        self.provider, self.spec = read_options(
            provider, selection=selection, image=image, nodes=nodes, machine=machine, accelerator=accelerator,
            architecture=architecture, cpu=cpu, memory=memory, volume=volume, allocation=allocation, timeout=timeout,
            env=env, concurrency=concurrency, display=display, on_event=on_event, collect_metrics=collect_metrics,
            logging=logging, max_price=max_price, max_cost=max_cost, idle_timeout=idle_timeout,
            boot_timeout=boot_timeout, heartbeat_timeout=heartbeat_timeout, retries=retries,
        )  # fmt: skip
        self._life = Lifecycle(self.spec, self.provider, [] if self.spec.on_event is None else [self.spec.on_event])

    # --- life -----------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the machines and make this the current pool for ``>> sky`` and Dask, as entering the block does.

        Use this in notebooks, or where a block does not fit. The pool ends with `close`, or with the program.
        Raises the same errors as entering.
        """
        self._life.start()
        self._use()
        return self

    def close(self) -> None:
        """Destroy the machines, as leaving the block does. May be called twice.

        If another thread is starting the pool, that start fails with a `PoolError`.

        Raises
        ------
        VolumeError
            Data written to a volume could not be uploaded. The machines are destroyed anyway.
        """
        self._unuse()
        self._life.end()

    def _use(self) -> None:
        """Make this the current pool, and its client Dask's default, in the caller's context."""
        self._life.make_default()
        enter(self)

    def _unuse(self) -> None:
        leave(self)
        self._life.restore_default()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.close()
        except VolumeError:
            if exc_info[0] is None:
                raise

    async def __aenter__(self) -> Self:
        await self._life.start_async()
        self._use()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._unuse()
        try:
            await self._life.end_async()
        except VolumeError:
            if exc_info[0] is None:
                raise

    @property
    def is_active(self) -> bool:
        """Whether the pool's machines are up."""
        return self._life.is_active

    # --- running calls --------------------------------------------------------------------------------------

    def run(self, pending: PendingCompute[R]) -> R:
        """Run one call on one worker and return its value; the same as ``pending >> pool``.

        If the call is of a generator function, return an iterator over its values, which arrive while it runs.
        """
        from skyward.engine.run import run_generator, run_one

        run: Any = run_generator if type(pending) is PendingGenerator else run_one
        value: R = run(self.engine, _call(pending))
        return value

    def run_batch(self, batch: PendingBatch[*Ts]) -> tuple[*Ts]:
        """Run calls in parallel and return their values in order; the same as ``batch >> pool``."""
        from skyward.engine.calls import as_call
        from skyward.engine.run import run_all

        calls = [as_call(p) for p in batch.calls]
        values: Any = run_all(self.engine, calls, return_exceptions=batch.return_exceptions)
        return values  # type: ignore[no-any-return]

    def run_stream(self, stream: PendingStream[R]) -> Iterator[R]:
        """Yield values; calls are taken from the iterable only as slots become free."""
        from skyward.engine.calls import as_call
        from skyward.engine.run import stream as run_stream

        calls = map(as_call, stream.calls)
        return run_stream(self.engine, calls, ordered=stream.ordered, return_exceptions=stream.return_exceptions)

    def broadcast(self, pending: PendingCompute[R]) -> tuple[R, ...]:
        """Run a call once on every node, started together; the same as ``pending @ pool``."""
        return self._broadcast(pending, every_slot=False)

    def _broadcast(self, pending: PendingCompute[R], *, every_slot: bool) -> tuple[R, ...]:
        call = _call(one_value(pending))
        return tuple(self.engine.broadcast(call, every_slot=every_slot))

    def submit(self, pending: PendingCompute[R]) -> Future[R]:
        """Start a call and return its future at once. Cancelling the future interrupts the call if it is running."""
        call = _call(one_value(pending))
        return self.engine.submit(call)

    @overload
    def persist(self, pending: PendingCompute[R]) -> Persisted[R]: ...
    @overload
    def persist(self, pending: PendingBatch[*tuple[R, ...]]) -> tuple[Persisted[R], ...]: ...
    def persist(self, pending: Any) -> Any:
        """Start a call whose value stays on the cluster, and return its future at once; a batch gives a tuple.

        Pass the future to other calls as an argument: they get the value, from worker to worker. It is dropped when
        nothing refers to the future, and computed again when it was lost with its machine.

        Raises
        ------
        TypeError
            `pending` is neither a call nor a batch.
        SerializationError
            A function or an argument can't be pickled.
        SpecError
            The calls can't feed one another; nothing runs.
        """
        if isinstance(pending, PendingCompute):
            call = _call(one_value(pending))
            return self.engine.persist([call])[0]
        if not isinstance(pending, PendingBatch):
            raise TypeError(f"persist() takes a call or a batch, such as gather(...), not a {type(pending).__name__}")
        if pending.return_exceptions:
            raise invalid("return_exceptions", True, "False: a call that fails has no value to keep")
        return tuple(self.engine.persist([_call(call) for call in pending.calls]))

    @overload
    def map(self, fn: ComputeFunction[..., R], *iterables: Iterable[Any]) -> Iterator[R]: ...
    @overload
    def map(self, fn: Callable[..., R], *iterables: Iterable[Any]) -> Iterator[R]: ...
    def map(self, fn: Any, *iterables: Iterable[Any]) -> Iterator[Any]:
        """Yield ``fn(*args)`` for the items of `iterables`, like `map`, in order, as slots become free.

        The iterables are read only a little ahead of what has been yielded.
        """
        function: ComputeFunction[..., Any] = fn if isinstance(fn, ComputeFunction) else compute(fn)
        calls = (one_value(function(*args)) for args in zip(*iterables, strict=False))
        return self.run_stream(PendingStream(calls))

    @property
    def slots(self) -> Slots:
        """The target for a broadcast to every slot: ``fn() @ pool.slots``."""
        return Slots(self)

    # --- looking in -----------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine that runs this pool's calls, for backends."""
        return _started(self._life.session.engine)

    @property
    def client(self) -> Client:
        """A `distributed.Client` of the pool's Dask cluster; inside the block it is Dask's default client."""
        return _started(self._life.session.client)

    @property
    def cluster(self) -> SkyCluster:
        """The pool's Dask cluster, a `distributed.deploy.Cluster`."""
        return _started(self._life.session.cluster)

    @property
    def dashboard_link(self) -> str:
        """URL of the Dask dashboard. Waits for the dashboard, which starts a moment after the pool."""
        self.cluster.has_dashboard.wait(_DASHBOARD_S)
        return str(self.cluster.dashboard_link)

    @property
    def total_slots(self) -> int:
        """How many calls can run at once, now."""
        return self.engine.slots

    @property
    def instance_count(self) -> int:
        """Current number of nodes; 0 outside the block."""
        return len(self.instances)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The current nodes, in order; empty outside the block."""
        cluster = self._life.cluster
        if cluster is None:
            return ()
        from skyward.pool.instances import instances

        return instances(cluster, self.provider)

    def plan(self) -> Plan:
        """Return what the pool would launch and install, and at which price, without launching it. Printed as a table.

        Raises
        ------
        SpecError
            The provider is not a cloud: its machines already exist. Or the image can't work with this environment.
        NoAvailableProviderError
            No cloud has a matching offer; the message lists the nearest ones.
        CredentialsError, ProviderError, AllProvidersFailedError
            The clouds could not be asked.
        """
        from skyward.launch.plan import pool_plan

        if not isinstance(self.provider, tuple):
            accepted = "sky.AWS(), sky.DigitalOcean(), sky.Verda() or several of them, for a pool with a plan"
            raise invalid("provider", self.provider, accepted)
        return pool_plan(self.provider, self.spec)

    @property
    def cost(self) -> float:
        """What the pool's machines have cost since it was entered, in USD; 0 without cloud machines.

        Counted with the prices at launch, without disks, addresses and traffic.
        """
        return self._life.cost

    def scale(self, nodes: int) -> None:
        """Grow or shrink to `nodes` nodes. Returns at once; calls on a removed node run again elsewhere."""
        self.cluster.scale(nodes)

    def adapt(self, minimum: int, maximum: int) -> None:
        """Keep between `minimum` and `maximum` nodes from now on, as many as waiting calls can use."""
        self.cluster.adapt(minimum=minimum, maximum=maximum)

    def logs(self, node: int | None = None) -> list[str]:
        """Return the last lines that calls printed, on one node or all; kept until the pool is entered again."""
        output = self._life.output
        return output.lines(node) if output is not None else []

    def on(self, event_type: type[Any], handler: Callable[[Any], None]) -> None:
        """Call `handler` with every event of `event_type` from now on."""

        def only(event: events.SkywardEvent) -> None:
            if isinstance(event, event_type):
                handler(event)

        self._life.listen(only)

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
        from skyward.pool.notebook import html

        title, slots = [type(self).__name__, *self._state()], self.spec.slots_per_node
        return html(title, self._life.cluster, self.instances, slots_per_node=slots, cost=self.cost)


def bring_up(pool: ComputePool) -> None:
    """Start a pool without making it the current one. `ComputePool.close` ends it."""
    pool._life.start()


def _started(part: R | None) -> R:
    """Return a part of the session, which another thread may still be starting."""
    if part is None:
        raise NoActivePoolError("this pool is still starting: it can be used when entering its `with` block has ended")
    return part


def _call(pending: PendingCompute[Any]) -> Call:
    from skyward.engine.calls import as_call

    return as_call(pending)
