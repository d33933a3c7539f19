"""The user's own modules: workers import them by name, from the caller's folders or from archives."""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import importlib.util
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import skyward as sky
from skyward.engine import own_modules, sources
from skyward.engine.sources import Sources
from skyward.engine.store import Store
from skyward.errors import SerializationError
from skyward.transfer import pickling

Import = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def pool() -> Iterator[sky.ComputePool]:
    with sky.ComputePool("local", display="quiet") as pool:
        yield pool


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path, whose modules are forgotten afterwards."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    importlib.invalidate_caches()


# Each is files and the module in which `work` runs on a worker; `check` gets the result, in the caller.
KINDS: dict[str, tuple[dict[str, str], str]] = {
    "enum": (
        {
            "own_enum_kind.py": """
                import enum
                class Color(enum.Enum): RED = 1
                def work(color=Color.RED):
                    from own_enum_kind import Color as Same
                    assert color is Same.RED
                    return color
                def check(color): return color is Color.RED
            """
        },
        "own_enum_kind",
    ),
    "objects that do not pickle": (
        {
            "own_objects.py": """
                import contextvars, functools, threading, typing
                T = typing.TypeVar("T")
                lock, local, var = threading.Lock(), threading.local(), contextvars.ContextVar("var", default=1)
                @functools.singledispatch
                def kind(x): return "any"
                @kind.register
                def _(x: int): return "int"
                class Cached:
                    def __init__(self): self.lock_is_held = lock.locked()
                    @functools.cached_property
                    def value(self): return 1
                def same(x: T) -> T: return x
                def work():
                    with lock:
                        local.x = var.get()
                        return same(local.x), kind(1), Cached()
                def check(found):
                    one, name, cached = found
                    return (one, name, cached.value) == (1, "int", 1) and type(cached) is Cached
            """
        },
        "own_objects",
    ),
    "subclass hooks": (
        {
            "own_hooks.py": """
                class Base:
                    known = {}
                    def __init_subclass__(cls, /, name, **kwargs):
                        super().__init_subclass__(**kwargs)
                        Base.known[name] = cls
                class One(Base, name="one"): pass
                def work(): return Base.known["one"]
                def check(cls): return cls is One
            """
        },
        "own_hooks",
    ),
    "a long chain of functions": (
        {
            "own_chain.py": "def f0(): return 0\n"
            + "".join(f"def f{i}(): return f{i - 1}() + 1\n" for i in range(1, 400))
            + "def work(): return f399()\ndef check(found): return found == 399\n"
        },
        "own_chain",
    ),
    "processes that a call starts": (
        {
            "own_spawn.py": """
                import multiprocessing
                def square(x): return x * x
                def work():
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        return pool.map(square, [3])
                def check(found): return found == [9]
            """
        },
        "own_spawn",
    ),
    "decorated by compute": (
        {
            "own_compute.py": """
                import threading, skyward as sky
                lock = threading.Lock()
                @sky.compute
                def work():
                    with lock: return work.local is not None
                def check(found): return found
            """
        },
        "own_compute",
    ),
    "a package with data and relative imports": (
        {
            "own_package/__init__.py": "",
            "own_package/inner/__init__.py": "from ..words import read",
            "own_package/words.py": """
                from importlib.resources import files
                def read(): return (files("own_package") / "data" / "words.txt").read_text()
            """,
            "own_package/data/words.txt": "some words",
            "own_package/tasks.py": """
                def work():
                    from .inner import read
                    return read()
                def check(found): return found == "some words"
            """,
        },
        "own_package.tasks",
    ),
    "a namespace package": (
        {
            "own_namespace/deep/tasks.py": """
                def work():
                    from own_namespace.other import value
                    from .beside import beside
                    return value + beside
                def check(found): return found == 3
            """,
            "own_namespace/deep/beside.py": "beside = 2",
            "own_namespace/other.py": "value = 1",
        },
        "own_namespace.deep.tasks",
    ),
    "modules that others import lazily": (
        {
            "own_first.py": """
                import importlib
                def work():
                    import own_second
                    return own_second.second() + importlib.import_module("own_fourth").four
                def check(found): return found == 7
            """,
            "own_second.py": "def second():\n    from own_third import (\n        three,\n    )\n    return three",
            "own_third.py": "three = 3",
            "own_fourth.py": "four = 4",
        },
        "own_first",
    ),
    "the name of an installed package": (
        {
            "iniconfig.py": """
                def work():
                    import iniconfig
                    return iniconfig.work is work
                def check(found): return found
            """
        },
        "iniconfig",
    ),
    "the name of a loaded module of Python": (
        {"cmd.py": "def work():\n    import cmd\n    return cmd.work is work\ndef check(found): return found"},
        "cmd",
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, project: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    files, name = KINDS[request.param]
    write(project, files)
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    assert str(module.__file__).startswith(str(project))
    return module


def test_own_modules_are_imported_by_name(kind: ModuleType, pool: sky.ComputePool) -> None:
    work = kind.work if isinstance(kind.work, sky.compute(len).__class__) else sky.compute(kind.work)

    assert kind.check(work() >> pool)


def run_elsewhere(fn: Any, folder: Path) -> Any:
    """Return the result of `fn`, called in a process that sees none of the caller's modules."""
    store = Store()
    shipped = Sources(store, ship=True)
    data, _ = pickling.dumps(fn, shipped.refer)
    shipped.look()
    facts, archives = shipped.facts
    there = folder / "there"
    there.mkdir(exist_ok=True)
    for ref in archives:
        (there / ref.digest).write_bytes(store.data(ref.digest))
    (there / "call").write_bytes(pickle.dumps((facts, data)))
    subprocess.run(
        [sys.executable, "-c", _ELSEWHERE], cwd=there, check=True, env={**os.environ, "PYTHONPATH": _SKYWARD}
    )
    return pickling.loads((there / "result").read_bytes())


_SKYWARD = str(Path(sky.__file__).parent.parent)
_ELSEWHERE = """
import pathlib, pickle
from skyward.transfer import pickling, sources
facts, data = pickle.loads(pathlib.Path("call").read_bytes())
read = lambda ref: pathlib.Path(ref.digest).read_bytes()
assert sources.install(facts, read, "unpacked", may_restart=False)
pathlib.Path("result").write_bytes(pickling.dumps(pickling.loads(data)())[0])
"""


def test_own_modules_travel_as_archives(kind: ModuleType, tmp_path: Path) -> None:
    assert kind.check(run_elsewhere(getattr(kind.work, "fn", kind.work), tmp_path))


def test_modules_in_a_zip_file_travel(project: Path, tmp_path: Path, pool: sky.ComputePool, monkeypatch: Any) -> None:
    archive = project / "code.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("inner/zipped/__init__.py", "from .inner import work")
        zipped.writestr("inner/zipped/inner.py", "def work(): return __file__")
    monkeypatch.syspath_prepend(archive / "inner")
    work = importlib.import_module("zipped").work

    assert sky.compute(work)() >> pool == f"{archive}/inner/zipped/inner.py"
    assert run_elsewhere(work, tmp_path).endswith("/zipped/inner.py")


def test_an_exception_of_an_own_module_is_of_its_class(project: Path, pool: sky.ComputePool) -> None:
    write(
        project,
        {"own_errors.py": "class Bad(Exception): pass\ndef fail():\n    raise Bad('no')  # in the source\n"},
    )
    module = importlib.import_module("own_errors")

    with pytest.raises(module.Bad, match="no") as info:
        sky.compute(module.fail)() >> pool

    told = str(info.value.__cause__)
    assert f'File "{module.__file__}", line 3, in fail' in told
    assert "raise Bad('no')  # in the source" in told


def test_a_lambda_of_an_own_module_imports_its_neighbours(project: Path, tmp_path: Path) -> None:
    write(
        project,
        {"own_lambda.py": "import own_near\nwork = lambda: own_near.value", "own_near.py": "value = 5"},
    )

    assert run_elsewhere(importlib.import_module("own_lambda").work, tmp_path) == 5


def test_what_a_function_of_a_script_imports_travels(project: Path, tmp_path: Path) -> None:
    write(project, {"own_lazy.py": "value = 6"})

    def work() -> Any:
        import own_lazy

        return own_lazy.value

    work.__module__ = "__main__"

    assert run_elsewhere(work, tmp_path) == 6


@pytest.mark.parametrize("metadata", ["RECORD", "installed-files.txt"])
def test_packages_of_another_folder_are_not_own(project: Path, metadata: str) -> None:
    folder = "given-1.0.dist-info" if metadata == "RECORD" else "given-1.0.egg-info"
    listed = "given/__init__.py,sha256=x,1" if metadata == "RECORD" else "../given/__init__.py"
    write(project, {"given/__init__.py": "", f"{folder}/{metadata}": listed, f"{folder}/METADATA": "Name: given"})

    assert own_modules.is_installed("given", str(project / "given/__init__.py"))
    assert not own_modules.is_installed("mine", str(project / "mine.py"))
    assert own_modules.is_installed("tool", "/opt/software/tool/lib/python3.11/site-packages/tool.py")


def test_a_checkout_with_metadata_of_its_build_is_own(project: Path) -> None:
    write(project, {"mine/__init__.py": "", "mine.egg-info/SOURCES.txt": "mine/__init__.py"})

    assert not own_modules.is_installed("mine", str(project / "mine/__init__.py"))


def test_environments_and_caches_stay_at_home(project: Path) -> None:
    write(
        project,
        {
            "tidy/__init__.py": "",
            "tidy/__pycache__/x.pyc": "",
            "tidy/.git/HEAD": "",
            "tidy/env/pyvenv.cfg": "",
            "tidy/env/lib/a.py": "",
            "tidy/data.bin": "",
        },
    )
    (project / "tidy/loop").symlink_to(project / "tidy")
    unit = sources._Unit("tidy", str(project / "tidy/__init__.py"), is_package=True, has_data=True)

    names = {info.name for info, data in unit._members() if data.close() is None}

    assert names == {"tidy/__init__.py", "tidy/data.bin"}


def test_too_large_a_package_is_refused_with_a_way_out(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, {"heavy/__init__.py": "def work(): pass", "heavy/data.bin": "x" * 2000})
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    work = importlib.import_module("heavy").work
    shipped = Sources(Store(), ship=True)

    for _ in range(2):
        pickling.dumps(work, shipped.refer)
        with pytest.raises(SerializationError, match=r"'heavy' can't travel.*Image\(include=\['heavy'\]\)"):
            shipped.look()

    included = Sources(Store(), ship=True, included=["heavy"])
    pickling.dumps(work, included.refer)
    included.look()
    assert included.facts[1] == ()


# --- changes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["called", "submitted", "broadcast"])
def test_a_call_runs_the_module_as_it_is_when_the_call_is_made(
    project: Path, pool: sky.ComputePool, how: str
) -> None:
    name = f"own_changing_{how}"
    write(project, {f"{name}.py": f"import {name}_other\ndef work(): return {name}_other.x", f"{name}_other.py": ""})
    work = sky.compute(importlib.import_module(name).work)

    def run() -> Any:
        match how:
            case "called":
                return work() >> pool
            case "submitted":
                return pool.submit(work()).result()
        return (work() @ pool)[0]

    found = []
    for value in (1, 2, 2, 3):
        write(project, {f"{name}_other.py": f"x = {value}"})
        found.append(run())

    assert found == [1, 2, 2, 3]


def test_a_worker_is_renewed_only_when_it_has_an_older_version(project: Path, pool: sky.ComputePool) -> None:
    write(project, {"own_pid/__init__.py": "import os\ndef work(): return os.getpid()"})
    work = sky.compute(importlib.import_module("own_pid").work)
    first = work() >> pool
    (project / "own_pid/__init__.py").touch()
    write(project, {"own_pid/results.txt": "written by a call"})
    same = work() >> pool
    write(project, {"own_pid/__init__.py": "import os\ndef work(): return os.getpid() + 0"})
    renewed = work() >> pool

    assert (same == first, renewed == first) == (True, False)


def test_files_are_looked_at_once_for_a_gather(
    project: Path, pool: sky.ComputePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(project, {"own_looked_at.py": "def work(x): return x"})
    work = sky.compute(importlib.import_module("own_looked_at").work)
    work(0) >> pool
    looks: list[str] = []
    seen = sources._stat
    monkeypatch.setattr(sources, "_stat", lambda path: looks.append(path) or seen(path))

    assert sky.gather(*(work(i) for i in range(200))) >> pool == tuple(range(200))

    assert looks.count(str(project / "own_looked_at.py")) == 1


def test_a_package_that_is_too_large_spoils_no_other_call(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, {"weighty/__init__.py": "def work(): pass", "weighty/data.bin": "x" * 2000, "light.py": "x = 1"})
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    shipped = Sources(Store(), ship=True)
    shipped.refer(importlib.import_module("weighty").__name__)
    with pytest.raises(SerializationError):
        shipped.look()

    shipped.refer(importlib.import_module("light").__name__)
    shipped.look()

    assert [source.name for source in pickle.loads(shipped.facts[0]).sources] == ["light"]


# --- where pools run them -----------------------------------------------------------------------------------


class Shade(enum.Enum):
    DARK = 1


def is_dark(shade: Shade) -> tuple[bool, Shade]:
    from tests.transfer.test_sources import Shade as Same

    return shade is Same.DARK, shade


def test_a_test_module_is_imported_by_name(pool: sky.ComputePool) -> None:
    same, shade = sky.compute(is_dark)(Shade.DARK) >> pool

    assert same
    assert shade is Shade.DARK


def test_processes_of_their_own_have_own_modules_too(project: Path, pool: sky.ComputePool) -> None:
    write(
        project,
        {
            "own_job.py": """
                import threading, skyward as sky
                from skyward.integrations.frameworks import Distributed
                from skyward.transfer.wire import Isolation
                lock = threading.Lock()
                def work():
                    with lock: return __name__, 1
                job = sky.compute(Distributed(work, Isolation("tests.plain_setup", {}, ())))
            """
        },
    )
    job = importlib.import_module("own_job").job
    first = job() @ pool
    text = (project / "own_job.py").read_text()
    (project / "own_job.py").write_text(text.replace("__name__, 1", "__name__, 2"))

    assert (first, job() @ pool) == ((("own_job", 1),), (("own_job", 2),))


def test_a_module_that_can_not_be_imported_goes_by_value(project: Path, pool: sky.ComputePool) -> None:
    write(project, {"own_script": "factor = 2\ndef work(x): return factor * x\n"})
    spec = importlib.util.spec_from_loader(
        "own_script", importlib.machinery.SourceFileLoader("own_script", str(project / "own_script"))
    )
    assert spec is not None
    module = sys.modules["own_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = sys.modules["own_made"] = ModuleType("own_made")
    exec("factor = 3\ndef work(x): return factor * x\n", vars(made))

    try:
        assert sky.compute(module.work)(1) >> pool == 2
        assert sky.compute(made.work)(1) >> pool == 3
    finally:
        del sys.modules["own_script"], sys.modules["own_made"]


def test_a_module_run_as_a_script_takes_its_package_along(project: Path) -> None:
    write(
        project,
        {
            "own_run/__init__.py": "",
            "own_run/beside.py": "value = 8",
            "own_run/__main__.py": """
                import sys, skyward as sky
                def work():
                    from .beside import value
                    return value
                if __name__ == "__main__":
                    with sky.ComputePool("local", display="quiet") as pool:
                        sys.exit(sky.compute(work)() >> pool)
            """,
        },
    )

    environment = {**os.environ, "PYTHONPATH": _SKYWARD}
    ran = subprocess.run([sys.executable, "-m", "own_run"], cwd=project, env=environment)

    assert ran.returncode == 8
