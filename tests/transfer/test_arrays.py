"""Arrays, bytes and what is made of them: once per node, whatever their layout, and as they are at each call."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

import skyward as sky
from skyward.cluster import joined
from skyward.engine.store import SeenBuffers, Store
from skyward.transfer import pickling

MATRIX = np.arange(1_200_000.0).reshape(1200, 1000)
CUBE = np.arange(600_000.0).reshape(100, 60, 100)

ARRAYS: dict[str, Any] = {
    "C": MATRIX,
    "F": np.asfortranarray(MATRIX),
    "columns": MATRIX[:, ::2],
    "rows": MATRIX[::2],
    "backwards": MATRIX[::-1, ::-1],
    "transposed": MATRIX.T,
    "transposed columns": MATRIX.T[::2],
    "axes moved": CUBE.transpose(2, 0, 1),
    "axes moved, every second": CUBE.transpose(2, 0, 1)[::2],
    "repeated": np.broadcast_to(MATRIX[0], (500, 1000)),
    "dates": np.arange(300_000).astype("M8[s]"),
    "every second difference": np.arange(600_000).astype("m8[ms]")[::2],
    "structured": np.ones(200_000, [("a", "i4"), ("b", "M8[D]")]),
    "big-endian": np.arange(300_000, dtype=">i8"),
    "text": np.full(20_000, "some text that has a length"),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_a_large_array_leaves_the_pickle_whatever_its_layout(array: Any) -> None:
    data, buffers = pickling.dumps([array])
    (copy,) = pickling.loads(data, [bytes(buffer.raw()) for buffer in buffers])

    assert len(data) < 1000
    assert type(copy) is np.ndarray
    assert copy.dtype == array.dtype
    np.testing.assert_array_equal(copy, array)
    if array.flags.forc:
        assert copy.strides == array.strides


class Named(np.ndarray):
    pass


@pytest.mark.parametrize(
    "value",
    [MATRIX.view(Named), np.ma.masked_greater(MATRIX, 5), np.array([None, "a"] * 200_000)],
    ids=["subclass", "masked", "objects"],
)
def test_arrays_that_are_more_than_their_elements_arrive_as_they_are(value: Any) -> None:
    copy = pickling.loads(*pickling.dumps(value))

    assert type(copy) is type(value)
    np.testing.assert_array_equal(copy, value)


MIB = 1 << 20


@pytest.mark.parametrize(
    "value",
    [
        b"x" * MIB,
        bytearray(b"x" * 2 * MIB),
        [b"x" * MIB, MATRIX, bytearray(b"y" * MIB), b"z" * 100_000, {"deep": (b"v" * MIB, CUBE[::2])}],
        pickle.dumps(list(range(500_000)), 5),
        [b"x" * 70_000 + b"B" + (3 * MIB).to_bytes(4, "little"), 1 << (3 * MIB - 25) * 8],
        ["é" * MIB, "x" * 2 * MIB, b"x" * MIB],
        list(range(100_000)),
    ],
    ids=["bytes", "bytearray", "mixed", "a pickle", "a long integer", "text", "a long list"],
)
def test_large_bytes_leave_the_pickle_and_arrive_as_bytes(value: Any) -> None:
    data, buffers = pickling.dumps(value)
    copy = pickling.loads(data, [bytes(buffer.raw()) for buffer in buffers])

    assert type(copy) is type(value)
    np.testing.assert_equal(copy, value)


def test_bytes_that_come_twice_are_one_object_and_not_copied() -> None:
    value = b"x" * MIB

    data, (buffer,) = pickling.dumps([value, value])

    assert buffer.raw().obj is value
    first, second = pickling.loads(data, [buffer])
    assert first is second


# --- a look at what came before -----------------------------------------------------------------------------

BIG = np.zeros((2000, 1000))  # 16 MB: compared by samples where it is not contiguous, 8 MB of it


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a[:, ::2],
        lambda a: a.T,
        lambda a: a[::-1],
        lambda a: a.view("M8[s]"),
        lambda a: a.view("M8[s]")[:, ::2],
    ],
    ids=["columns", "transposed", "backwards", "dates", "columns of dates"],
)
def test_a_new_view_of_a_known_array_is_not_stored_again(make: Callable[[Any], Any]) -> None:
    array = BIG.copy()
    store = Store()
    seen = SeenBuffers(store, unchanged=False)
    written = []

    def put() -> Any:
        _, (buffer,) = pickling.dumps(make(array))
        return seen.put(buffer)

    put_whole = store.put
    store.put = lambda buffer: (written.append(buffer), put_whole(buffer))[1]  # type: ignore
    first, again = put(), put()
    array[700:720] = 1

    assert first == again
    assert len(written) == 1
    assert put() != first


@pytest.mark.parametrize("size", [400, 2000])  # compared as a whole, and by samples
def test_a_part_of_a_view_that_changes_is_noticed(size: int) -> None:
    array = np.zeros((size, 2000))
    seen = SeenBuffers(Store(), unchanged=False)
    view = array[:, ::2]
    _, (buffer,) = pickling.dumps(view)
    refs = {seen.put(buffer)}

    for row in range(0, size, size // 10):
        view[row] = row + 1
        refs.add(seen.put(buffer))

    assert len(refs) == 11


# --- on pools -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["local", "joined"])
def any_pool(request: pytest.FixtureRequest) -> Iterator[sky.ComputePool]:
    if request.param == "local":
        yield request.getfixturevalue("pool")
        return
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        sky.ComputePool(sky.Dask(client), display="quiet") as pool,
    ):
        yield pool


SOME = bytes(range(250)) * 16_000  # 4 MB, as all of these
KINDS: dict[str, Any] = {
    "columns": np.arange(1_000_000.0)[::2],
    "transposed": np.arange(500_000.0).reshape(1000, 500).T,
    "dates": np.arange(500_000).astype("M8[s]"),
    "read-only": np.frombuffer(SOME, "i8"),
    "frame": pd.DataFrame({"x": np.arange(250_000), "t": pd.date_range("2026", periods=250_000, freq="s")}),
    "bytes": SOME[::-1],
    "bytearray": bytearray(SOME[1:] + b"!"),
}


@pytest.mark.parametrize("value", KINDS.values(), ids=KINDS)
def test_an_argument_is_stored_once_for_all_calls_that_use_it(any_pool: sky.ComputePool, value: Any) -> None:
    def look(value: Any, _: int) -> Any:
        return type(value), value[5:8]

    store = any_pool.engine.store
    before = store.written_bytes
    calls = (sky.compute(look)(value, i) for i in range(6))  # made one by one

    found = list(sky.gather(calls, stream=True) >> any_pool)

    assert store.written_bytes - before == 4_000_000
    for kind, part in found:
        assert kind is type(value)
        np.testing.assert_array_equal(part, value[5:8])


def test_a_result_that_is_a_view_or_bytes_arrives_whole(any_pool: sky.ComputePool) -> None:
    def make() -> Any:
        array = np.arange(2_000_000.0).reshape(1000, 2000)
        return array[:, ::2], array.T, b"x" * MIB, bytearray(b"y" * MIB), np.arange(300_000).astype("M8[s]")

    view, transposed, some, more, dates = sky.compute(make)() >> any_pool

    array = np.arange(2_000_000.0).reshape(1000, 2000)
    np.testing.assert_array_equal(view, array[:, ::2])
    np.testing.assert_array_equal(transposed, array.T)
    np.testing.assert_array_equal(dates, np.arange(300_000).astype("M8[s]"))
    assert (some, more) == (b"x" * MIB, bytearray(b"y" * MIB))
    assert (type(some), type(more)) == (bytes, bytearray)


# --- maps of files ------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Any], Any]] = {
    "all": lambda m: m,
    "one element": lambda m: m[3, 4:5],
    "rows": lambda m: m[10:20],
    "slices": lambda m: m[::3, 1::2],
    "transposed": lambda m: m.T,
    "backwards": lambda m: m[1:][::-1, ::-1],
    "array": np.asarray,
    "view of a view": lambda m: np.asarray(m)[5:].view("M8[s]")[:, ::2],
}


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """A map whose first element is not the file's."""
    path = tmp_path / "data"
    np.arange(5003.0).tofile(path)
    return np.memmap(path, float, "r+", offset=24, shape=(100, 50))


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_of_a_mapped_file_is_mapped_again(file: Any, part: Callable[[Any], Any]) -> None:
    mine = part(file)

    data, buffers = pickling.dumps(mine, files=True)
    theirs = pickling.loads(data)
    theirs[...] = np.zeros(1).astype(theirs.dtype)

    assert buffers == []
    assert type(theirs) is np.memmap
    assert (theirs.dtype, theirs.shape, theirs.strides) == (mine.dtype, mine.shape, mine.strides)
    assert not mine.astype(float).any()
    assert np.count_nonzero(file) == file.size - mine.size


def test_a_file_that_was_removed_or_replaced_is_not_mapped_again(file: Any, tmp_path: Path) -> None:
    data, _ = pickling.dumps(file, files=True)
    (tmp_path / "new").write_bytes(bytes(5003 * 8))
    (tmp_path / "new").rename(tmp_path / "data")
    with pytest.raises(OSError, match="another one where the call runs"):
        pickling.loads(data)

    (tmp_path / "data").unlink()
    copy = pickling.loads(*pickling.dumps(file, files=True))

    np.testing.assert_array_equal(copy, file)
    assert not copy.flags.writeable


def write(array: Any) -> tuple[float, float]:
    before = float(array[0, 0])
    array[0, 0] = 7
    return before, float(array[0, 0])


def test_calls_on_this_machine_write_into_the_callers_file(any_pool: sky.ComputePool, file: Any) -> None:
    def fill(array: Any, i: int) -> None:
        array[i] = i + 1

    before = any_pool.engine.store.written_bytes

    sky.gather(*(sky.compute(fill)(file, i) for i in range(100))) >> any_pool

    np.testing.assert_array_equal(file, np.repeat(np.arange(1.0, 101), 50).reshape(100, 50))
    np.testing.assert_array_equal(np.fromfile(file.filename)[3:], file.ravel())
    assert any_pool.engine.store.written_bytes == before


def test_a_map_arrives_in_its_mode(any_pool: sky.ComputePool, file: Any) -> None:
    own = np.memmap(file.filename, float, "c", offset=24, shape=file.shape)
    fixed = np.memmap(file.filename, float, "r", offset=24, shape=file.shape)
    view = file[1:]
    view.flags.writeable = False

    assert sky.gather(*(sky.compute(write)(own) for _ in range(4))) >> any_pool == ((3.0, 7.0),) * 4
    for array in (fixed, view):
        with pytest.raises(ValueError, match="read-only"):
            sky.compute(write)(array) >> any_pool

    assert file[0, 0] == own[0, 0] == 3


def test_where_files_are_not_shared_a_map_arrives_as_a_read_only_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepare = joined.prepare
    monkeypatch.setattr(joined, "prepare", lambda *args, **options: bool(prepare(*args, **options)) and False)
    small = np.memmap(tmp_path / "small", float, "w+", shape=(100, 50))  # stays in the pickle
    large = np.memmap(tmp_path / "large", float, "w+", shape=(4000, 50))
    small[:] = large[:] = 5

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        sky.ComputePool(sky.Dask(client), display="quiet") as pool,
    ):
        for file in (small, large):
            assert sky.compute(np.sum)(file) >> pool == file.sum()
            for array in (file, file[::2], np.asarray(file)):
                with pytest.raises(ValueError, match="read-only"):
                    sky.compute(write)(array) >> pool
            own = np.memmap(file.filename, float, "c", shape=file.shape)
            assert sky.gather(*(sky.compute(write)(own) for _ in range(2))) >> pool == ((5.0, 7.0),) * 2

    assert small[0, 0] == large[0, 0] == 5
