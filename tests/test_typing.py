"""What a type checker sees: results of the operators, and mistakes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SNIPPET = """
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import reveal_type

import skyward as sky

@sky.compute
def generator(n: int) -> Generator[int, str, float]: yield 1; return 0.5
@sky.compute
def iterator(n: int) -> Iterator[int]: yield 1
@sky.compute(timeout=60)
async def async_iterator(n: int) -> AsyncIterator[int]: yield 1
@sky.compute
async def async_generator(n: int) -> AsyncGenerator[int, str]: yield 1
@sky.compute(timeout=60)
def generator_with_option(n: int) -> Generator[int]: yield 1

def stream(pool: sky.ComputePool) -> None:
    reveal_type(generator(1) >> pool)  # typing.Iterator[int]
    reveal_type(iterator(1) >> pool)  # typing.Iterator[int]
    reveal_type(async_iterator(1) >> sky)  # typing.Iterator[int]
    reveal_type(async_generator(1) >> pool)  # typing.Iterator[int]
    reveal_type(generator_with_option(1) >> pool)  # typing.Iterator[int]
    reveal_type(async_generator.local(1))  # typing.Iterator[int]

@sky.compute
def train(rate: float) -> float: return rate
@sky.compute(retries=1)
def name(x: int) -> str: return str(x)
@sky.compute
async def later(x: int) -> bytes: return b""

def main(pool: sky.ComputePool) -> None:
    reveal_type(train(0.1) >> pool)  # float
    reveal_type(train(0.1) >> sky)  # float
    reveal_type(later(1) >> pool)  # bytes
    reveal_type(train.local(0.1))  # float
    reveal_type(train(0.1) @ pool)  # tuple[float, ...]
    reveal_type(train(0.1) @ sky)  # tuple[float, ...]
    reveal_type(name(1) @ pool.slots)  # tuple[str, ...]
    reveal_type((train(0.1) & name(1)) >> pool)  # tuple[float, str]
    reveal_type((train(0.1) & name(1) & later(2)) >> sky)  # tuple[float, str, bytes]
    reveal_type((train(0.1) & (name(1) & later(2))) >> sky)  # tuple[float, str, bytes]
    reveal_type(sky.gather(train(0.1), name(1)) >> pool)  # tuple[float, str]
    reveal_type(sky.gather(*[train(x) for x in (0.1, 0.2)]) >> sky)  # tuple[float, ...]
    reveal_type(sky.gather(train(x) for x in (0.1, 0.2)) >> sky)  # tuple[float, ...]
    reveal_type(sky.gather([name(1)], return_exceptions=True) >> sky)  # tuple[str | BaseException, ...]
    reveal_type(sky.gather((train(x) for x in (0.1, 0.2)), stream=True) >> sky)  # typing.Iterator[float]
    reveal_type(sky.gather(name(1), name(2), stream=True, ordered=False) >> sky)  # typing.Iterator[str]
    reveal_type(pool.submit(name(1)))  # concurrent.futures._base.Future[str]
    reveal_type(pool.map(name, [1, 2]))  # typing.Iterator[str]
    reveal_type(sky.ref(train(0.1)))  # float
    reveal_type(train(sky.ref(train(0.1))) >> pool)  # float
    reveal_type(sky.ref(name(1) & later(2)))  # tuple[str, bytes]
    reveal_type(pool.persist(name(1)))  # skyward.engine.persisted.Persisted[str]
    reveal_type(pool.persist(name(1)).result())  # str
    reveal_type(sky.ref(pool.persist(name(1))))  # str
    several = sky.gather(*[name(x) for x in (1, 2)])
    reveal_type(pool.persist(several))  # tuple[skyward.engine.persisted.Persisted[str], ...]
    reveal_type(sky.shard([1, 2]))  # list[int]
    reveal_type(sky.shard([1], "a"))  # tuple[list[int], str]

@sky.pool(nodes=2)
def decorated(x: int) -> str: return name(x) >> sky
reveal_type(decorated(1))  # str

@sky.pool("local")
async def decorated_later(x: int) -> str: return ""
async def use() -> None:
    reveal_type(await decorated_later(1))  # str

with sky.Executor("local") as executor:
    reveal_type(executor.submit(name, 1))  # concurrent.futures._base.Future[str]
    reveal_type(executor.submit(pow, 2, 3).result())  # int
"""

MISTAKES = """
import skyward as sky

@sky.compute
def train(rate: float) -> float: return rate

def main(pool: sky.ComputePool) -> None:
    train("x")
    train >> pool
    train(0.1) >> 3
    list(train(0.1))
    sky.ComputePool(nodse=2)
    sky.pool(nodes="2")
    sky.compuet
"""


def _mypy(code: str, folder: Path) -> dict[int, str]:
    """Return what mypy says, by line."""
    path = folder / "snippet.py"
    path.write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), str(path)]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])}
    ran = subprocess.run(
        [*command, "--cache-dir", str(folder / "cache")],
        capture_output=True,
        text=True,
        timeout=170,
        cwd=folder,
        env=environment,
    )
    found = re.findall(r"snippet\.py:(\d+): (?:note|error): (.*)", ran.stdout)
    assert found, ran.stdout + ran.stderr
    return {int(line): text for line, text in reversed(found)}


@pytest.mark.slow
def test_results_have_the_types_of_the_functions(tmp_path: Path) -> None:
    expected = {
        number: line.rpartition("# ")[2]
        for number, line in enumerate(SNIPPET.splitlines(), start=1)
        if "reveal_type(" in line
    }

    said = _mypy(SNIPPET, tmp_path)

    assert said == {n: f'Revealed type is "{text}"' for n, text in expected.items()}


@pytest.mark.slow
def test_mistakes_are_errors(tmp_path: Path) -> None:
    first = next(n for n, line in enumerate(MISTAKES.splitlines(), start=1) if 'train("x")' in line)

    said = _mypy(MISTAKES, tmp_path)

    assert sorted(said) == list(range(first, first + 7))
