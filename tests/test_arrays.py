"""Arrays, bytes and what is made of them: once per node, whatever their layout, and as they are at each call."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

import skyward as sky
from skyward import pickling
from skyward.engine.store import Keeper, Store

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
    keeper = Keeper(store, unchanged=False)
    written = []

    def put() -> Any:
        _, (buffer,) = pickling.dumps(make(array))
        return keeper.put(buffer)

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
    keeper = Keeper(Store(), unchanged=False)
    view = array[:, ::2]
    _, (buffer,) = pickling.dumps(view)
    seen = {keeper.put(buffer)}

    for row in range(0, size, size // 10):
        view[row] = row + 1
        seen.add(keeper.put(buffer))

    assert len(seen) == 11


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
