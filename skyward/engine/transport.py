"""The engine's way to the cluster and back: chunks go to workers, are ended there, large buffers are scattered.

A chunk for a certain worker goes to it directly, or through the scheduler where the caller does not reach workers: a
Dask task takes ten times as long. It is a task where the scheduler chooses the worker.

Used in the event loop of the Dask client only.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

import dask
from distributed.comm import CommClosedError

from skyward.engine.delivery import Delivery
from skyward.engine.direct import Direct
from skyward.engine.indirect import Indirect
from skyward.engine.store import Store
from skyward.scheduler.losses import LOSSES
from skyward.transfer.wire import INTERRUPT, KEEP, KILL, LEAVE, RUN, TAKE_BACK, VALUES, Chunk, Outcome, Outcomes
from skyward.worker import handlers, interrupts, ranks, runtime
from skyward.worker.graph import KEY

logger = logging.getLogger(__name__)

_CONNECTED_OR_CONNECTING = ("running", "connecting")
"""States of a client that has a scheduler, or looks for one."""
_LOOK_S = 0.05
_SILENT_S = 10.0
"""Seconds that a worker has to answer when a call is interrupted. Chosen: a busy link takes one or two."""
_LOST_S = 10.0
"""Seconds until a scheduler whose connections are broken is known to be lost. Chosen, not measured: usually one."""


class WorkerGoneError(Exception):
    """The worker process that had the chunk has ended. `address` and `name` are Dask's, as far as they are known."""

    def __init__(self, address: str, name: str | None = None) -> None:
        super().__init__(address)
        self.address = address
        self.name = name


def _worker_gone(error: Any) -> WorkerGoneError:
    """Return what Dask's `KilledWorker` says."""
    worker = getattr(error, "last_worker", None)
    return WorkerGoneError(getattr(worker, "address", ""), getattr(worker, "name", None))


class UnreachableError(Exception):
    """The chunk has not reached its worker."""


class Transport:
    """Sends chunks through one Dask client. `direct`: the caller reaches workers without the scheduler's help.

    Otherwise `measured` hears of the seconds that a round trip to the scheduler takes.
    `has_slots` waits for a worker; False: none is needed any more.
    `on_output` hears, in the loop, what tasks have printed, before their outcomes are returned.
    """

    def __init__(
        self,
        client: Any,
        store: Store,
        has_slots: Callable[[], Awaitable[bool]],
        *,
        direct: bool,
        on_output: Callable[[Any], None] = lambda _: None,
        measured: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.client = client
        self._workers: Direct | Indirect = Direct(client) if direct else Indirect(client, measured)
        self._on_output = on_output
        self._store = store
        self._has_slots = has_slots
        self._scattered: dict[str, asyncio.Task[Any]] = {}
        self.streams_topic: str = f"skyward-streams-{client.id}"  # of Dask's events, where generators begin
        self._streams: dict[str, Callable[[str], None]] = {}
        self.delivery: Delivery = Delivery(store, self._send)
        self.scheduler_losses: int = 0

    def open(self) -> None:
        """Connect ahead of the first request."""
        if isinstance(self._workers, Indirect):
            self._workers.open()

    def lose_scheduler(self) -> None:
        """Take note that the scheduler is lost, and with it all that was scattered; another one comes."""
        self.scheduler_losses += 1
        self._scattered.clear()

    async def _is_lost_since(self, losses: int, error: Exception) -> bool:
        """Tell whether the scheduler has been lost since there were so many losses.

        A connection that breaks is the first sign of that, so the answer takes a moment after such an `error`.
        """
        looks = _LOST_S / _LOOK_S if isinstance(error, OSError) else 0
        while self.scheduler_losses == losses and self.client.status in _CONNECTED_OR_CONNECTING and looks > 0:
            await asyncio.sleep(_LOOK_S)
            looks -= self.client.status == "running"  # otherwise the client waits for another one, too
        return self.scheduler_losses != losses

    async def until_slots(self) -> bool:
        """Wait until there is a worker, if one is to come. False: none is needed any more, or there is none."""
        while not await self._has_slots():
            if not self.scheduler_losses or self.client.status not in _CONNECTED_OR_CONNECTING:
                return False
            await asyncio.sleep(_LOOK_S)  # they come to the next scheduler
        return True

    async def prepare(self, chunk: Chunk, node: int, address: str) -> None:
        """Bring the large buffers that a chunk needs to the node of the worker that it is for.

        Raises
        ------
        UnreachableError
            One did not arrive.
        """
        self.forget_dropped()
        if digests := chunk.not_in_files():
            try:
                await self.delivery.bring(digests, node, address)
            except OSError as exc:
                raise UnreachableError(address) from exc

    async def arguments(self, chunk: Chunk) -> list[Any]:
        """Return the chunk and the futures of those large buffers that lie on the cluster rather than in files."""
        digests = chunk.not_in_files()
        self.forget_dropped()
        for digest in digests:
            if digest not in self._scattered or self._scattered[digest].cancelled():
                # Stored before the wait, so that the next chunk waits for the same transfer.
                self._scattered[digest] = asyncio.ensure_future(self._scatter(digest))
        return [chunk, *[await self._scattered[d] for d in digests]]

    async def _scatter(self, digest: str) -> Any:
        while True:
            losses = self.scheduler_losses
            if not await self.until_slots():  # Dask's scatter fails when there is no worker
                raise asyncio.CancelledError
            try:
                (future,) = await self.client._scatter([self._store.data(digest)], hash=False)
                return future
            except Exception as exc:  # Dask's, of several kinds
                if not await self._is_lost_since(losses, exc):
                    raise

    def forget_dropped(self) -> None:
        """Remove from the cluster what the store has dropped."""
        dropped = self._store.take_dropped()
        for digest in dropped:
            self._scattered.pop(digest, None)
        self.delivery.drop(dropped)

    def lose(self, digests: set[str]) -> bool:
        """Forget the copies of large buffers on the cluster, and tell whether there were any; new ones are made."""
        lost = [digest for digest in digests if self._scattered.pop(digest, None) is not None]
        return bool(lost)

    async def send(self, address: str, chunk: Chunk, when_sent: Callable[[], None]) -> Outcomes:
        """Run a chunk on one worker, and tell when it is on its way there. Cancelling this does not end the chunk.

        Raises
        ------
        WorkerGoneError
            The worker has ended, or can't be reached any more.
        UnreachableError
            It could not be reached in the first place.
        """
        try:
            answer = await self._send(address, RUN, when_sent, chunk=pickle.dumps(chunk, 5))
        except CommClosedError as exc:
            raise WorkerGoneError(address) from exc
        except OSError as exc:
            raise UnreachableError(address) from exc
        return self._heard(_unpacked(answer))

    async def values(self, address: str, key: str, received: int, consumed: int) -> list[Outcome]:
        """Return values of a generator that runs on a worker; none if there is none within some seconds."""
        answer = await self._send(address, VALUES, key=key, received=received, consumed=consumed)
        return [] if answer is None else _unpacked(answer).items

    def when_begun(self, key: str, tell: Callable[[str], None] | None) -> None:
        """Call `tell` with the address of the worker where the generator `key` begins, as a Dask task. None: do not."""
        if tell is None:
            self._streams.pop(key, None)
            return
        self._streams[key] = tell
        if self.streams_topic not in self.client._event_handlers:
            self.client.subscribe_topic(self.streams_topic, self._begun)

    def _begun(self, event: tuple[float, dict[str, str]]) -> None:
        if (tell := self._streams.get(event[1]["key"])) is not None:
            tell(event[1]["address"])

    def _heard(self, outcomes: Outcomes) -> Outcomes:
        if outcomes.output is not None:
            self._on_output(outcomes.output)
        return outcomes

    async def _send(
        self, address: str, op: str, when_sent: Callable[[], None] | None = None, **arguments: Any
    ) -> Any:
        if op == KEEP and isinstance(self._workers, Indirect):  # large: what is small does not wait behind it
            return await self.client.scheduler.proxy(msg={"op": op, **arguments}, worker=address)
        return await self._workers.ask(address, op, when_sent, **arguments)

    async def finish_connecting(self) -> None:
        """Wait for connections that are being made: cut short, they would stay half open."""
        if isinstance(self._workers, Direct):
            await self._workers.finish_connecting()

    async def take_back(self, address: str, keys: list[str]) -> None:
        """Ask a worker to give back chunks that it has not begun: they come back as not run."""
        try:
            await self._send(address, TAKE_BACK, keys=keys)
        except OSError as exc:  # its chunks are lost then, and those who wait for them are told
            logger.debug("%s can't be asked for chunks: %s", address, exc)

    async def end_worker(self, address: str) -> None:
        """Ask a worker whose own modules are outdated to end; its nanny starts another."""
        try:
            await self._send(address, LEAVE)
        except OSError as exc:  # it has ended
            logger.debug("%s can't be asked to end: %s", address, exc)

    def start_placeholder(self, key: str, address: str) -> Any:
        """Tell the scheduler of a chunk that runs on a worker: by a task that lasts as long. Returns its future."""
        return self.client.submit(handlers.placeholder, key, key=key, workers=[address], pure=False)

    async def run(self, key: str, arguments: Sequence[Any], needs: Sequence[Any] = (), **where: Any) -> Outcomes:
        """Run a chunk as the Dask task `key`; what Dask itself raises is passed on, but for the end of a worker.

        `needs` are the futures of the values that its call needs from others.

        Cancelling this leaves the task to `interrupt`.

        Raises
        ------
        WorkerGoneError
            The worker that ran it has ended.
        """
        with dask.annotate(**{LOSSES: 0}):  # what has become of the others' parts can't be undone
            if needs:
                where["needs"] = list(needs)
            future = self.client.submit(runtime.run_batch, *arguments, key=key, pure=False, **where)
        return await self.outcomes(future)

    async def outcomes(self, future: Any) -> Outcomes:
        """Return what the task of a future returns: outcomes. Raises as `run` does."""
        # Shielded, because a gather that is cut short leaves tasks that complain about it on the terminal.
        direct = isinstance(self._workers, Direct)
        gathering = asyncio.ensure_future(self.client.gather(future, direct=direct, asynchronous=True))
        gathering.add_done_callback(_retrieve)
        losses = self.scheduler_losses
        try:
            return self._heard(await asyncio.shield(gathering))
        except Exception as exc:
            if await self._is_lost_since(losses, exc):  # all workers are gone with their scheduler
                raise WorkerGoneError("") from exc
            if type(exc).__name__ != "KilledWorker":
                raise
            raise _worker_gone(exc) from exc

    async def failure(self, future: Any) -> BaseException | None:
        """Wait for the end of a task, and return what it has raised, if it has. Takes a future, or its state alone."""
        state = getattr(future, "_state", future)
        await state.wait()
        if state.status == "finished":
            return None
        error: BaseException = state.exception
        if type(error).__name__ != "KilledWorker":
            return error
        gone = _worker_gone(error)
        gone.__dict__[KEY] = error.task  # type: ignore[attr-defined]
        return gone

    async def interrupt(self, places: Mapping[str, str | None]) -> set[str]:
        """Take chunks off the cluster: queued ones are dropped, running ones interrupted.

        Only the workers that have the chunks are asked. `places` gives their addresses; None: the scheduler has chosen
        the worker, so all are asked.

        Returns the addresses of workers that ran one, and that will end if it does not react.
        """
        tasks = [key for key in places if key in self.client.futures]
        if tasks:
            self.client._send_to_scheduler(
                {"op": "cancel-keys", "keys": tasks, "force": False, "reason": "cancelled", "msg": ""}
            )
        for key in tasks:
            state = self.client.futures.pop(key, None)
            if state is not None:
                state.cancel()
        by_worker: dict[str | None, list[str]] = defaultdict(list)
        for key, address in places.items():
            by_worker[address].append(key)
        hits = await asyncio.gather(*(self._interrupt(address, keys) for address, keys in by_worker.items()))
        return set().union(*hits)

    async def _interrupt(self, address: str | None, keys: list[str]) -> set[str]:
        try:
            if address is None:
                found = await self.client._run(interrupts.interrupt, keys, on_error="ignore")
            else:
                found = {address: await self._interrupt_there(address, keys)}
        except Exception:  # the worker or the cluster is going away, and the chunks with it
            logger.debug("interrupt of %d chunks failed", len(keys), exc_info=True)
            return set()
        return {address for address, hit in found.items() if hit}

    async def _interrupt_there(self, address: str, keys: list[str]) -> int:
        try:
            async with asyncio.timeout(_SILENT_S):
                hits: int = await self._send(address, INTERRUPT, keys=keys)
                return hits
        except TimeoutError:
            # Native code holds its interpreter lock, or the process is stopped.
            logger.warning("the worker at %s does not answer and is killed, because its call is cancelled", address)
            await self.client.scheduler.broadcast(msg={"op": KILL}, workers=[address], nanny=True)
            return len(keys)

    async def end_processes(self, keys: list[str], workers: list[str], *, is_good: bool) -> None:
        """End the separate processes that chunks had on these workers: their job is over."""
        try:
            await self.client._run(ranks.end, keys, is_good=is_good, workers=workers, on_error="ignore")
        except Exception:  # the cluster is going away, and they with it
            logger.debug("the end of %d processes was not told", len(keys), exc_info=True)

    async def wait_ended(self, places: Mapping[str, str | None], workers: Callable[[], Collection[str]]) -> None:
        """Return when none of the chunks runs any more and each worker that had one answers, if it is in `workers`.

        `places` is as for `interrupt`. A worker may have ended with its chunk.
        """
        losses = self.scheduler_losses
        addresses = set(places.values())
        asked = None if None in addresses else [*addresses]
        while self.scheduler_losses == losses:  # otherwise all have ended
            try:
                answers = await self.client._run(interrupts.runs_one_of, [*places], workers=asked, on_error="ignore")
            except OSError:
                if self.client.status not in _CONNECTED_OR_CONNECTING:
                    raise
                await asyncio.sleep(_LOOK_S)
                continue
            here = set(workers()) if asked is None else addresses.intersection(workers())
            if not any(answers.values()) and answers.keys() >= here:
                return
            await asyncio.sleep(_LOOK_S)

    def forget(self) -> None:
        """Let go of what was scattered, and of what is on its way."""
        self._scattered.clear()
        self.delivery.close()
        if isinstance(self._workers, Indirect):
            self._workers.close()


def _unpacked(answer: Any) -> Outcomes:
    outcomes: Outcomes = pickle.loads(answer) if isinstance(answer, bytes) else answer
    return outcomes


def _retrieve(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
