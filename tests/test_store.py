"""Large arguments: stored once by content, and looked at again where the caller may have changed them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from skyward import pickling
from skyward.engine.calls import Call, Packer
from skyward.engine.store import Keeper, Store
from skyward.wire import BlobRef

SMALL, LARGE = (2 << 20) // 8, (16 << 20) // 8  # elements: compared as a whole, and by samples


def put(keeper: Keeper, value: Any) -> BlobRef:
    _, (buffer,) = pickling.dumps(value)
    return keeper.put(buffer)


def test_an_array_that_cannot_change_is_looked_at_once() -> None:
    keeper = Keeper(Store(None), unchanged=True)
    array = np.ones(SMALL)
    first = put(keeper, array)
    array[:] = 2

    assert put(keeper, {"nested": array}) == first
    assert len(keeper._known) == 1


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_changed_array_is_stored_again_and_an_unchanged_one_is_not(size: int) -> None:
    store = Store(None)
    keeper = Keeper(store, unchanged=False)
    array = np.zeros(size)
    first, again = put(keeper, array), put(keeper, [array])
    array[:] = 1

    assert first == again
    assert put(keeper, array) != first
    assert store.writes == 2


def test_a_large_array_that_has_not_changed_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(None)
    keeper = Keeper(store, unchanged=False)
    array = np.ones(LARGE)
    hashed: list[Any] = []
    whole = store.put
    monkeypatch.setattr(store, "put", lambda view: (hashed.append(view), whole(view))[1])

    assert len({put(keeper, array) for _ in range(5)}) == 1
    assert len(hashed) == 1


@pytest.mark.parametrize("size", [5_000_000, LARGE * 8 + 1234])  # not multiples of anything
def test_each_changed_region_of_8_kib_or_a_2048th_is_noticed(size: int) -> None:
    array = np.zeros(size, np.uint8)
    length = max(8192, array.nbytes // 2048)
    picks = random.Random(1)
    starts = [0, array.nbytes - length, *(picks.randrange(array.nbytes - length) for _ in range(60))]
    keeper = Keeper(Store(None), unchanged=False)
    last = put(keeper, array)

    for start in starts:
        array[start : start + length] += 1
        last, before = put(keeper, array), last
        assert last != before, start


@pytest.mark.parametrize("shape", [(8192, 256), (1024, 2048), (256, 8192)])
def test_a_changed_column_of_a_matrix_is_noticed(shape: tuple[int, int]) -> None:
    keeper = Keeper(Store(None), unchanged=False)
    matrix = np.zeros(shape)
    before = put(keeper, matrix)
    matrix[:, 7] = 1

    assert put(keeper, matrix) != before


def test_large_arrays_of_a_function_are_dropped_when_its_calls_have_ended() -> None:
    store = Store(None, keep_bytes=0)
    array = np.ones(SMALL)
    packer = Packer(store)

    def first() -> float:
        return float(array[0])

    items = [packer.pack(Call(first)) for _ in range(2)]
    digest = items[0].function.digest
    for item in items:
        assert len(item.refs) == 1
        assert store.data(item.refs[0].digest)
        store.release(item.refs)

    assert store._total == 0
    again = packer.pack(Call(first))
    assert again.function.digest == digest
    assert store.data(again.refs[0].digest)


def test_only_bytes_that_were_not_stored_before_count_as_waiting() -> None:
    packer = Packer(Store(None))
    array = np.ones(SMALL)

    sizes = [packer.pack(Call(len, (array,))).size for _ in range(2)]

    assert sizes[0] > array.nbytes
    assert sizes[1] < 1000
