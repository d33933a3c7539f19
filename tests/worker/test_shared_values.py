"""Values of calls within a node: one copy, which all its workers map."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import skyward as sky
from skyward.worker import buffer_files, shared_values
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at Linux's /proc")
BYTES = 8 << 20


@sky.compute
def make(kind: str) -> Any:
    array = np.arange(BYTES // 8, dtype=float)
    return {"array": array, "frame": pd.DataFrame({"x": array}), "dict": {"x": array, "name": "x"}}[kind]


@sky.compute
def look(value: Any) -> tuple[float, str]:
    """Return the sum of a value, and the number of the file that its memory is in; "0" if it is in none."""
    array = np.asarray(value if isinstance(value, np.ndarray) else value["x"])
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return float(array.sum()), line.split()[4]
    raise AssertionError("not in memory")


def files(pool: sky.ComputePool) -> list[str]:
    folder = next(iter(pool.client.run(os.getenv, buffer_files.VARIABLE).values()))
    return [path.name for path in Path(folder).glob("value-*")]


@pytest.mark.parametrize("kind", ["array", "frame", "dict"])
def test_a_value_lies_once_in_the_memory_of_its_node(pool: sky.ComputePool, kind: str) -> None:
    kept = pool.persist(make(kind))

    found = look(sky.ref(kept)) @ pool.slots

    expected = float(np.arange(BYTES // 8, dtype=float).sum())
    assert [total for total, _ in found] == [expected] * pool.total_slots
    assert len({file for _, file in found} - {"0"}) == 1
    if kind != "dict":  # whose maker has its own array as well
        assert "0" not in {file for _, file in look(sky.ref(kept)) @ pool.slots}


@contextlib.contextmanager
def on_workers(pool: sky.ComputePool, name: str, value: Any) -> Iterator[None]:
    """Give a variable of `shared_values` another value there."""

    def swap(new: Any) -> Any:
        old = getattr(shared_values, name)
        setattr(shared_values, name, new)
        return old

    (old, *_) = pool.client.run(swap, value).values()
    try:
        yield
    finally:
        pool.client.run(swap, old)


def test_memory_of_a_value_is_free_when_it_is_dropped(pool: sky.ComputePool) -> None:
    before = set(files(pool))
    with on_workers(pool, "_HOLD_S", 3.0):
        kept = pool.persist(make("array"))
        look(sky.ref(kept)) @ pool.slots
        made = set(files(pool)) - before
        assert made

        del kept

        wait_until(lambda: made.isdisjoint(files(pool)))


def fail_to_write(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_without_room_a_value_is_copied(pool: sky.ComputePool) -> None:
    kept = pool.persist(make("array"))

    with on_workers(pool, "_write", fail_to_write):
        found = look(sky.ref(kept)) @ pool.slots

    assert [file for _, file in found] == ["0"] * pool.total_slots
