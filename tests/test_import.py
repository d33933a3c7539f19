"""The public face: what `import skyward` loads, and that every public name is there."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import skyward as sky

HEAVY = {
    *("asyncssh", "click", "cloudpickle", "cryptography", "dask", "distributed", "joblib", "rich", "tornado"),
    *("boto3", "botocore", "pydo", "verda", "numpy", "pandas", "sklearn", "torch"),
}
LIST_MODULES = "import json, sys; print(json.dumps(sorted(sys.modules)))"


def _run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def test_import_loads_no_library() -> None:
    loaded = json.loads(_run("import skyward;" + LIST_MODULES))

    assert HEAVY.isdisjoint(loaded)


def test_import_of_the_joblib_package_is_left_to_those_who_use_it() -> None:
    loaded = json.loads(_run("import skyward.integrations;" + LIST_MODULES))

    assert {"joblib", "sklearn", "skyward_joblib"}.isdisjoint(loaded)


@pytest.mark.parametrize("module", [sky, importlib.import_module("skyward.integrations")])
def test_public_names_are_sorted_and_said_once_for_each_reader(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = {alias.name for node in imports for alias in node.names if alias.asname}

    assert module.__all__ == sorted(set(module.__all__))
    assert imported - {"__version__"} == set(module.__all__)


@pytest.mark.parametrize("name", sky.__all__)
def test_a_public_name_resolves(name: str) -> None:
    assert getattr(sky, name) is not None
    assert name in dir(sky)


def test_dir_lists_nothing_that_is_not_there() -> None:
    assert [name for name in dir(sky) if not hasattr(sky, name)] == []


def test_every_error_is_public() -> None:
    errors = importlib.import_module("skyward.errors")
    defined = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)}

    assert defined <= set(sky.__all__)


def test_every_event_is_public() -> None:
    events = importlib.import_module("skyward.events")
    defined = {n for n, v in vars(events).items() if isinstance(v, type) and v.__module__ == events.__name__}

    assert {n for n in defined if not n.startswith("_")} <= set(sky.__all__)


def test_decorators_outlive_the_modules_that_share_their_names() -> None:
    # A submodule's first import sets the attribute; this loads every one of them, in a process of its own.
    found = [m.name for m in pkgutil.walk_packages(sky.__path__, "skyward.")]
    modules = [name for name in found if not name.endswith("__main__")]
    shared = set(sky.__all__) & {m.removeprefix("skyward.") for m in modules}

    kinds = _run(
        "import importlib, skyward\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*(type(getattr(skyward, n)).__name__ for n in {sorted(shared)!r}))"
    ).split()

    assert dict(zip(sorted(shared), kinds, strict=True)) == {
        "compute": "function", "conc": "module", "integrations": "module", "pool": "function"
    }  # fmt: skip


def test_an_unknown_name_is_told_the_nearest_one() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'computepool'. Did you mean 'ComputePool'"):
        _ = sky.computepool  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"no attribute 'xyzzy'$"):
        _ = sky.xyzzy  # type: ignore[attr-defined]


def test_integrations_know_their_names() -> None:
    integrations = importlib.import_module("skyward.integrations")

    assert [name for name in integrations.__all__ if not callable(getattr(integrations, name))] == []
    with pytest.raises(AttributeError, match="nothing"):
        _ = integrations.nothing
