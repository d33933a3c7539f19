"""Large buffers to nodes that share no files with the caller: each once, most of them from other nodes."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skyward.engine import delivery
from skyward.engine.delivery import Delivery
from skyward.engine.store import Store
from skyward.transfer.wire import DROP, FETCH, KEEP, READ
from skyward.worker import buffer_files


class Nodes:
    """Nodes that remember what they have, and how many of them read from each at once."""

    def __init__(self) -> None:
        self.have: dict[str, bytearray] = {}
        self.arriving: dict[str, bytearray] = {}
        self.from_caller: Counter[str] = Counter()
        self.from_others: Counter[str] = Counter()
        self.reading: Counter[str] = Counter()
        self.most_at_once = 0
        self.gone: set[str] = set()

    async def send(self, address: str, op: str, **what: Any) -> tuple[str, str] | None:
        await asyncio.sleep(0.001 * random.random())
        if address in self.gone:
            raise OSError(f"{address} is gone")
        if op == KEEP:
            data, start = bytes(what["data"].data), what["start"]
            if address not in self.arriving:
                self.arriving[address] = bytearray(what["total"])
                self.from_caller[address] += 1
            self.arriving[address][start : start + len(data)] = data
            if start + len(data) == what["total"]:
                self.have[address] = self.arriving.pop(address)
        elif op == FETCH:
            source = what["source"]
            if source in self.gone:
                return "source", f"{source} is gone"
            while source not in self.have:
                await asyncio.sleep(0.001)
            self.reading[source] += 1
            self.most_at_once = max(self.most_at_once, *self.reading.values())
            await asyncio.sleep(0.005)
            self.reading[source] -= 1
            self.have[address] = self.have[source]
            self.from_others[address] += 1
        elif op == DROP:
            del self.have[address]
        return None


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(delivery, "PIECE", 10)
    return Store(keep_bytes=0)


DATA = bytes(range(95))


def test_the_caller_sends_it_once_and_nodes_have_it_from_each_other(nodes: Nodes, store: Store) -> None:
    digest = store.put(memoryview(DATA)).digest

    async def bring() -> None:
        d = Delivery(store, nodes.send)
        d.update(range(20), [f"w{n}" for n in range(20)])
        for _ in range(2):  # the second time it is there
            await asyncio.gather(*(d.bring([digest], n, f"w{n}") for n in range(20) for _ in range(3)))

    asyncio.run(bring())

    assert all(bytes(nodes.have[f"w{n}"]) == DATA for n in range(20))
    assert nodes.from_caller.total() == 1
    assert set(nodes.from_others.values()) == {1}
    assert nodes.most_at_once <= 2


def test_nodes_fetch_what_their_source_is_still_receiving(nodes: Nodes, store: Store) -> None:
    digest = store.put(memoryview(DATA)).digest
    fetching = asyncio.Event()

    async def send(address: str, op: str, **what: Any) -> tuple[str, str] | None:
        if op == FETCH:
            fetching.set()
        elif what["start"] == 90:  # the last piece
            await fetching.wait()
        return await nodes.send(address, op, **what)

    async def bring() -> None:
        d = Delivery(store, send)
        d.update({0, 1}, {"w0", "w1"})
        async with asyncio.timeout(10):
            await asyncio.gather(d.bring([digest], 0, "w0"), d.bring([digest], 1, "w1"))

    asyncio.run(bring())

    assert {bytes(nodes.have[w]) for w in ("w0", "w1")} == {DATA}


def test_nodes_hear_when_their_source_receives_no_more(nodes: Nodes, store: Store) -> None:
    digest = store.put(memoryview(DATA)).digest
    fetching = asyncio.Event()
    is_lost = True

    async def send(address: str, op: str, **what: Any) -> tuple[str, str] | None:
        if op == FETCH:
            fetching.set()
        elif what["start"] == 90 and is_lost:
            await fetching.wait()
            raise OSError("the connection is lost")
        return await nodes.send(address, op, **what)

    async def bring() -> None:
        nonlocal is_lost
        d = Delivery(store, send)
        d.update({0, 1}, {"w0", "w1"})
        async with asyncio.timeout(10):
            ended = await asyncio.gather(
                d.bring([digest], 0, "w0"), d.bring([digest], 1, "w1"), return_exceptions=True
            )
            assert [type(error) for error in ended] == [OSError, OSError]
            is_lost = False
            await d.bring([digest], 1, "w1")

    asyncio.run(bring())

    assert bytes(nodes.have["w1"]) == DATA


def test_a_worker_reads_out_pieces_as_they_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(buffer_files.VARIABLE, str(tmp_path / "buffer-files"))
    monkeypatch.setattr(buffer_files, "PIECE", 10)
    digest = "0" * 32
    worker = SimpleNamespace(handlers={})
    buffer_files.install(worker)

    async def keep(start: int) -> None:
        assert await worker.handlers[KEEP](digest, start, 95, DATA[start : start + 10]) is None

    async def main() -> None:
        read = [asyncio.ensure_future(worker.handlers[READ](digest, start)) for start in range(0, 95, 10)]
        for start in (10, 0, *range(20, 90, 10)):
            await keep(start)
            assert bytes((await read[start // 10]).data) == DATA[start : start + 10]
        assert not read[-1].done()
        await keep(90)
        assert bytes((await read[-1]).data) == DATA[90:]
        assert bytes((await worker.handlers[READ](digest, 40)).data) == DATA[40:50]

    asyncio.run(main())


def test_a_node_whose_source_is_gone_has_it_from_the_caller(nodes: Nodes, store: Store) -> None:
    digest = store.put(memoryview(DATA)).digest

    async def bring() -> None:
        d = Delivery(store, nodes.send)
        d.update({0, 1, 2}, {"w0", "w1", "w2"})
        await d.bring([digest], 0, "w0")
        nodes.gone.add("w0")
        with pytest.raises(OSError, match="w0 is gone"):
            await d.bring([digest], 1, "w1")
        d.update({1, 2}, {"w1", "w2"})
        await d.bring([digest], 1, "w1")
        await d.bring([digest], 2, "w2")
        d.update({0, 1, 2}, {"w0 of another process", "w1", "w2"})
        await d.bring([digest], 0, "w0 of another process")

    asyncio.run(bring())

    assert {bytes(nodes.have[w]) for w in ("w1", "w2", "w0 of another process")} == {DATA}


def test_dropped_buffers_leave_the_nodes_and_return_when_needed(
    nodes: Nodes, store: Store
) -> None:
    ref = store.put(memoryview(DATA))

    async def bring() -> None:
        d = Delivery(store, nodes.send)
        await d.bring([ref.digest], 0, "w0")
        store.release((ref,))  # no call needs it
        store.release((store.put(memoryview(b"of a later call")),))  # the store keeps only this
        d.drop(store.take_dropped())
        await asyncio.sleep(0.05)
        assert nodes.have == {}
        store.put(memoryview(DATA))
        await d.bring([ref.digest], 0, "w0")
        assert bytes(nodes.have["w0"]) == DATA

    asyncio.run(bring())


def test_a_file_has_its_name_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(buffer_files.VARIABLE, str(tmp_path / "buffer-files"))
    digest = "0" * 32

    buffer_files._write(digest, 30, 95, memoryview(DATA[30:50]))
    buffer_files._write(digest, 0, 95, memoryview(DATA[:30]))
    assert not buffer_files.path_of(digest).exists()
    buffer_files._write(digest, 50, 95, memoryview(DATA[50:]))

    assert buffer_files.path_of(digest).read_bytes() == DATA
    assert buffer_files._read(digest, 90) == DATA[90:]
    assert [p.name for p in (tmp_path / "buffer-files").iterdir()] == [digest]


def test_a_node_without_room_is_reported_and_not_retried(nodes: Nodes, store: Store) -> None:
    digest = store.put(memoryview(DATA)).digest

    async def full(*_: Any, **__: Any) -> tuple[str, str]:
        return "room", "an argument can't be kept on that node"

    with pytest.raises(RuntimeError, match="can't be kept on that node"):
        asyncio.run(Delivery(store, full).bring([digest], 0, "w0"))


def test_pieces_that_came_after_a_full_disk_are_removed(nodes: Nodes, store: Store) -> None:
    digest = store.put(memoryview(DATA)).digest
    said: list[tuple[str, int]] = []

    async def send(address: str, op: str, **what: Any) -> tuple[str, str] | None:
        said.append((op, what.get("start", -1)))
        await asyncio.sleep(0.01)
        said.append((f"{op} answered", what.get("start", -1)))
        return ("room", "no space left") if what.get("start") == 0 else None

    with pytest.raises(RuntimeError, match="no space left"):
        asyncio.run(Delivery(store, send).bring([digest], 0, "w0"))

    assert said[-2:] == [(DROP, -1), (f"{DROP} answered", -1)]
    assert len([op for op, _ in said if op == KEEP]) == len([op for op, _ in said if op == f"{KEEP} answered"]) <= 3


def test_only_digests_become_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(buffer_files.VARIABLE, str(tmp_path))
    for name in ("../x", "", "A" * 32, "0" * 31):
        with pytest.raises(ValueError, match="not the digest"):
            buffer_files.path_of(name)
