"""Parts of data: disjoint, complete, the same for every argument, and of the same type."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import skyward as sky

COUNTS = st.integers(1, 9)


def parts(data: Any, count: int, **options: Any) -> list[Any]:
    return [sky.shard(data, node=i, total_nodes=count, **options) for i in range(count)]


@given(st.lists(st.integers()), COUNTS, st.booleans(), st.integers(0, 5))
def test_parts_are_disjoint_and_complete(data: list[int], count: int, shuffle: bool, seed: int) -> None:
    indices = list(enumerate(data))

    found = parts(indices, count, shuffle=shuffle, seed=seed)

    assert sorted(itertools.chain(*found)) == indices
    assert max(map(len, found)) - min(map(len, found)) <= 1


@given(st.lists(st.integers()), COUNTS, st.booleans())
def test_parts_are_equally_long_when_the_last_are_dropped(data: list[int], count: int, shuffle: bool) -> None:
    found = parts(data, count, shuffle=shuffle, drop_last=True)

    assert {len(p) for p in found} == {len(data) // count}


@given(st.integers(0, 50), COUNTS, st.booleans())
def test_all_arguments_are_divided_at_the_same_indices(length: int, count: int, shuffle: bool) -> None:
    a, b = list(range(length)), np.arange(length) * 10

    for node in range(count):
        x, y = sky.shard(a, b, shuffle=shuffle, seed=3, node=node, total_nodes=count)
        assert [10 * v for v in x] == y.tolist()


def test_the_same_seed_gives_the_same_order_everywhere() -> None:
    # Written down once: it must stay what it is, on every version of Python.
    assert sky.shard(list(range(8)), shuffle=True, seed=1, node=0, total_nodes=1) == [3, 6, 1, 5, 7, 0, 4, 2]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        [1, 2, 3],
        (1, 2, 3),
        "abc",
        b"abc",
        np.arange(6).reshape(3, 2),
        pd.Series([1, 2, 3]),
        pd.DataFrame({"a": [1, 2, 3]}),
    ],
    ids=lambda d: type(d).__name__,
)
def test_types_are_kept(data: Any, shuffle: bool) -> None:
    part = sky.shard(data, shuffle=shuffle, node=0, total_nodes=2)

    assert type(part) is type(data)
    assert len(part) == 2


def test_ranges_and_sparse_matrices_are_divided_too() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    matrix = sparse.csr_matrix(np.arange(12).reshape(4, 3))

    assert sky.shard(range(10), node=1, total_nodes=3) == range(1, 10, 3)
    np.testing.assert_array_equal(sky.shard(matrix, node=1, total_nodes=2).toarray(), matrix.toarray()[1::2])
    np.testing.assert_array_equal(
        sky.shard(matrix, shuffle=True, node=0, total_nodes=1).toarray().sum(), matrix.toarray().sum()
    )


def test_torch_tensors_stay_tensors() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    part = sky.shard(torch.arange(10), node=1, total_nodes=3)

    assert part.tolist() == [1, 4, 7]


def test_alone_a_call_gets_everything() -> None:
    assert sky.shard([1, 2, 3]) == [1, 2, 3]
    assert sky.shard([1], (2,)) == ([1], (2,))
    assert list(sky.shard_iterator(iter("abc"))) == ["a", "b", "c"]


def test_unequal_lengths_are_told() -> None:
    with pytest.raises(ValueError, match="different lengths: 2, 3"):
        sky.shard([1, 2], [1, 2, 3])


def test_nothing_and_things_without_a_length_are_refused() -> None:
    with pytest.raises(TypeError, match="at least one"):
        sky.shard()
    with pytest.raises(TypeError, match=r"shard_iterator\(\) takes any iterable"):
        sky.shard(iter([1]))
    with pytest.raises(TypeError, match="without dimensions"):
        sky.shard(np.array(5))


@pytest.mark.parametrize(("node", "total"), [(1, None), (None, 2), (2, 2), (-1, 2), (0, 0)])
def test_a_place_that_cannot_be_is_refused(node: int | None, total: int | None) -> None:
    with pytest.raises(sky.SpecError, match="0 <= node < total_nodes"):
        sky.shard([1, 2, 3], node=node, total_nodes=total)


@given(st.integers(0, 60), COUNTS, st.booleans())
def test_an_iterable_is_divided_as_a_list_is(length: int, count: int, drop_last: bool) -> None:
    found = [
        list(sky.shard_iterator(iter(range(length)), drop_last=drop_last, node=i, total_nodes=count))
        for i in range(count)
    ]

    assert found == parts(list(range(length)), count, drop_last=drop_last)


def test_an_endless_iterable_is_read_only_as_far_as_needed() -> None:
    part = sky.shard_iterator(itertools.count(), node=1, total_nodes=4)

    assert [next(part) for _ in range(3)] == [1, 5, 9]


# --- DistributedSampler -------------------------------------------------------------------------------------


def sampler(length: int, index: int, count: int, **options: Any) -> sky.DistributedSampler:
    made = sky.DistributedSampler(range(length), **options)
    made._index, made._count = index, count
    return made


@given(st.integers(0, 50), COUNTS, st.booleans(), st.integers(0, 3))
def test_samplers_of_all_ranks_cover_everything_in_equal_parts(
    length: int, count: int, drop_last: bool, epoch: int
) -> None:
    found = []
    for index in range(count):
        one = sampler(length, index, count, drop_last=drop_last)
        one.set_epoch(epoch)
        found.append(list(one))
        assert len(found[-1]) == len(one)

    everything = list(itertools.chain(*found))
    assert len({len(f) for f in found}) == 1
    if drop_last:
        assert len(set(everything)) == len(everything)
    else:
        assert set(everything) == set(range(length))


def test_every_epoch_has_an_order_of_its_own() -> None:
    one = sampler(20, 0, 1)
    first = list(one)
    again = list(one)
    one.set_epoch(1)

    assert first == again
    assert sorted(one) == sorted(first)
    assert list(one) != first
    assert list(sampler(5, 0, 2, shuffle=False)) == [0, 2, 4]


def test_in_a_broadcast_each_sampler_has_its_own_part(pool: sky.ComputePool) -> None:
    found = sky.compute(lambda: list(sky.DistributedSampler(range(10))))() @ pool.slots

    assert {len(f) for f in found} == {3}
    assert set(itertools.chain(*found)) == set(range(10))
