"""Requests to workers through the scheduler: a real scheduler and a real worker, reached through the scheduler only."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import dask
import pytest
from distributed import Scheduler, Worker
from distributed.comm import CommClosedError
from distributed.core import ConnectionPool
from distributed.protocol import to_serialize

from skyward.engine.indirect import Indirect
from skyward.scheduler.link import LinkPlugin
from skyward.transfer import link
from skyward.transfer.wire import Kind, Outcome, Outcomes


class Site:
    """A scheduler, a worker that answers `echo`, `large`, `fail` and `wait`, asked from afar."""

    def __init__(self, scheduler: Any, worker: Any, pool: Any) -> None:
        self.scheduler, self.worker, self.pool = scheduler, worker, pool
        self.comms: list[Any] = []
        self.round_trips: list[float] = []
        self.go = asyncio.Event()
        self.began: list[str] = []
        client = SimpleNamespace(connect_scheduler=self.connect)
        self.indirect = Indirect(client, self.round_trips.append)
        worker.handlers |= {"echo": self.echo, "large": self.large, "fail": self.fail, "wait": self.wait}

    async def connect(self) -> Any:
        self.comms.append(comm := await self.pool.connect(self.scheduler.address))
        return comm

    async def echo(self, data: bytes) -> bytes:
        return data

    async def large(self, data: bytes) -> Any:
        return to_serialize(Outcomes([Outcome(Kind.VALUE, b"pickle", (data,))]))

    async def fail(self) -> None:
        raise KeyError("in the handler")

    async def wait(self, name: str) -> None:
        self.began.append(name)
        await self.go.wait()

    async def ask(self, op: str, **arguments: Any) -> Any:
        return await self.indirect.ask(self.worker.address, op, **arguments)


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    pool = await ConnectionPool()
    async with (
        Scheduler(port=0, dashboard_address=":0", plugins=[LinkPlugin()]) as scheduler,
        Worker(scheduler.address, nthreads=1, dashboard_address=":0") as worker,
    ):
        found = Site(scheduler, worker, pool)
        try:
            yield found
        finally:
            found.go.set()
            found.indirect.close()
            await pool.close()


def on_site(work: Callable[[Site], Awaitable[None]]) -> None:
    async def main() -> None:
        async with site() as found, asyncio.timeout(30):
            await work(found)

    asyncio.run(main())


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def sent_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the sizes of what both sides of a link send."""
    sizes: list[int] = []
    pack = link.Link._pack

    def count(self: link.Link, data: bytes) -> bytes:
        packed = pack(self, data)
        sizes.append(len(packed))
        return packed

    monkeypatch.setattr(link.Link, "_pack", count)
    return sizes


def test_many_requests_at_once_get_their_own_answers() -> None:
    async def work(site: Site) -> None:
        sizes = [0, 1, 100, 70_000, 300_000, 2_000_000]
        sent = [random.Random(i).randbytes(sizes[i % len(sizes)]) for i in range(60)]
        assert await asyncio.gather(*(site.ask("echo", data=data) for data in sent)) == sent
        assert len(site.comms) == 1

    on_site(work)


def test_what_was_sent_before_costs_a_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sent_bytes(monkeypatch)

    async def work(site: Site) -> None:
        large, other = os.urandom(900_000), os.urandom(900_000)
        await site.ask("echo", data=large)
        await site.ask("echo", data=other)
        before = sum(sizes)
        for i in range(20):
            answer = await site.ask("echo", data=b"%d" % i + large + b"between" + other)
            assert answer == b"%d" % i + large + b"between" + other
        assert sum(sizes) - before < 100_000  # of 72 MB, both ways

    on_site(work)


@pytest.mark.parametrize("compression", ["zstd", False])
@pytest.mark.parametrize(
    "content", [os.urandom(3 << 20), b"compress" * (1 << 19), bytes(70 << 20)], ids=["random", "text", "split by Dask"]
)
def test_large_buffers_of_an_answer_arrive_as_they_were(content: bytes, compression: Any) -> None:

    async def work(site: Site) -> None:
        outcomes = await site.ask("large", data=content)
        assert outcomes.items[0].data == b"pickle"
        assert bytes(outcomes.items[0].buffers[0]) == content

    with dask.config.set({"distributed.comm.compression": compression}):
        on_site(work)


def test_errors_of_a_request_come_back_and_the_others_go_on() -> None:
    async def work(site: Site) -> None:
        with pytest.raises(Exception, match="in the handler"):
            await site.ask("fail")
        with dask.config.set({"distributed.comm.timeouts.connect": "0.2s"}), pytest.raises(OSError):
            await site.indirect.ask("tcp://127.0.0.1:9", "echo", data=b"nobody listens there")
        assert await site.ask("echo", data=b"more") == b"more"
        assert len(site.comms) == 1

    on_site(work)


def test_a_request_that_is_given_up_holds_up_no_other() -> None:
    async def work(site: Site) -> None:
        waiting = asyncio.ensure_future(site.ask("wait", name="one"))
        await until(lambda: site.began)
        waiting.cancel()
        unsent = asyncio.ensure_future(site.ask("wait", name="never sent"))
        await asyncio.sleep(0)
        unsent.cancel()
        assert await site.ask("echo", data=b"more") == b"more"
        site.go.set()
        assert await site.ask("echo", data=b"again") == b"again"
        assert site.began == ["one"]

    on_site(work)


def test_a_closed_connection_ends_requests_and_is_made_again() -> None:
    async def work(site: Site) -> None:
        waiting = asyncio.ensure_future(site.ask("wait", name="one"))
        await until(lambda: site.began)
        site.comms[0].abort()
        with pytest.raises(CommClosedError):
            await waiting
        assert await site.ask("echo", data=b"more") == b"more"
        assert len(site.comms) == 2

    on_site(work)


def test_a_round_trip_is_measured() -> None:
    async def work(site: Site) -> None:
        site.indirect.open()
        await until(lambda: site.round_trips)
        assert 0 < site.round_trips[0] < 30

    on_site(work)
