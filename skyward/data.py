"""A participant's part of data: `shard`, `shard_iterator`, `DistributedSampler`.

Knows no numeric library: arrays, frames and tensors are taken apart by what they can do.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar, overload

from skyward.errors import invalid
from skyward.worker import context

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


def _place(node: int | None, total_nodes: int | None) -> tuple[int, int]:
    """Return (index, count) of this participant, or what was given instead."""
    if node is None and total_nodes is None:
        return context.participant()
    ok = isinstance(node, int) and isinstance(total_nodes, int) and 0 <= node < total_nodes
    if not ok or node is None or total_nodes is None:
        accepted = "both of node and total_nodes, with 0 <= node < total_nodes, or neither"
        raise invalid("node", node, accepted, shown=f"node={node!r}, total_nodes={total_nodes!r}")
    return node, total_nodes


@overload
def shard(
    data: A,
    /,
    *,
    shuffle: bool = ...,
    seed: int = ...,
    drop_last: bool = ...,
    node: int | None = ...,
    total_nodes: int | None = ...,
) -> A: ...
@overload
def shard(
    a: A,
    b: B,
    /,
    *,
    shuffle: bool = ...,
    seed: int = ...,
    drop_last: bool = ...,
    node: int | None = ...,
    total_nodes: int | None = ...,
) -> tuple[A, B]: ...
@overload
def shard(
    a: A,
    b: B,
    c: C,
    /,
    *,
    shuffle: bool = ...,
    seed: int = ...,
    drop_last: bool = ...,
    node: int | None = ...,
    total_nodes: int | None = ...,
) -> tuple[A, B, C]: ...
@overload
def shard(
    *data: Any,
    shuffle: bool = ...,
    seed: int = ...,
    drop_last: bool = ...,
    node: int | None = ...,
    total_nodes: int | None = ...,
) -> tuple[Any, ...]: ...
def shard(
    *data: Any,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    node: int | None = None,
    total_nodes: int | None = None,
) -> Any:
    """Return this participant's part of each sequence: every n-th element, beginning at its own index.

    Under ``@``, the participants are those of the broadcast. Under ``>>``, and outside a pool, a call is the only
    participant and gets everything.

    Parameters
    ----------
    data
        Sequences of equal length: lists, tuples, strings, ranges, numpy arrays, pandas objects, scipy.sparse
        matrices, torch tensors; each part has the type of its whole. All are divided along their first axis, at
        the same indices.
    shuffle
        Divide a permutation of the elements instead, which `seed` determines; it is the same everywhere.
    drop_last
        Leave out the elements that would make some parts longer than others.
    node, total_nodes
        Act as participant `node` of `total_nodes`, regardless of the broadcast.

    Returns
    -------
    One part for one argument, a tuple of parts for several.

    Raises
    ------
    ValueError
        The lengths differ.
    """
    if not data:
        raise TypeError("shard() needs at least one sequence")
    index, count = _place(node, total_nodes)
    lengths = [_length(d) for d in data]
    if len(set(lengths)) > 1:
        raise ValueError(f"shard() got sequences of different lengths: {', '.join(map(str, lengths))}")
    indices = _indices(lengths[0], index, count, shuffle=shuffle, seed=seed, drop_last=drop_last)
    parts = tuple(_take(d, indices) for d in data)
    return parts[0] if len(parts) == 1 else parts


def _length(data: Any) -> int:
    shape = getattr(data, "shape", None)  # a sparse matrix has no length
    if shape is not None:
        if not shape:
            raise TypeError(f"shard() can't divide a {type(data).__name__} without dimensions")
        return int(shape[0])
    if not isinstance(data, Sized):
        raise TypeError(
            f"shard() needs sequences, and {type(data).__name__} has no length; shard_iterator() takes any iterable"
        )
    return len(data)


def _indices(
    length: int, index: int, count: int, *, shuffle: bool, seed: int, drop_last: bool
) -> Sequence[int]:
    end = length - length % count if drop_last else length
    if not shuffle:
        return range(index, end, count)
    order = list(range(length))
    random.Random(seed).shuffle(order)
    return order[index:end:count]


def _take(data: Any, indices: Sequence[int]) -> Any:
    """Return the elements at `indices`, in the type of `data`."""
    plain = slice(indices.start, indices.stop, indices.step) if isinstance(indices, range) else None
    if hasattr(data, "iloc"):  # pandas and what follows it
        return data.iloc[plain if plain is not None else list(indices)]
    if hasattr(data, "shape"):  # numpy, scipy.sparse, torch and what follows them
        return data[plain if plain is not None else list(indices)]
    if plain is not None:
        return data[plain]
    if isinstance(data, str):
        return "".join(data[i] for i in indices)
    if isinstance(data, (bytes, bytearray)):
        return type(data)(data[i] for i in indices)
    found = [data[i] for i in indices]
    return tuple(found) if isinstance(data, tuple) else found


def shard_iterator(
    iterable: Iterable[T], *, drop_last: bool = False, node: int | None = None, total_nodes: int | None = None
) -> Iterator[T]:
    """Yield this participant's elements of any iterable, every n-th one, reading it only as far as needed.

    With `drop_last`, an element is yielded only if its round is complete (one element for each participant), so that
    all participants get the same number.
    """
    index, count = _place(node, total_nodes)
    if not drop_last:
        return itertools.islice(iterable, index, None, count)
    return _whole_rounds(iter(iterable), index, count)


def _whole_rounds(iterator: Iterator[T], index: int, count: int) -> Iterator[T]:
    while len(taken := list(itertools.islice(iterator, count))) == count:
        yield taken[index]


class DistributedSampler:
    """Indices of this participant's part of a dataset, for the `sampler` argument of a torch `DataLoader`.

    As in `torch.utils.data.DistributedSampler`, all parts have the same length, so that all participants take the same
    number of steps: some elements are repeated, or with `drop_last` left out.

    Parameters
    ----------
    dataset
        Anything with a length.
    shuffle
        Take the elements in a random order that depends on `seed` and the epoch; call `set_epoch` before each epoch.
    """

    def __init__(
        self, dataset: Sized, shuffle: bool = True, seed: int = 0, drop_last: bool = False
    ) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch: int = 0
        self._index, self._count = _place(None, None)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next epoch; give the same number on all participants."""
        self.epoch = epoch

    def __len__(self) -> int:
        length, count = len(self.dataset), self._count
        return length // count if self.drop_last else -(-length // count)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.dataset)))
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        if not order:
            return iter(())
        rounds = itertools.cycle(order) if not self.drop_last else iter(order)
        return itertools.islice(rounds, self._index, len(self) * self._count, self._count)
