"""Large arguments: stored once by content, and looked at again where the caller may have changed them."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import skyward as sky
from skyward.engine import packer as packer_module
from skyward.engine import store as store_module
from skyward.engine.calls import Call
from skyward.engine.packer import Packer
from skyward.engine.sources import Sources
from skyward.engine.store import SeenBuffers, Store
from skyward.transfer import pickling
from skyward.transfer.wire import BlobRef

ROOT = Path(__file__).parents[2]
SMALL, LARGE = (2 << 20) // 8, (16 << 20) // 8  # elements: compared as a whole, and by samples


def put(seen: SeenBuffers, value: Any) -> BlobRef:
    _, (buffer,) = pickling.dumps(value)
    return seen.put(buffer)


def digest_of(array: Any) -> str:
    return Store().put(memoryview(array)).digest


def test_an_array_that_cannot_change_is_looked_at_once() -> None:
    seen = SeenBuffers(Store(), unchanged=True)
    array = np.ones(SMALL)
    first = put(seen, array)
    array[:] = 2

    assert put(seen, {"nested": array}) == first
    assert len(seen._known) == 1


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_changed_array_is_stored_again_and_an_unchanged_one_is_not(size: int) -> None:
    store = Store()
    seen = SeenBuffers(store, unchanged=False)
    array = np.zeros(size)
    first, again = put(seen, array), put(seen, [array])
    array[:] = 1

    assert first == again
    assert put(seen, array) != first
    assert store.writes == 2


def test_a_large_array_that_has_not_changed_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    seen = SeenBuffers(store, unchanged=False)
    array = np.ones(LARGE)
    hashed: list[Any] = []
    whole = store.put
    monkeypatch.setattr(store, "put", lambda view: (hashed.append(view), whole(view))[1])

    assert len({put(seen, array) for _ in range(5)}) == 1
    assert len(hashed) == 1


@pytest.mark.parametrize("size", [5_000_000, LARGE * 8 + 1234])  # not multiples of anything
def test_each_changed_region_of_8_kib_or_a_2048th_is_noticed(size: int) -> None:
    array = np.zeros(size, np.uint8)
    length = max(8192, array.nbytes // 2048)
    picks = random.Random(1)
    starts = [0, array.nbytes - length, *(picks.randrange(array.nbytes - length) for _ in range(60))]
    seen = SeenBuffers(Store(), unchanged=False)
    last = put(seen, array)

    for start in starts:
        array[start : start + length] += 1
        last, before = put(seen, array), last
        assert last != before, start


@pytest.mark.parametrize("shape", [(8192, 256), (1024, 2048), (256, 8192)])
def test_a_changed_column_of_a_matrix_is_noticed(shape: tuple[int, int]) -> None:
    seen = SeenBuffers(Store(), unchanged=False)
    matrix = np.zeros(shape)
    before = put(seen, matrix)
    matrix[:, 7] = 1

    assert put(seen, matrix) != before


def test_large_arrays_of_a_function_are_dropped_when_its_calls_have_ended() -> None:
    store = Store(keep_bytes=0)
    array = np.ones(SMALL)
    packer = Packer(store, Sources(store, ship=True))

    def first() -> float:
        return float(array[0])

    items = [packer.pack(Call(first)) for _ in range(2)]
    digest = items[0].function.digest
    for item in items:
        assert len(item.refs) == 1
        assert store.data(item.refs[0].digest)
        store.release(item.refs)
    store.release((store.put(memoryview(b"of a later call")),))

    assert digest_of(array) in store.take_dropped()
    again = packer.pack(Call(first))
    assert again.function.digest == digest
    assert store.data(again.refs[0].digest)


def test_over_the_limit_only_the_last_calls_buffers_stay_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = threading.Event()
    store = Store(tmp_path, keep_bytes=250)
    store.on_idle = told.set
    refs = [store.put(memoryview(bytes([i]) * 100)) for i in range(60)]

    for ref in refs:
        store.release((ref,))
    large = store.put(memoryview(b"x" * 1000))
    kept = {path.name for path in tmp_path.iterdir()}
    store.release((large,))
    last = {path.name for path in tmp_path.iterdir()}
    wait_s = store.drop_idle()
    monkeypatch.setattr(store_module, "_LINGER_S", 0.0)

    assert kept == {refs[-2].digest, refs[-1].digest, large.digest}
    assert last == {large.digest}
    assert wait_s == pytest.approx(30, abs=5)
    assert told.is_set()
    assert store.drop_idle() is None
    assert list(tmp_path.iterdir()) == []
    assert store.take_dropped() == {large.digest, *(ref.digest for ref in refs)}


def test_what_is_stored_again_after_it_was_dropped_does_not_go_from_nodes() -> None:
    store = Store(keep_bytes=0)
    first = store.put(memoryview(b"a"))
    store.release((first,))
    store.release((store.put(memoryview(b"b")),))

    again = store.put(memoryview(b"a"))

    assert again == first
    assert store.take_dropped() == set()


SMALL_MEMORY = """
import logging, sys
import numpy as np
import skyward as sky

def look(*arrays):
    return sum(float(a.sum()) for a in arrays)

if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, level="WARNING")
    arrays = [np.full(500_000, i) for i in range(6)]  # 4 MB each
    with sky.ComputePool("local", display="quiet") as pool:
        print(sky.compute(look)(*arrays) >> pool)
        print(*(sky.gather(*(sky.compute(look)(np.full(1_000_000, i)) for i in range(4))) >> pool))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_arrays_too_large_for_shared_memory_go_to_disk_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(SMALL_MEMORY)
    mount = "mount -t tmpfs -o size=10m tmpfs /dev/shm && exec \"$@\""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, str(tmp_path / "main.py")],
        env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
    )  # fmt: skip

    assert done.stdout.count("/dev/shm has no room for an argument") == 1, done.stderr
    assert done.stdout.splitlines()[-2:] == ["7500000.0", "0.0 1000000.0 2000000.0 3000000.0"]
    assert not list(tmp_path.glob("skyward-*"))


def test_without_room_on_disk_the_call_fails_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)

    real = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda *a, **k: Refusing(real(*a, **k)))  # a full disk can't be had here
    with pytest.raises(sky.PoolError, match=r"can't be kept in .*No space left"):
        store.put(memoryview(b"x" * 100))

    assert list(tmp_path.iterdir()) == []


class Refusing:
    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> Refusing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_large_arguments_without_arrays_travel_beside_the_pickle_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer_module, "_APART_BYTES", 1000)
    store = Store()
    value = [list(range(1000)), np.ones(SMALL), b"x" * (1 << 20)]

    item = Packer(store, Sources(store, ship=True)).pack(Call(len, (value,)))
    (copy,), kwargs = pickling.loads(item.arguments, [store.data(ref.digest) for ref in item.buffers])

    assert len(item.arguments) < 100
    assert len(item.buffers) == 3
    np.testing.assert_equal(copy, value)
    assert kwargs == {}


def test_only_bytes_that_were_not_stored_before_count_as_waiting() -> None:
    packer = Packer(store := Store(), Sources(store, ship=True))
    array = np.ones(SMALL)

    sizes = [packer.pack(Call(len, (array,))).size for _ in range(2)]

    assert sizes[0] > array.nbytes
    assert sizes[1] < 1000
