"""The engine against workers that die, refuse and give back at any moment: no outcome is lost, doubled or mixed up.

The workers are simulated, because only so can every order of events be tried: they run chunks as real ones do, in turn,
and what happens to each chunk is drawn by hypothesis.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import pickle
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import skyward as sky
from skyward.engine import Call, Engine, dispatcher, engine, sent_chunks
from skyward.engine.future import CallFuture
from skyward.engine.packer import Packer
from skyward.engine.run import run_all, stream
from skyward.engine.transport import UnreachableError, WorkerGoneError
from skyward.transfer.wire import Chunk, Kind, Outcome, Outcomes, Slot
from skyward.worker import runtime
from tests.waiting import wait_until

_ran: Counter[int] = Counter()


def work(i: int, fails: bool) -> int:
    sys.modules[__name__]._ran[i] += 1  # the function itself travels by value, with all it refers to
    if fails:
        raise ValueError(i)
    return i * i


# What happens to a chunk: it runs, or so many of its calls do before the rest is given back, or its worker dies, or all
# workers with their scheduler.
FATES = st.one_of(
    st.tuples(st.just("loses the scheduler after"), st.integers(0, 5)),
    st.just(("runs", 0)),
    st.tuples(st.just("gives back after"), st.integers(0, 5)),
    st.tuples(st.just("dies after"), st.integers(0, 5)),
    st.just(("is unreachable", 0)),
)


class Workers:
    """Stands in for `Transport`: a few workers, in one process, whose chunks meet their fates in turn."""

    def __init__(self, count: int, fates: list[tuple[str, int]], client: Any) -> None:
        self.client = client
        self.numbers = itertools.count()
        self.alive = [f"w{next(self.numbers)}" for _ in range(count)]
        self.fates = iter(fates)
        self.engine: Engine
        self.losses: Counter[int] = Counter()  # of calls that had begun
        self.scheduler_losses = 0
        self._reclaimed: set[str] = set()
        self.delivery = SimpleNamespace(update=lambda *_: None)
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._waiting: set[str] = set()
        self._taken_back: set[str] = set()
        self._interrupted: set[str] = set()

    def slots(self) -> list[Slot]:
        return [Slot(address, 0, number) for number, address in enumerate(self.alive)]

    async def prepare(self, *_: Any) -> None:
        pass

    async def finish_connecting(self) -> None:
        pass

    async def send(self, address: str, chunk: Chunk, when_sent: Any) -> Outcomes:
        chunk = pickle.loads(pickle.dumps(chunk))
        await asyncio.sleep(0)
        fate, calls = next(self.fates, ("runs", 0))
        if address not in self.alive or fate == "is unreachable":
            raise UnreachableError(address)
        when_sent()
        self._waiting.add(chunk.key)
        async with self._turns[address]:
            self._waiting.discard(chunk.key)
            if address not in self.alive:
                raise WorkerGoneError(address)
            if chunk.key in self._taken_back:
                return Outcomes([Outcome(Kind.NOT_RUN)] * len(chunk.calls))
            if chunk.key in self._interrupted:
                return Outcomes([Outcome(Kind.CANCELLED)] * len(chunk.calls))
            await asyncio.sleep(0)
            if address not in self.alive:  # all were lost meanwhile
                raise WorkerGoneError(address)
            if fate == "runs":
                return runtime.run_batch(chunk)
            begun = Chunk(chunk.key, chunk.functions, chunk.calls[:calls], chunk.layout, None)
            outcomes = runtime.run_batch(begun)
            if fate == "dies after":
                self._die(address)
                raise WorkerGoneError(address)
            if fate == "loses the scheduler after":
                self._lose_all()
                raise WorkerGoneError(address)
            rest = len(chunk.calls) - len(begun.calls)
            return Outcomes([*outcomes.items, *[Outcome(Kind.NOT_RUN)] * rest])

    def _die(self, address: str) -> None:
        self.alive.remove(address)
        self.alive.append(f"w{next(self.numbers)}")
        self.engine.roster_changed()

    def _lose_all(self) -> None:
        """Lose the scheduler, and after a while have as many workers again as there were."""
        self._reclaimed.update(self.alive)
        count = len(self.alive)
        self.alive.clear()
        self.engine.scheduler_lost()
        self.engine.roster_changed()
        self.engine.loop.start(self._move(count))

    async def _move(self, count: int) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        self.engine.scheduler_moved()
        for _ in range(count):
            self.alive.append(f"w{next(self.numbers)}")
            self.engine.roster_changed()
            await asyncio.sleep(0)

    def lose_scheduler(self) -> None:
        self.scheduler_losses += 1

    async def until_slots(self) -> bool:
        return True

    async def was_reclaimed(self, address: str) -> bool:
        return address in self._reclaimed

    async def take_back(self, _: str, keys: list[str]) -> None:
        await asyncio.sleep(0)
        self._taken_back.update(self._waiting.intersection(keys))

    async def interrupt(self, places: dict[str, str | None]) -> set[str]:
        self._interrupted.update(places)
        return set()

    def lose(self, _: set[str]) -> bool:
        return False

    def start_placeholder(self, *_: str) -> Any:
        return SimpleNamespace(release=lambda: None)

    def forget(self) -> None:
        pass


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """An event loop in a thread, as a Dask client has one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield SimpleNamespace(loop=SimpleNamespace(asyncio_loop=loop), status="running")
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@contextmanager
def simulated(client: Any, count: int, fates: list[tuple[str, int]], retries: int) -> Iterator[Engine]:
    _ran.clear()
    workers = Workers(count, fates, client)
    with (
        mock.patch.object(engine, "Transport", return_value=workers),
        mock.patch.object(dispatcher, "UNREACHABLE_S", 0.001),
        mock.patch.object(sent_chunks, "UNREACHABLE_S", 0.001),
    ):
        made = Engine(
            client, workers.slots, pool_id="test", alive=lambda: workers.alive, retries=retries,
            was_reclaimed=workers.was_reclaimed,
        )  # fmt: skip
        workers.engine = made
        made.wait_ready()
        try:
            yield made
            settled = asyncio.run_coroutine_threadsafe(_settle(made), client.loop.asyncio_loop)
            settled.result(10)
            assert not made.dispatcher.chunks
            assert made.busy() == set()
            assert made.dispatcher._reruns == 0
        finally:
            made.close()


async def _settle(made: Engine) -> None:
    while made.loop.tasks:
        await asyncio.sleep(0.001)


calls_of = st.lists(st.booleans(), max_size=60)


@settings(deadline=None, max_examples=200)
@given(fails=calls_of, workers=st.integers(1, 3), fates=st.lists(FATES, max_size=30), retries=st.integers(0, 2))
def test_every_outcome_is_that_of_its_own_call(
    client: Any, fails: list[bool], workers: int, fates: list[tuple[str, int]], retries: int
) -> None:
    deaths = sum(fate == "dies after" for fate, _ in fates)
    moves = sum(fate == "loses the scheduler after" for fate, _ in fates)
    with simulated(client, workers, fates, retries) as made:
        outcomes = run_all(made, [Call(work, (i, f)) for i, f in enumerate(fails)], return_exceptions=True)

    assert len(outcomes) == len(fails)
    for i, (outcome, failing) in enumerate(zip(outcomes, fails, strict=True)):
        if isinstance(outcome, sky.WorkerDiedError):
            assert outcome.losses == retries + 1 <= deaths
        elif failing:
            assert isinstance(outcome, ValueError)
            assert outcome.args == (i,)
        else:
            assert outcome == i * i
        assert _ran[i] <= retries + 1 + moves
        if not isinstance(outcome, sky.WorkerDiedError):
            assert _ran[i] >= 1
    if not (deaths or moves):
        assert all(_ran[i] == 1 for i in range(len(fails)))


@settings(deadline=None, max_examples=100)
@given(
    fails=st.lists(st.just(False), min_size=1, max_size=60),
    workers=st.integers(1, 3),
    fates=st.lists(FATES, max_size=20),
    taken=st.integers(0, 60),
)
def test_a_stream_that_is_left_early_was_in_order_until_then(
    client: Any, fails: list[bool], workers: int, fates: list[tuple[str, int]], taken: int
) -> None:
    with simulated(client, workers, fates, retries=100) as made:
        values = stream(made, (Call(work, (i, f)) for i, f in enumerate(fails)))
        found = list(itertools.islice(values, taken))
        values.close()  # type: ignore[attr-defined]

    assert found == [i * i for i in range(len(fails))][:taken]


@settings(deadline=None, max_examples=100)
@given(
    fails=calls_of,
    workers=st.integers(1, 3),
    fates=st.lists(FATES, max_size=20),
    cancelled=st.sets(st.integers(0, 59)),
)
def test_cancelling_some_calls_leaves_the_others_their_own_outcomes(
    client: Any, fails: list[bool], workers: int, fates: list[tuple[str, int]], cancelled: set[int]
) -> None:
    with simulated(client, workers, fates, retries=100) as made:
        futures = [made.submit(Call(work, (i, f))) for i, f in enumerate(fails)]
        was_cancelled = {i for i in cancelled if i < len(futures) and futures[i].cancel()}
        done, pending = concurrent.futures.wait(futures, 30)
        assert not pending
        for i, future in enumerate(futures):
            if i in was_cancelled:
                assert future.cancelled()
            elif fails[i]:
                assert isinstance(future.exception(), ValueError)
            else:
                assert future.result() == i * i
    assert len(done) == len(fails)


def seconds_to_cancel(client: Any, calls: int) -> float:
    """Return the processor time that it takes to cancel so many calls, while no worker is there to take them."""
    with simulated(client, 0, [], retries=0) as made:
        futures = [made.submit(Call(work, (i, False))) for i in range(calls)]
        began = time.process_time()
        for future in reversed(futures):
            future.cancel()
        wait_until(lambda: not made._futures_group.pending)
        return time.process_time() - began


def test_the_time_to_cancel_calls_grows_with_their_number_not_its_square(client: Any) -> None:
    few, many = (min(seconds_to_cancel(client, calls) for _ in range(2)) for calls in (500, 4_000))

    assert many < 24 * few


def test_cancelled_calls_wake_the_loop_once_and_leave_nothing_behind(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulated(client, 0, [], retries=0) as made:
        futures = [made.submit(Call(work, (i, False))) for i in range(100)]
        other = made.submit(Call(work, (100, False)))
        woken: list[Any] = []
        monkeypatch.setattr(made.loop, "call_soon", lambda fn, *_: woken.append(fn))  # the loop has no turn meanwhile
        for future in futures:
            future.cancel()
        monkeypatch.undo()
        assert len(woken) == 1
        client.loop.asyncio_loop.call_soon_threadsafe(woken[0])

        wait_until(lambda: len(made._futures_group.pending) == 1)
        assert made._futures_group.left() == made._futures_group.demand() == 1
        assert made._futures_group.pending_bytes == next(iter(made._futures_group.pending)).size
        assert not other.done()


def test_a_chunk_of_which_every_call_is_cancelled_is_dropped(client: Any) -> None:
    with simulated(client, 1, [], retries=0) as made:
        held = threading.Event()
        client.loop.asyncio_loop.call_soon_threadsafe(held.wait)  # until all calls are queued
        known = Packer(made.store, made.sources).pack(Call(work, (0, False)))
        made.estimates.observe(known.function.digest, 0.0001, 10)
        futures = [made.submit(Call(work, (i, False))) for i in range(10)]
        sent: list[list[Any]] = []
        send = made.dispatcher._send

        def cancelling(group: Any, items: list[Any], address: str | None) -> None:
            sent.append(items)
            send(group, items, address)
            for item in items:
                item.sink.cancel()

        made.dispatcher._send = cancelling  # type: ignore[method-assign]
        held.set()

        wait_until(lambda: all(future.cancelled() for future in futures))
        wait_until(lambda: not made.dispatcher.chunks)
        assert max(map(len, sent)) > 1
        assert len(made._transport._interrupted) == len(sent)  # type: ignore[attr-defined]


def test_a_cancelled_call_that_comes_back_is_not_sent_again(client: Any) -> None:
    with simulated(client, 0, [], retries=0) as made:
        group = made.group()
        future = CallFuture()
        item = group.packer.pack(Call(work, (1, False)), sink=future)
        item.is_cancelled = True
        client.loop.asyncio_loop.call_soon_threadsafe(made.dispatcher._requeue, group, [item])

        wait_until(future.cancelled)
        assert not group.pending
