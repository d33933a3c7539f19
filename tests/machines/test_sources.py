"""The user's own modules on machines that see none of the caller's files."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import skyward as sky
from tests.cloudbox import Machine
from tests.machines.conftest import IMAGE, Site

FILES = {
    "shipped/__init__.py": "",
    "shipped/data/words.txt": "some words",
    "shipped/kinds.py": """
        import enum, threading
        lock = threading.Lock()
        class Color(enum.Enum): RED = 1
        class Bad(Exception): pass
    """,
    "shipped/tasks.py": """
        import os, shipped_later, socket
        from importlib.resources import files
        from .kinds import Bad, Color, lock

        def describe(color):
            import shipped_lazily
            with lock:
                text = (files("shipped") / "data" / "words.txt").read_text()
            return color, color is Color.RED, text, shipped_lazily.value, shipped_later.value

        def fail():
            raise Bad("no")  # seen in the traceback

        def place():
            return f"{socket.gethostname()}-{os.getpid()}", __file__, shipped_later.value
    """,
    "shipped_lazily.py": "value = 'lazy'",
    "shipped_later.py": "value = 1",
}


@pytest.fixture(scope="module")
def pool(site: Site, boot: Callable[[int], list[Machine]]) -> Iterator[sky.ComputePool]:
    provider = site.provider(*boot(2))
    with sky.ComputePool(provider, nodes=2, concurrency=2, image=IMAGE, display="quiet") as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


@pytest.fixture
def tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module("shipped.tasks")


def test_a_package_arrives_with_its_data_and_what_it_imports(pool: sky.ComputePool, tasks: ModuleType) -> None:
    color, *rest = sky.compute(tasks.describe)(tasks.Color.RED) >> pool

    assert color is tasks.Color.RED
    assert rest == [True, "some words", "lazy", 1]


def test_an_exception_is_of_its_class_and_shows_its_source(pool: sky.ComputePool, tasks: ModuleType) -> None:
    with pytest.raises(tasks.Bad) as info:
        sky.compute(tasks.fail)() >> pool

    assert 'raise Bad("no")  # seen in the traceback' in str(info.value.__cause__)


def test_slots_of_a_node_share_what_was_unpacked(pool: sky.ComputePool, tasks: ModuleType) -> None:
    places = sky.compute(tasks.place)() @ pool.slots

    assert len({process for process, *_ in places}) == 4
    assert len({file for _, file, _ in places}) == 1


def test_an_edited_module_is_used_by_the_next_call(pool: sky.ComputePool, tasks: ModuleType, folder: Path) -> None:
    before = sky.compute(tasks.place)() @ pool.slots
    (folder / "shipped_later.py").write_text("value = 2")
    single = sky.compute(tasks.place)() >> pool
    after = sky.compute(tasks.place)() @ pool.slots

    assert single[2] == 2
    assert [value for *_, value in after] == [2, 2, 2, 2]
    assert {process for process, *_ in before}.isdisjoint(process for process, *_ in after)


def of_this_module() -> bool:
    return "pytest" in sys.modules


def test_functions_of_a_test_module_need_no_pytest_there(pool: sky.ComputePool) -> None:
    assert sky.compute(of_this_module)() >> pool is False
